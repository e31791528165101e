"""Settings of a run that several workers compute together."""

from typing import Literal

from pydantic import Field

from manylora_registry.config import ConfigModel


class WorkerSettings(ConfigModel):
    """How many processes train, and where Ray puts them."""

    count: int = Field(default=1, ge=1)
    """Workers; 1 trains in this process, without Ray."""
    sharding: Literal["none", "fsdp"] = "none"
    """none: every worker holds the whole base. fsdp: its layers are divided among them."""
    cpus: float = Field(default=1.0, gt=0.0)
    """CPU cores of each worker."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker gets a GPU. auto: if the Ray cluster has one for each."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that lost workers are started again from the last checkpoint."""
    address: str | None = None
    """Of a Ray cluster that shares the run directory's file system, e.g. `auto`. null: what
    RAY_ADDRESS says, or else a cluster of this machine for the time of the run."""
