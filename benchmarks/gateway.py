"""What the gateway costs on top of the engine.

Part one, no model: an engine that makes up tokens behind the whole gateway (gRPC, admission, Ray
Serve, pool), as fast as asked at 64 streams, and the same deltas through a plain Ray Serve
streaming handle. Part two, with `--real`: the base model in vLLM behind the gateway (gRPC, and
HTTP with the `openai` client), the same requests to the `AsyncLLM` behind it, called directly in
its process, and to `vllm serve` with the `openai` client; all take turns, so that a machine that
drifts hits all.

    PYTHONPATH=. python benchmarks/gateway.py [--real] [--no-synthetic]

Prints a table and, last, one JSON line.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from benchmarks import openai_stream
from manylora_client import AsyncClient
from manylora_registry import Registry

ROOT = Path(__file__).parents[1]


def write_config(
    config: Path,
    base: Path,
    *,
    context: int,
    streams: int,
    interval_ms: int = 20,
    slots: int = 4,
    host_adapters: int = 32,
    express: int = 0,
    max_requests: int = 4096,
) -> None:
    """A gateway over `base` and the registry beside `config`, which is made where it is missing."""
    registry = config.parent / "registry"
    Registry.open(registry).close()
    config.write_text(
        f"""
base: {base.resolve()}
registry: {registry}
listen: {{inference: "127.0.0.1:0", admin: "127.0.0.1:0"}}
engine: {{slots: {slots}, host_adapters: {host_adapters}, max_rank: 16, max_context: {context}, \
max_concurrent: {streams}, kv_cache_gib: 1, express: {express}, stream_interval_ms: {interval_ms}}}
limits: {{max_requests: {max_requests}}}
"""
    )


def write_base(directory: Path) -> Path:
    """A base with a fingerprint and nothing else."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer_config.json").write_text("{}")
    weights = {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)}
    save_file(weights, directory / "model.safetensors")
    return directory


PROMPT = list(range(100, 164))
MARK = [7, 7, 7, 7]
"""The prompt on which `engine_alone.py` measures its engine without the gateway."""

Measure = Callable[[], tuple[float, float]]
"""Takes a round: tokens/s, and median seconds to the first token."""


class Served:
    """A gateway process of this benchmark, up while the context lasts."""

    def __init__(self, module: Sequence[str], config: Path, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *module, str(config)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        )

    def __enter__(self) -> dict[str, str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready "):
                return dict(word.split("=", 1) for word in line.split()[1:])
        raise SystemExit("the gateway did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(90)


def told(script: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a script of this directory prints; Ray may print below it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(("{", "[["))]
    return json.loads(line)


async def stream_all(
    target: str, streams: int, tokens: int, prompt: list[int], adapter: str = ""
) -> tuple[float, float, int]:
    """Tokens/s of all streams together, median seconds to the first token, and deltas."""
    firsts: list[float] = []
    deltas = 0

    async def stream(client: AsyncClient) -> None:
        nonlocal deltas
        asked = time.perf_counter()
        answer = client.stream(prompt, adapter, max_tokens=tokens, ignore_eos=True)
        got = 0
        async for delta in answer:
            if not got:
                firsts.append(time.perf_counter() - asked)
            got += len(delta.token_ids)
            deltas += 1
        assert got == tokens, (got, tokens)

    async with AsyncClient(target, timeout=300) as client:
        await client.generate(prompt, adapter, max_tokens=2)
        began = time.perf_counter()
        await asyncio.gather(*(stream(client) for _ in range(streams)))
        seconds = time.perf_counter() - began
    return streams * tokens / seconds, median(firsts), deltas


def synthetic(streams: int, seconds: float, directory: Path) -> dict[str, float]:
    """The gateway's own limit."""
    base = write_base(directory / "base")
    figures: dict[str, float] = {}
    config = directory / "gateway.yaml"
    write_config(config, base, context=1 << 20, streams=streams)
    best = 0.0
    for rate in (400, 1000, 2500):
        # Faster than anybody can take it: what arrives is the limit.
        environment = {"SYNTHETIC_TOKENS_PER_S": str(rate)}
        with Served(["benchmarks.synthetic"], config, **environment) as ready:
            tokens = int(rate * seconds)
            work = stream_all(ready["grpc"], streams, tokens, [1, 2, 3])
            speed, first, deltas = asyncio.run(work)
        asked = rate * streams
        print(
            f"{streams} streams, {asked:7d} tokens/s asked: {speed:8.0f} tokens/s arrive in "
            f"{deltas} deltas, first after {1000 * first:.0f} ms",
            flush=True,
        )
        best = max(best, speed)
    figures["stream_tokens_per_s"] = best
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    handle = told("serve_handle.py", str(streams), **environment)["chunks_per_s"]
    print(f"{streams} streams through a Ray Serve handle: {handle:8.0f} one-token chunks/s")
    figures["serve_handle_chunks_per_s"] = handle
    figures["stream_vs_serve_handle"] = best / handle
    figures["added_us_per_token"] = 1e6 / best
    return figures


@contextmanager
def vllm_serve(base: Path, streams: int) -> Generator[str, None, None]:
    """The URL of vLLM's own OpenAI server, its engine as the gateway's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = f"--dtype float32 --max-model-len 512 --max-num-seqs {streams} --enforce-eager"
    lora = "--enable-lora --max-loras 5 --max-lora-rank 16"
    process = subprocess.Popen(
        [
            # `vllm serve` asks for the version of a package that the CPU build is not called.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
            *f"--host 127.0.0.1 --port {port} {engine} {lora} --disable-log-stats".split(),
        ],
        stdout=subprocess.DEVNULL,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"vllm serve ended with status {process.returncode}")
            try:
                if httpx.get(f"{url}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(90)


def called_directly(target: str, tokens: int) -> tuple[float, float]:
    """A round of the engine behind the gateway, without the gateway."""

    async def ask() -> str:
        async with AsyncClient(target, timeout=300) as client:
            return (await client.generate(MARK, max_tokens=tokens)).text

    speed, first = json.loads(asyncio.run(ask()))
    return speed, first


def real(
    base: Path, streams: int, tokens: int, rounds: int, peers: Sequence[str], directory: Path
) -> dict[str, float]:
    """The gateway beside the engine it holds and vLLM's own server, which take turns."""
    config = directory / "real.yaml"
    write_config(config, base, context=512, streams=streams)

    def over_http(url: str, model: str) -> Measure:
        return lambda: asyncio.run(openai_stream.stream_all(url, model, streams, tokens, PROMPT))

    with ExitStack() as up:
        ready = up.enter_context(Served(["benchmarks.engine_alone"], config))
        target = ready["grpc"]
        sides: dict[str, Measure] = {
            "gateway": lambda: asyncio.run(stream_all(target, streams, tokens, PROMPT))[:2]
        }
        if "engine" in peers:
            sides["engine"] = lambda: called_directly(target, tokens)
        if "vllm-serve" in peers:
            sides["gateway, HTTP"] = over_http(f"http://{ready['http']}", base.name)
            url = up.enter_context(vllm_serve(base, streams))
            sides["vllm serve"] = over_http(url, str(base))
        for measure in sides.values():
            measure()  # Warms up.
        found: list[dict[str, tuple[float, float]]] = []
        for turn in range(rounds):
            # Once forwards, once backwards, so that none always comes after the same other.
            order = list(sides) if turn % 2 == 0 else list(reversed(sides))
            found.append({name: sides[name]() for name in order})
    for name in sides:
        speed, first = (
            median(column) for column in zip(*(turn[name] for turn in found), strict=True)
        )
        print(f"{streams} streams, {name:<13} {speed:7.1f} tokens/s, first after {first:.3f} s")
    figures: dict[str, float] = {}
    for label, ours, theirs in (
        ("vs_engine", "gateway", "engine"),
        ("vs_vllm_serve", "gateway", "vllm serve"),
        ("http_vs_vllm_serve", "gateway, HTTP", "vllm serve"),
    ):
        if theirs in sides:
            for at, what in enumerate(("tokens_per_s", "ttft")):
                ratios = [turn[ours][at] / turn[theirs][at] for turn in found]
                figures[f"{what}_{label}"] = median(ratios)
    return figures


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64, help="of the synthetic engine")
    parser.add_argument("--seconds", type=float, default=8, help="of each synthetic round")
    parser.add_argument("--real", action="store_true", help="measure the base model too")
    peers = ["engine", "vllm-serve"]
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers, help="of --real")
    parser.add_argument("--synthetic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--base", type=Path, default=ROOT / "bases/smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.synthetic:
            figures |= synthetic(options.streams, options.seconds, Path(scratch))
        if options.real:
            figures |= real(
                options.base.resolve(),
                16,
                options.tokens,
                options.rounds,
                options.peers,
                Path(scratch),
            )
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
