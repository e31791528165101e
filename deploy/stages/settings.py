"""The files of a stage: stage.yaml, gateway.yaml, gates.yaml and tenants.yaml in one directory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from deploy.stages.errors import NoStageError, SettingsError
from deploy.stages.gate_settings import Gates
from manylora_gateway.access import AccessConfig
from manylora_gateway.config import Address, AliasName, GatewayConfig
from manylora_registry import Registry
from manylora_registry.config import ConfigModel, load_config
from manylora_registry.errors import ConfigError

STAGES_VARIABLE = "MANYLORA_STAGES"
STAGE_FILE, GATEWAY_FILE, GATES_FILE = "stage.yaml", "gateway.yaml", "gates.yaml"
TENANTS_FILE = "tenants.yaml"

Model = TypeVar("Model", bound=ConfigModel)


class Connection(ConfigModel):
    """A gateway that something else runs, e.g. Kubernetes."""

    inference: Address
    """Its port for clients."""
    admin: Address
    """Its port for operators."""


class StageConfig(ConfigModel):
    """stage.yaml. Paths are relative to it."""

    alias: AliasName
    """What the stage serves: this alias of every adapter."""
    state: Path
    """Directory for what the scripts keep: the gateway's process and log, promotions under way,
    reports."""
    connect: Connection | None = None
    """A gateway that something else runs. Unset: `up` runs one here."""
    token_file: Path | None = None
    """File with the bearer token the scripts show the gateway. Unset: MANYLORA_TOKEN."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds a gateway may take to serve, and to serve a version that was moved in."""
    engine: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """MODULE:FUNCTION that makes the engine. Unset: vLLM. `benchmarks.synthetic:make_engine`
    rehearses everything but the model."""


@dataclass(frozen=True)
class Stage:
    """A stage with its settings read and checked; paths are whole."""

    name: str
    directory: Path
    config: StageConfig
    gateway: GatewayConfig
    gates: Gates

    @property
    def alias(self) -> str:
        """What it serves of every adapter."""
        return self.config.alias

    @property
    def state(self) -> Path:
        """Where the scripts keep what they must."""
        return self.config.state

    @property
    def gateway_file(self) -> Path:
        """What its gateway is started with."""
        return self.directory / GATEWAY_FILE

    @property
    def token(self) -> str | None:
        """What the scripts show its gateway; None: what MANYLORA_TOKEN says.

        Raises:
            SettingsError: its file cannot be read.
        """
        file = self.config.token_file
        try:
            return None if file is None else file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            said = f"{file}: the token of {self.name} cannot be read: {error}"
            raise SettingsError([said]) from error

    @property
    def registry(self) -> Path | None:
        """The registry of its gateway, however that is written; None: what the environment says."""
        named = self.gateway.registry
        return None if named is None else named.resolve()

    def open_registry(self) -> Registry:
        """Opens it."""
        return Registry.open(self.registry, create=False)


def stages_directory() -> Path:
    """Where the stages are: `$MANYLORA_STAGES`, or this directory's parent."""
    named = os.environ.get(STAGES_VARIABLE)
    return Path(named) if named else Path(__file__).resolve().parent.parent


def stage_names() -> list[str]:
    """Every stage there is, by name."""
    return sorted(file.parent.name for file in stages_directory().glob(f"*/{STAGE_FILE}"))


def load_stage(name: str) -> Stage:
    """Reads the files of a stage.

    Raises:
        NoStageError: there is no such stage.
        SettingsError: with every mistake of all its files.
    """
    if name not in stage_names():
        known = ", ".join(stage_names()) or "none"
        raise NoStageError(
            f"there is no stage {name!r} in {stages_directory()} (there: {known}); a stage is a "
            f"directory with {STAGE_FILE}, {GATEWAY_FILE} and {GATES_FILE}"
        )
    directory = (stages_directory() / name).resolve()
    problems: list[str] = []
    config = _read(directory / STAGE_FILE, StageConfig, problems)
    gateway = _read(directory / GATEWAY_FILE, GatewayConfig, problems)
    gates = _read(directory / GATES_FILE, Gates, problems)
    if (directory / TENANTS_FILE).is_file():
        _read(directory / TENANTS_FILE, AccessConfig, problems)
    if config is not None and gateway is not None:
        problems += _disagreements(directory, config, gateway)
    if config is None or gateway is None or gates is None or problems:
        raise SettingsError(problems)
    paths = {
        "state": directory / config.state,
        "token_file": None if config.token_file is None else directory / config.token_file,
    }
    return Stage(
        name,
        directory,
        config.model_copy(update=paths),
        gateway.relative_to(directory),
        gates.relative_to(directory),
    )


def _read(file: Path, model: type[Model], problems: list[str]) -> Model | None:
    try:
        return load_config(file, model)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _disagreements(directory: Path, config: StageConfig, gateway: GatewayConfig) -> list[str]:
    file = directory / GATEWAY_FILE
    problems: list[str] = []
    if config.alias not in gateway.follow.aliases:
        problems.append(
            f"{file}: follow.aliases lacks {config.alias!r}, the alias that {STAGE_FILE} names"
        )
    if gateway.state is None:
        problems.append(f"{file}: state is required, for a rollout to survive a restart")
    return problems
