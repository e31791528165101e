"""The main job from rows to tokens, as a user would do it; run by `make quickstart`.

Every step is a `manylora` command, printed before it runs. Only the clients that stream while a
version is swapped are written here, on `manylora_client`.
"""

import asyncio
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manylora_client import AsyncClient, ClientError
from manylora_registry import Registry

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BASE = ROOT / "bases/smollm2-135m"
WORK = ROOT / "runs/quickstart"
REGISTRY = WORK / "registry"
TASKS = ("user-agent", "spelling", "docstring")
SWAPPED = "spelling"
STREAMS = 6
STREAMED_ROWS = 8
STREAMED_TOKENS = 24
BEFORE_SWAP = 20
"""Streams to see answered before the new version is published."""
AFTER_SWAP = 40
"""Streams to see answered after the first answer of the new version."""
SWAP_TIMEOUT_S = 120
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Runs every step and prints what they came to."""
    began = time.monotonic()
    if WORK.exists():
        console.print(f"removing {_short(WORK)} of the quickstart before")
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True)
    step(1, "a base model")
    run("base", "fetch", "smollm2-135m", str(BASE))
    step(2, "three adapters, trained in one run")
    run("train", str(HERE / "recipe.yaml"))
    step(3, "published, each as version 1 and as its `production`")
    run("publish", str(WORK / "train"), "--alias", "production", "--registry", str(REGISTRY))
    step(4, "served from one base")
    with Server(HERE / "gateway.yaml", WORK / "gateway.log") as server:
        step(5, "base beside adapters on held-out rows")
        run("evaluate", str(HERE / "suite.yaml"), "--server", server.address, "--out", f"{WORK}/v1")
        step(6, f"a second version of {SWAPPED}, swapped in while clients stream")
        run("train", str(HERE / "retrain.yaml"))
        swap = asyncio.run(swap_under_load(server.address))
        step(7, f"{SWAPPED} again on its held-out rows")
        run(
            *("evaluate", str(HERE / "suite.yaml"), "--task", SWAPPED),
            *("--server", server.address, "--out", f"{WORK}/v2"),
        )
    conclude(swap, time.monotonic() - began)


def step(number: int, title: str) -> None:
    """Says what comes next."""
    console.rule(f"[bold]{number}. {title}", align="left")


def run(*arguments: str) -> None:
    """Runs one `manylora` command in this terminal; ends the quickstart if it fails."""
    console.print(f"[dim]$ manylora {shlex.join(_short(word) for word in arguments)}[/]")
    status = subprocess.run([sys.executable, "-m", "manylora_cli", *arguments], cwd=ROOT).returncode
    if status != 0:
        sys.exit(f"quickstart: `manylora {arguments[0]}` failed with status {status}")


def _short(path: str | Path) -> str:
    return str(path).replace(f"{ROOT}/", "")


class Server:
    """`manylora serve` in the background: ready when entered, drained and gone when left."""

    def __init__(self, config: Path, log: Path) -> None:
        self._config, self._log = config, log
        self.address = ""

    def __enter__(self) -> "Server":
        console.print(f"[dim]$ manylora serve {_short(self._config)} > {_short(self._log)}[/]")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "manylora_cli", "serve", str(self._config)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        began = time.monotonic()
        with console.status("starting Ray and vLLM") as status:
            while time.monotonic() - began < START_TIMEOUT_S:
                lines = self._log.read_text(errors="replace").splitlines()
                ready = [line for line in lines if line.startswith("ready ")]
                if ready:
                    words = dict(word.split("=", 1) for word in ready[0].split() if "=" in word)
                    self.address = words["grpc"]
                    console.print(f"{ready[0]} after {time.monotonic() - began:.0f} s")
                    return
                if self._process.poll() is not None:
                    sys.exit("\n".join(["quickstart: the server did not start:", *lines[-5:]]))
                elapsed = time.monotonic() - began
                status.update(f"starting Ray and vLLM, {elapsed:.0f} s (usually 60 to 120)")
                time.sleep(0.2)
        sys.exit(f"quickstart: no server after {START_TIMEOUT_S} s; see {_short(self._log)}")

    def __exit__(self, *_: object) -> None:
        console.print("stopping the server (SIGTERM: it drains first)")
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Swap:
    """What clients saw while `production` of one adapter moved."""

    sent: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    by_version: Counter[str] = field(default_factory=Counter)
    """Streams of the swapped adapter by the version that said it made them."""
    others: int = 0
    """Streams of the other adapters."""
    mixed: int = 0
    """Streams whose text is not what the version they name says when asked alone."""
    seconds_to_swap: float = 0.0
    """From the alias's move to the first answer of the new version."""


@dataclass(frozen=True)
class Streamed:
    """One stream that ended well."""

    adapter: str
    version: int
    row: int
    text: str


async def swap_under_load(address: str) -> Swap:
    """Publishes the second version and moves `production` to it while clients stream."""
    prompts = {name: _prompts(WORK / f"train/held_out/{name}.jsonl") for name in TASKS}
    swap = Swap()
    seen: list[Streamed] = []
    done: asyncio.Queue[Streamed] = asyncio.Queue()
    stop = asyncio.Event()

    async def stream_all(client: AsyncClient, offset: int) -> None:
        for turn in itertools.count(offset):
            if stop.is_set():
                return
            name = TASKS[turn % len(TASKS)]
            row = (turn // len(TASKS)) % STREAMED_ROWS
            swap.sent += 1
            try:
                await done.put(await _stream(client, name, row, prompts[name][row]))
            except ClientError as error:
                swap.failed += 1
                swap.errors.append(str(error))

    async with AsyncClient(address) as client, asyncio.timeout(SWAP_TIMEOUT_S):
        clients = [asyncio.create_task(stream_all(client, index)) for index in range(STREAMS)]
        with console.status("streaming from all adapters"):
            seen += [await done.get() for _ in range(BEFORE_SWAP)]
        moved = time.monotonic()
        await asyncio.to_thread(
            run,
            *("publish", str(WORK / "retrain"), "--alias", "production"),
            *("--registry", str(REGISTRY)),
        )
        with console.status("streaming on while the gateway swaps"):
            while (seen[-1].adapter, seen[-1].version) != (SWAPPED, 2):
                seen.append(await done.get())
            swap.seconds_to_swap = time.monotonic() - moved
            seen += [await done.get() for _ in range(AFTER_SWAP)]
        stop.set()
        await asyncio.gather(*clients)
        while not done.empty():
            seen.append(done.get_nowait())
        with console.status("asking each version alone, to compare"):
            swap.mixed = await _mixed(client, seen, prompts)
    swap.by_version.update(f"v{s.version}" for s in seen if s.adapter == SWAPPED)
    swap.others = sum(s.adapter != SWAPPED for s in seen)
    return swap


def _prompts(rows: Path) -> list[list[dict[str, str]]]:
    with rows.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in itertools.islice(lines, STREAMED_ROWS)]


async def _stream(client: AsyncClient, adapter: str, row: int, prompt: Any) -> Streamed:
    pieces: list[str] = []
    stream = client.stream(prompt, adapter=adapter, max_tokens=STREAMED_TOKENS)
    async for delta in stream:
        pieces.append(delta.text)
    version = stream.adapter
    assert version is not None
    return Streamed(adapter, version.number, row, "".join(pieces))


async def _mixed(
    client: AsyncClient, seen: list[Streamed], prompts: dict[str, list[list[dict[str, str]]]]
) -> int:
    """Counts streams that are not, word for word, what their version answers by itself."""
    alone: dict[tuple[str, int, int], str] = {}
    for name, version, row in sorted({(s.adapter, s.version, s.row) for s in seen}):
        answer = await client.generate(
            prompts[name][row], adapter=f"{name}@{version}", max_tokens=STREAMED_TOKENS
        )
        alone[name, version, row] = answer.text
    return sum(s.text != alone[s.adapter, s.version, s.row] for s in seen)


def conclude(swap: Swap, seconds: float) -> None:
    """Prints the summary and leaves it as JSON beside the reports."""
    console.rule("[bold]what it came to", align="left")
    first = json.loads((WORK / "v1/results.json").read_text())
    second = json.loads((WORK / "v2/results.json").read_text())
    scores = {
        task["task"]: [_score(column) for column in task["columns"]] for task in first["tasks"]
    }
    scores[SWAPPED].append(_score(second["tasks"][0]["columns"][-1]))
    sizes = {}
    with Registry.open(REGISTRY) as registry:
        for adapter in registry.adapters():
            sizes[adapter.name] = adapter.latest.size
    table = Table("adapter", "score", "base", "v1", "v2", "size", title="held-out rows")
    for task in first["tasks"]:
        name = task["task"]
        cells = [f"{score:.2f}" for _, score in scores[name]]
        cells += [""] * (3 - len(cells))
        table.add_row(name, scores[name][0][0], *cells, f"{sizes[name] / 1e6:.1f} MB")
    out = Console()
    out.print(table)
    out.print(
        f"during the swap: {swap.sent} requests sent, {swap.failed} failed, "
        f"{SWAPPED} answered {swap.by_version['v1']} times by v1 and {swap.by_version['v2']} by "
        f"v2, other adapters {swap.others}, mixed {swap.mixed}; the first answer of v2 came "
        f"{swap.seconds_to_swap:.1f} s after its publishing began"
    )
    for error in sorted(set(swap.errors)):
        out.print(f"  failed: {error}")
    out.print(
        f"report: {_short(WORK)}/v1/report.html, plots: {_short(WORK)}/train/plots/curves.png"
    )
    out.print(f"all in {seconds:.0f} s. Next, in two terminals:", highlight=False)
    out.print("  .venv/bin/manylora serve recipes/quickstart/gateway.yaml", highlight=False)
    out.print(
        "  .venv/bin/manylora generate --adapter spelling --system "
        "'Correct the spelling of the word. Answer with the word alone.' recieve",
        highlight=False,
        soft_wrap=True,
    )
    summary = {
        "scores": {
            name: {"scorer": means[0][0]}
            | dict(zip(("base", "v1", "v2"), (mean for _, mean in means), strict=False))
            for name, means in scores.items()
        },
        "sizes_bytes": sizes,
        "swap": {
            "sent": swap.sent,
            "failed": swap.failed,
            "by_version": dict(swap.by_version),
            "others": swap.others,
            "mixed": swap.mixed,
            "seconds_to_swap": swap.seconds_to_swap,
        },
        "seconds": seconds,
    }
    (WORK / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if swap.failed or swap.mixed:
        sys.exit("quickstart: the swap was not clean")


def _score(column: dict[str, Any]) -> tuple[str, float]:
    """The first scorer of the suite and its mean."""
    scorer, value = next(iter(column["scores"].items()))
    return scorer, value["mean"]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; what was made lies under runs/quickstart")
