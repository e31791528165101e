"""How fast, how lean and how good is training, beside TRL's SFTTrainer over PEFT?

Same base, rows, rank, targets, examples a step and threads; user-agent and spelling rows, mixed in
one task, so lengths differ by a factor of five. Every measurement is a process of its own, for its
peak memory; the sides take turns round by round, and the figures are medians. The first step of
each process is not counted. Tokens are those of the examples, without padding.

    PYTHONPATH=. python benchmarks/trainer.py [--part NAME] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.trainer_load import HERE, Load, chat, conversations, held_out_loss, peak_bytes
from benchmarks.trainer_trl import trl

if TYPE_CHECKING:
    from collections.abc import Mapping

# Before torch is imported: no hub, and no thread before a fork.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
LIBRARIES = ("trl.trainer.sft_trainer", "peft", "manylora_trainer.loop")
FORK = multiprocessing.get_context("fork")
ADAPTER_COUNTS = (1, 2, 4, 8, 16)
LENGTHS = (1024, 2048, 4096, 8192)


def main() -> None:
    """Runs one part, or all, prints a table and, last, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE.parent / "bases" / "smollm2-135m")
    parser.add_argument("--part", choices=PARTS, help="only this; each takes minutes on two cores")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    base = str(options.base.resolve())
    plain = Load(
        base=base,
        threads=options.threads,
        tasks=1,
        batch_size=8,
        steps=3,
        rows="mixed",
        dtype="float32",
    )
    rounds = 1 if options.quick else options.rounds
    figures: dict[str, float] = {}
    for name, part in PARTS.items():
        if options.part in (None, name):
            figures.update(part(plain, rounds, options.quick))
    report(figures)


# The parts ------------------------------------------------------------------------------------


def speed(plain: Load, rounds: int, quick: bool) -> dict[str, float]:
    """Tokens a second and peak memory of one adapter, beside TRL padded and not."""
    one = replace(plain, batch_size=4, steps=2) if quick else plain
    found = in_turns(
        {
            "ours_1": ("ours", replace(one, matmul=True)),
            "trl_1": ("trl", one),
            "ours_1_distinct": ("ours", replace(one, rows="distinct-mixed")),
            "trl_padding_free_1": ("trl", replace(one, padding_free=True)),
        },
        rounds,
    )
    rates = {name: measured["tokens_per_s"] for name, measured in found.items()}
    peaks = {name: measured["peak_bytes"] for name, measured in found.items()}
    return {
        "tokens_per_s_vs_trl_1": rates["ours_1"] / rates["trl_1"],
        "tokens_per_s_vs_trl_padding_free_1": rates["ours_1"] / rates["trl_padding_free_1"],
        "tokens_per_s_vs_trl_1_nothing_shared": rates["ours_1_distinct"] / rates["trl_1"],
        "peak_memory_vs_trl": peaks["ours_1"] / peaks["trl_1"],
        "matmul_share": found["ours_1"]["matmul_share"],
        **{f"tokens_per_s_{name}": rate for name, rate in rates.items()},
        **{f"peak_gb_{name}": peak / 1e9 for name, peak in peaks.items()},
    }


def together(plain: Load, rounds: int, quick: bool) -> dict[str, float]:
    """Tokens a second of eight adapters in one run, beside eight runs of TRL, in both types."""
    eight = replace(plain, tasks=8, batch_size=1 if quick else plain.batch_size, steps=2)
    narrow = replace(eight, dtype="bfloat16")
    found = in_turns(
        {
            "ours_8": ("ours", eight),
            "trl_8": ("trl", eight),
            "ours_8_bfloat16": ("ours", narrow),
            "trl_8_bfloat16": ("trl", narrow),
        },
        rounds,
    )
    rates = {name: measured["tokens_per_s"] for name, measured in found.items()}
    peaks = {name: measured["peak_bytes"] for name, measured in found.items()}
    return {
        "tokens_per_s_vs_trl_8": rates["ours_8"] / rates["trl_8"],
        "tokens_per_s_vs_trl_8_bfloat16": rates["ours_8_bfloat16"] / rates["trl_8_bfloat16"],
        **{f"tokens_per_s_{name}": rate for name, rate in rates.items()},
        **{f"peak_gb_{name}": peak / 1e9 for name, peak in peaks.items()},
    }


def adapters(plain: Load, rounds: int, quick: bool) -> dict[str, float]:
    """Time for a token with more and more adapters, at the same tokens a step.

    One adapter's examples share what they begin with, sixteen adapters' do not: with distinct
    beginnings all compute the same number of tokens.
    """
    counts = (1, 16) if quick else ADAPTER_COUNTS
    found = in_turns(
        {
            str(count): (
                "ours",
                replace(
                    plain,
                    tasks=count,
                    batch_size=64 // count,
                    steps=2 if quick else 3,
                    rows="distinct-spelling",
                ),
            )
            for count in counts
        },
        rounds,
    )
    rates = {int(count): measured["tokens_per_s"] for count, measured in found.items()}
    return {
        "time_16_adapters_vs_1": rates[1] / rates[16],
        **{f"time_{count}_adapters": rates[1] / rate for count, rate in rates.items()},
        **{f"tokens_per_s_{count}_adapters": rate for count, rate in rates.items()},
    }


def length(plain: Load, rounds: int, quick: bool) -> dict[str, float]:  # noqa: ARG001
    """Memory that the activations of one example take, by its length."""
    grown = {
        tokens: measure("activations", replace(plain, pack_tokens=tokens, max_length=tokens))[
            "grown_bytes"
        ]
        for tokens in (LENGTHS[:2] if quick else LENGTHS)
    }
    shortest, longest = min(grown), max(grown)
    return {
        "memory_growth_vs_length_growth": (grown[longest] / grown[shortest]) / (longest / shortest),
        **{f"activations_gb_{tokens}": size / 1e9 for tokens, size in grown.items()},
    }


def quality(plain: Load, rounds: int, quick: bool) -> dict[str, float]:
    """Loss of held-out rows after the same steps over the same rows; the rounds are seeds."""
    load = replace(plain, rows="spelling", steps=3 if quick else 12, held_out=True)
    found: dict[str, list[float]] = {}
    for seed in range(rounds):
        for side in ("trl", "ours"):
            loss = measure(side, replace(load, seed=seed))["held_out_loss"]
            found.setdefault(side, []).append(loss)
    return {
        "held_out_loss_vs_trl": statistics.mean(found["ours"]) - statistics.mean(found["trl"]),
        "held_out_loss_spread_of_seeds": max(
            max(losses) - min(losses) for losses in found.values()
        ),
        **{f"held_out_loss_{side}": statistics.mean(losses) for side, losses in found.items()},
    }


def precision(plain: Load, rounds: int, quick: bool) -> dict[str, float]:
    """The base in bfloat16 beside float32 and TRL: tokens a second, peak memory, held-out loss."""
    fast = replace(plain, **({"batch_size": 4, "steps": 2} if quick else {}))
    good = replace(plain, rows="spelling", steps=3 if quick else 12, held_out=True)
    kinds = ("float32", "bfloat16")
    narrow = replace(fast, dtype="bfloat16")
    found = in_turns(
        {
            **{kind: ("ours", replace(fast, dtype=kind)) for kind in kinds},
            "trl_bfloat16": ("trl", narrow),
            "trl_padding_free_bfloat16": ("trl", replace(narrow, padding_free=True)),
        },
        rounds,
    )
    rates = {name: measured["tokens_per_s"] for name, measured in found.items()}
    losses = {
        kind: statistics.mean(
            measure("ours", replace(good, dtype=kind, seed=seed))["held_out_loss"]
            for seed in range(rounds)
        )
        for kind in kinds
    }
    ratios = {
        "tokens_per_s": rates["bfloat16"] / rates["float32"],
        "peak_memory": found["bfloat16"]["peak_bytes"] / found["float32"]["peak_bytes"],
    }
    return {
        **{f"{name}_bfloat16_vs_float32": ratio for name, ratio in ratios.items()},
        "tokens_per_s_vs_trl_1_bfloat16": rates["bfloat16"] / rates["trl_bfloat16"],
        "tokens_per_s_vs_trl_padding_free_1_bfloat16": rates["bfloat16"]
        / rates["trl_padding_free_bfloat16"],
        "held_out_loss_bfloat16_vs_float32": losses["bfloat16"] - losses["float32"],
        **{f"tokens_per_s_{name}": rate for name, rate in rates.items()},
        **{f"peak_gb_{kind}": found[kind]["peak_bytes"] / 1e9 for kind in kinds},
        **{f"held_out_loss_{kind}": loss for kind, loss in losses.items()},
    }


PARTS = {
    "speed": speed,
    "together": together,
    "adapters": adapters,
    "length": length,
    "quality": quality,
    "precision": precision,
}


def in_turns(asked: Mapping[str, tuple[str, Load]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of measurements that take turns."""
    found = [{name: measure(*what) for name, what in asked.items()} for _ in range(rounds)]
    return {
        name: {key: statistics.median(each[name][key] for each in found) for key in found[0][name]}
        for name in asked
    }


def report(figures: dict[str, float]) -> None:
    """A table, and the same as one line of JSON."""
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def measure(name: str, load: Load) -> dict[str, float]:
    """Runs one measurement in a process of its own, forked once the libraries are imported.

    So no measurement waits for imports, and both sides' peaks count the same libraries.
    """
    for library in LIBRARIES:
        importlib.import_module(library)
    results, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_measured, args=(name, load, told))
    process.start()
    told.close()
    try:
        result: dict[str, float] = results.recv()
    except EOFError:
        raise SystemExit(f"the measurement {name} failed: {load}") from None
    finally:
        process.join()
    shown = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
    print(f"· {name} ({load.tasks} adapters, {load.rows}): {shown}", file=sys.stderr, flush=True)
    return result


def _measured(name: str, load: Load, told: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        told.send(MEASUREMENTS[name](load, Path(directory)))


# Ours -----------------------------------------------------------------------------------------


def ours(load: Load, directory: Path) -> dict[str, float]:
    """Trains with manylora and reads the run's own metrics."""
    recipe = write_recipe(load, directory)
    import manylora_trainer

    manylora_trainer.train(recipe)
    peak = peak_bytes()
    lines = [json.loads(line) for line in (directory / "run/metrics.jsonl").open()]
    steps = [line for line in lines if line["step"] > 1 and "loss" in line]
    tokens = sum(line["tokens"] for line in steps)
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in steps)
    result = {"tokens_per_s": tokens / seconds, "peak_bytes": peak}
    if load.held_out:
        result |= held_out_loss(load, directory / "run/adapters/task-0")
    if load.matmul:
        computed = sum(line["computed_tokens"] for line in steps)
        trained = sum(line["trained_tokens"] for line in steps)
        work = flops(Path(load.base), computed, trained, load.rank)
        result["matmul_share"] = work / seconds / matmul_rate(Path(load.base), load.threads)
    return result


def write_recipe(
    load: Load, directory: Path, rows: list[dict[str, Any]] | None = None, **training: Any
) -> Path:
    """A recipe of as many tasks as asked for, over different rows of the same kind."""
    tasks: list[dict[str, Any]] = []
    for number in range(load.tasks):
        kept = rows or conversations(load.rows, load.batch_size * load.steps, load.seed + number)
        path = directory / f"rows-{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        tasks.append(
            {
                "name": f"task-{number}",
                "source": {"kind": "jsonl", "path": str(path)},
                "format": {"kind": "chat"},
                "split": {"validation": 0.0, "held_out": 0.0},
                "lora": {"rank": load.rank, "alpha": 2 * load.rank},
                "optimizer": {"learning_rate": load.learning_rate, "schedule": "constant"},
                "steps": load.steps,
                "batch_size": load.batch_size,
                "max_length": load.max_length,
                "overlong": "truncate",
            }
        )
    recipe = {
        "base": load.base,
        "seed": load.seed,
        "run_directory": str(directory / "run"),
        "training": {
            "pack_tokens": load.pack_tokens,
            "threads": load.threads,
            "checkpoint_every": 10**6,
            "dtype": load.dtype,
            **training,
        },
        "tasks": tasks,
    }
    path = directory / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def flops(base: Path, computed: int, trained: int, rank: int) -> float:
    """Floating-point operations of LoRA training.

    The frozen linears forward and to their input, the adapters forward and twice back, the head
    forward and back on the trained tokens only. Attention and what is not a product are left out.
    """
    from manylora_registry.base import identify_base
    from manylora_trainer.targets import linears_of

    shapes = linears_of(identify_base(base))
    config = json.loads((base / "config.json").read_text())
    frozen = sum(out * into for out, into in shapes.values())
    adapters = sum(rank * (out + into) for out, into in shapes.values())
    head = config["vocab_size"] * config["hidden_size"]
    return computed * (4 * frozen + 6 * adapters) + trained * 4 * head


def matmul_rate(base: Path, threads: int) -> float:
    """Operations a second of products in the shapes of the base's linears, 512 rows each."""
    import torch

    from manylora_registry.base import identify_base
    from manylora_trainer.targets import linears_of

    torch.set_num_threads(threads)
    shapes = list(linears_of(identify_base(base)).values())[:28]
    pairs = [(torch.randn(512, into), torch.randn(out, into)) for out, into in shapes]
    work = sum(2 * 512 * out * into for out, into in shapes)
    rates: list[float] = []
    for _ in range(7):
        started = time.perf_counter()
        for rows, weight in pairs:
            torch.nn.functional.linear(rows, weight)
        rates.append(work / (time.perf_counter() - started))
    return statistics.median(rates)


# Length ---------------------------------------------------------------------------------------


def activations(load: Load, directory: Path) -> dict[str, float]:
    """One example of a given length through six layers of the base's shape: memory it takes."""
    from manylora_trainer import train
    from manylora_trainer.progress import Progress

    base = random_base(Path(load.base), directory / "base", layers=6)
    endless = chat("Repeat.", "word", "word " * (2 * load.max_length))
    recipe = write_recipe(
        replace(load, base=str(base), batch_size=1, steps=1),
        directory,
        rows=[endless],
        gradient_checkpointing="off",
    )
    before = 0

    class Mark(Progress):
        """Notes what the process held when the first step began."""

        def start(self, steps: Mapping[str, int], done: int) -> None:
            nonlocal before
            super().start(steps, done)
            before = peak_bytes()

    train(recipe, progress=Mark())
    return {"grown_bytes": peak_bytes() - before}


def random_base(like: Path, directory: Path, **changes: int) -> Path:
    """A base of the same kind with random weights and the tokenizer of `like`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(like)
    config.num_hidden_layers = changes.pop("layers")
    config.max_position_embeddings = max(LENGTHS)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(like).save_pretrained(directory)
    return directory


MEASUREMENTS = {"ours": ours, "trl": trl, "activations": activations}

if __name__ == "__main__":
    main()
