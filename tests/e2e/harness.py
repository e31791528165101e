"""Starts a real gateway and looks at it from outside."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import psutil
from safetensors.numpy import save_file

from manylora.admin.v1 import admin_pb2
from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
from manylora_client import Client
from manylora_registry.base import BaseModelIdentity

ROOT = Path(__file__).parents[2]
SLOTS = 3
START_TIMEOUT_S = 400

ADAPTERS = {"red": 4, "green": 8, "blue": 16, "grey": 8, "gold": 2}
"""Name and rank; more than there are slots."""


def write_adapter(directory: Path, base: BaseModelIdentity, rank: int, seed: int) -> Path:
    """Writes a random adapter strong enough to change what the base says."""
    rng = np.random.default_rng(seed)
    targets = ("q_proj", "v_proj", "down_proj") if seed % 2 else ("k_proj", "o_proj", "gate_proj")
    tensors: dict[str, np.ndarray] = {}
    for name, shape in sorted(base.tensors.items()):
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.rpartition(".")[2] in targets:
            rows, columns = shape
            a = rng.standard_normal((rank, columns)) / columns**0.5
            b = rng.standard_normal((rows, rank)) * 0.15 / rank**0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": base.fingerprint,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@dataclass
class Gateway:
    """A running `manylora serve`."""

    process: subprocess.Popen[str]
    inference: str
    admin: str
    http: str
    log: Path

    def client(self) -> Client:
        return Client(self.inference, timeout=120)

    def replicas(self) -> list[admin_pb2.Replica]:
        with grpc.insecure_channel(self.admin) as channel:
            request = admin_pb2.ListReplicasRequest()
            return list(AdminServiceStub(channel).ListReplicas(request, timeout=30).replicas)

    def loaded(self) -> set[tuple[str, int]]:
        """Name and number of every version some replica holds."""
        return {
            (entry.adapter.name, entry.adapter.number)
            for replica in self.replicas()
            for entry in replica.adapters
        }

    def requests(self) -> int:
        return sum(replica.requests for replica in self.replicas())


def replica_processes(parent: int) -> list[psutil.Process]:
    """The engine replicas below a process."""
    found: list[psutil.Process] = []
    for process in psutil.Process(parent).children(recursive=True):
        # Ray starts and ends others all the while.
        with suppress(psutil.NoSuchProcess):
            # It names its workers after what they run, in their command line.
            if "ServeReplica:manylora" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(holds: Callable[[], bool], within_s: float) -> bool:
    """Asks until it holds or the time is up; a condition elsewhere has no event to wait for."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if holds():
                return True
        except grpc.RpcError as error:
            # A replica that is busy for some seconds does not say how it is, and may the next time.
            if cast("grpc.Call", error).code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        time.sleep(0.1)
    return holds()


def start_gateway(
    config: Path, log: Path, module: Sequence[str] = ("manylora_cli", "serve")
) -> Gateway:
    """Starts `manylora serve`, or another module that serves, and waits for its ready line."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, str(config)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(path)),
            cwd=ROOT,
        )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if line.startswith("ready "):
                words = dict(word.split("=", 1) for word in line.split() if "=" in word)
                return Gateway(process, words["grpc"], words["admin"], words["http"], log)
    except queue.Empty:
        stop(process)
    raise AssertionError(f"the gateway did not start:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[str], timeout_s: float = 90) -> list[psutil.Process]:
    """SIGTERM; returns what was below the process and still lives after it ended."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    process.wait(timeout_s)
    return psutil.wait_procs(below, timeout=0)[1]
