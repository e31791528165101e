"""How fast, how lean and how good is training, beside TRL's SFTTrainer over PEFT?

Same base, rows, rank, targets, examples a step and threads; user-agent and spelling rows, mixed in
one task, so lengths differ by a factor of five. Every measurement is a process of its own, for its
peak memory; the two sides take turns round by round, and the figures are medians. The first step
of each process is not counted. Tokens are those of the examples, without padding.

    python benchmarks/trainer.py [--base DIR] [--quick] [--gpu]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).resolve().parent
USER_AGENT = (
    "Describe the browser's user agent as JSON with the keys browser, browser_version, os, "
    "os_version, type."
)
SPELLING = "Correct the spelling of the word. Answer with the word alone."
ADAPTER_COUNTS = (1, 2, 4, 8, 16)
LENGTHS = (1024, 2048, 4096, 8192)
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense tensor-core peaks from NVIDIA's data sheets, by part of the device's name."""


@dataclass(frozen=True)
class Load:
    """What a measurement is asked to do."""

    base: str
    tasks: int
    batch_size: int
    steps: int
    """Including the first, which is not counted."""
    rows: str
    """`mixed`, `spelling`, or `distinct`: spelling rows that share no prefix."""
    pack_tokens: int = 512
    rank: int = 8
    learning_rate: float = 2e-3
    max_length: int = 512
    threads: int = 2
    seed: int = 0
    device_seconds: bool = False
    """Also measure the matmul rate."""


def main() -> None:
    """Runs the measurements in turns, prints a table and, last, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE.parent / "bases" / "smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--gpu", action="store_true", help="model FLOP utilisation on a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, load, directory = options.measure
        measured = MEASUREMENTS[name](Load(**json.loads(load)), Path(directory))
        print(json.dumps(measured))
        return
    base = str(options.base.resolve())
    if options.gpu:
        report(gpu(base))
        return
    rounds = 1 if options.quick else options.rounds
    shared = {"base": base, "threads": options.threads}
    one = Load(
        **shared,
        tasks=1,
        batch_size=4 if options.quick else 8,
        steps=2 if options.quick else 4,
        rows="mixed",
    )
    eight = Load(**shared, tasks=8, batch_size=1 if options.quick else 4, steps=2, rows="mixed")
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, side, load in (
            ("trl_1", "trl", one),
            ("ours_1", "ours", Load(**{**asdict(one), "device_seconds": True})),
            ("trl_8", "trl", eight),
            ("ours_8", "ours", eight),
        ):
            found.setdefault(name, []).append(measure(side, load))
    figures = {
        name: statistics.median(entry["tokens_per_s"] for entry in entries)
        for name, entries in found.items()
    }
    memory = {
        name: statistics.median(entry["peak_bytes"] for entry in entries)
        for name, entries in found.items()
    }
    spelling = Load(
        **shared, tasks=1, batch_size=8, steps=3 if options.quick else 16, rows="spelling"
    )
    quality = {side: measure(side, spelling)["held_out_loss"] for side in ("trl", "ours")}
    other_seed = measure("ours", Load(**{**asdict(spelling), "seed": 1}))["held_out_loss"]
    counts = {
        count: measure(
            "ours",
            Load(
                **shared,
                tasks=count,
                batch_size=16 // count,
                steps=2 if options.quick else 4,
                # One adapter's examples share what they begin with, sixteen adapters' do not:
                # with distinct beginnings both compute the same number of tokens.
                rows="distinct",
            ),
        )["seconds_per_token"]
        for count in ((1, 16) if options.quick else ADAPTER_COUNTS)
    }
    lengths = {
        length: measure(
            "length",
            Load(
                **shared,
                tasks=1,
                batch_size=1,
                steps=1,
                rows="mixed",
                pack_tokens=length,
                max_length=length,
            ),
        )["grown_bytes"]
        for length in (LENGTHS[:2] if options.quick else LENGTHS)
    }
    shortest, longest = min(lengths), max(lengths)
    report(
        {
            "tokens_per_s_vs_trl_1": figures["ours_1"] / figures["trl_1"],
            "tokens_per_s_vs_trl_8": figures["ours_8"] / figures["trl_8"],
            "peak_memory_vs_trl": memory["ours_1"] / memory["trl_1"],
            "matmul_share": statistics.median(e["matmul_share"] for e in found["ours_1"]),
            "time_16_adapters_vs_1": counts[16] / counts[1],
            "held_out_loss_vs_trl": quality["ours"] - quality["trl"],
            "held_out_loss_of_another_seed": other_seed - quality["ours"],
            "memory_growth_vs_length_growth": (lengths[longest] / lengths[shortest])
            / (longest / shortest),
            **{f"tokens_per_s_{name}": value for name, value in figures.items()},
            **{f"peak_gb_{name}": value / 1e9 for name, value in memory.items()},
            **{f"held_out_loss_{side}": loss for side, loss in quality.items()},
            **{f"time_{count}_adapters": value / counts[1] for count, value in counts.items()},
            **{f"activations_gb_{length}": grown / 1e9 for length, grown in lengths.items()},
        }
    )


def report(figures: dict[str, float]) -> None:
    """A table, and the same as one line of JSON."""
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def measure(name: str, load: Load) -> dict[str, float]:
    """Runs one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name, json.dumps(asdict(load)), directory],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(load.threads),
                "HF_HUB_OFFLINE": "1",
                "TRL_EXPERIMENTAL_SILENCE": "1",
            },
        )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    shown = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
    print(f"· {name} ({load.tasks} adapters, {load.rows}): {shown}", file=sys.stderr, flush=True)
    return result


# The rows -------------------------------------------------------------------------------------


def conversations(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `messages`; equal arguments give equal rows."""
    where = HERE.parent / "recipes" / "quickstart" / "tasks.py"
    spec = importlib.util.spec_from_file_location("quickstart_tasks", where)
    assert spec is not None
    assert spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    columns = ("browser", "browser_version", "os", "os_version", "type")
    spelling = [_chat(SPELLING, row["wrong"], row["right"]) for row in tasks.misspellings()]
    agents = [
        _chat(
            USER_AGENT,
            row["user_agent"],
            json.dumps({key: row[key] for key in columns}, sort_keys=True),
        )
        for row in itertools.islice(tasks.user_agents(), 4000)
    ]
    chance = random.Random(seed)
    if kind == "spelling":
        return chance.sample(spelling, count)
    if kind == "distinct":
        rows = chance.sample(spelling, count)
        for number, row in zip(chance.sample(range(1000, 10_000), count), rows, strict=True):
            row["messages"][0]["content"] = f"{number}: {SPELLING}"
        return rows
    # As many of one as of the other, alternating: batches of every size are mixed alike.
    pairs = zip(chance.sample(agents, count), chance.sample(spelling, count), strict=True)
    return [row for pair in pairs for row in pair][:count]


def _chat(system: str, user: str, assistant: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


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
    result = {
        "tokens_per_s": tokens / seconds,
        "seconds_per_token": seconds / tokens,
        "peak_bytes": peak,
        "held_out_loss": held_out_loss(load, directory / "run/adapters/task-0"),
    }
    if load.device_seconds:
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


def peak_bytes() -> int:
    """Most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_out_loss(load: Load, adapter: Path) -> float:
    """Cross-entropy of rows that nobody trained on, by transformers and PEFT for both sides."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from manylora_trainer.formats import Message, Rendered
    from manylora_trainer.tokenization import ChatTokenizer

    tokenizer = ChatTokenizer(Path(load.base))
    rows = conversations("spelling", 24, 10_000)
    rendered = [
        Rendered(
            tuple(Message(m["role"], m["content"]) for m in row["messages"][:-1]),
            row["messages"][-1]["content"],
        )
        for row in rows
    ]
    stock = AutoModelForCausalLM.from_pretrained(load.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, str(adapter)).eval()
    summed, count = 0.0, 0
    with torch.no_grad():
        for example in tokenizer.encode(rendered):
            tokens = torch.from_numpy(example.tokens)[None].long()
            labels = tokens.masked_fill(~torch.from_numpy(example.trained)[None], -100)
            learned = int(example.trained.sum())
            summed += model(input_ids=tokens, labels=labels).loss.item() * learned
            count += learned
    return summed / count


# TRL ------------------------------------------------------------------------------------------


def trl(load: Load, directory: Path) -> dict[str, float]:
    """Trains the same tasks one after the other with TRL; only its steps are timed."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(load.threads)
    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        """Wall time of each optimiser step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    tokenizer = AutoTokenizer.from_pretrained(load.base)
    for number in range(load.tasks):
        # The first step of the process warms it up and is not counted, so only one task needs it.
        steps = load.steps if number == 0 else load.steps - 1
        rows = conversations(load.rows, load.batch_size * steps, load.seed + number)
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(load.base, dtype=torch.float32),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(
                [
                    {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
                    for row in rows
                ]
            ),
            peft_config=LoraConfig(
                r=load.rank, lora_alpha=2 * load.rank, target_modules="all-linear"
            ),
            args=SFTConfig(
                output_dir=str(directory / "trl"),
                per_device_train_batch_size=load.batch_size,
                max_steps=steps,
                learning_rate=load.learning_rate,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                max_length=load.max_length,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=load.seed,
            ),
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counted(rows: Any, collate: Any = collate) -> Any:
            batch = collate(rows)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
        if number == 0:
            trainer.save_model(str(directory / "adapter"))
    return {
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "seconds_per_token": sum(seconds[1:]) / sum(tokens[1:]),
        "peak_bytes": peak_bytes(),
        "held_out_loss": held_out_loss(load, directory / "adapter"),
    }


# Length and GPU -------------------------------------------------------------------------------


def length(load: Load, directory: Path) -> dict[str, float]:
    """One example of a given length through six layers of the base's shape: memory it takes."""
    from manylora_trainer import train
    from manylora_trainer.progress import Progress

    base = random_base(Path(load.base), directory / "base", layers=6)
    endless = _chat("Repeat.", "word", "word " * (2 * load.max_length))
    recipe = write_recipe(
        Load(**{**asdict(load), "base": str(base)}),
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


def gpu(base: str) -> dict[str, float]:
    """Model FLOP utilisation of a random base of 1.7 billion weights in bfloat16."""
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU here, so its utilisation is not measured", file=sys.stderr)
        return {}
    name = torch.cuda.get_device_name()
    peak = next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in name), None)
    if peak is None:
        raise SystemExit(f"the peak rate of {name} is not known; add it to PEAK_BF16_FLOPS")
    with tempfile.TemporaryDirectory() as directory:
        shape = {
            "layers": 24,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        }
        made = random_base(Path(base), Path(directory) / "base", **shape)
        return {
            f"mfu_{count}_adapters": measure(
                "utilisation",
                Load(
                    base=str(made),
                    tasks=count,
                    batch_size=256 // count,
                    steps=12,
                    rows="mixed",
                    pack_tokens=16384,
                ),
            )["flops_per_s"]
            / peak
            for count in (1, 8)
        }


def utilisation(load: Load, directory: Path) -> dict[str, float]:
    """Operations a second that training the load achieves."""
    recipe = write_recipe(load, directory)
    import manylora_trainer

    manylora_trainer.train(recipe)
    lines = [json.loads(line) for line in (directory / "run/metrics.jsonl").open()]
    steps = [line for line in lines if line["step"] > 2 and "loss" in line]
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in steps)
    computed = sum(line["computed_tokens"] for line in steps)
    trained = sum(line["trained_tokens"] for line in steps)
    return {"flops_per_s": flops(Path(load.base), computed, trained, load.rank) / seconds}


MEASUREMENTS = {"ours": ours, "trl": trl, "length": length, "utilisation": utilisation}

if __name__ == "__main__":
    main()
