"""How much of a GPU does training use, and what do more adapters and longer examples cost?

A random base of 1.7 billion weights in bfloat16 (24 layers, 2,048 wide, the tokenizer of `--base`),
rank 8 on all linear layers, user-agent and spelling rows as in `trainer.py`. Peers in the same run:
a plain loop over transformers and PEFT, and TRL's SFTTrainer. Times are medians over whole steps,
from the end of one to the end of the next; the first two of each measurement are not counted.

    PYTHONPATH=. python benchmarks/trainer_gpu.py [--base DIR] [--only NAME,...] [--steps N]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.trainer import flops, write_recipe
from benchmarks.trainer_load import Load, chat, conversations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HERE = Path(__file__).resolve().parent
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense tensor-core peaks from NVIDIA's data sheets, by part of the device's name."""
EXAMPLES = 384
"""In a step, over all adapters."""
ROWS = 2 * EXAMPLES
"""Different ones; there are only 839 user agents, so more steps take them again."""
MICRO_BATCH = 64
"""Examples that a peer computes at once; its logits and padding take most of its memory."""
PACK_TOKENS = 26624
"""Of which what is kept for the backward fits a card of 80 GB."""
COUNTS = (1, 2, 4, 8, 16)
LENGTHS = (1024, 2048, 4096, 8192)
RANK = 8
UNCOUNTED = 2

Measured = dict[str, float]


def main() -> None:
    """Runs the measurements, prints a table and, last, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE.parent / "bases" / "smollm2-135m")
    parser.add_argument("--only", default="", help="names of measurements, with commas between")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU here, so nothing is measured", file=sys.stderr)
        print("{}")
        return
    wanted = [name for name in options.only.split(",") if name]
    figures: Measured = {}
    with tempfile.TemporaryDirectory() as directory:
        base = random_base(options.base.resolve(), Path(directory) / "base")
        for name, measurement in measurements(base, options.steps):
            if wanted and not any(name.startswith(prefix) for prefix in wanted):
                continue
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory(dir=directory) as scratch:
                    measured = measurement(Path(scratch))
            except Exception as error:
                # Time on a GPU is dear: the other figures are kept.
                print(f"· {name} failed: {error!r}", file=sys.stderr, flush=True)
                continue
            measured["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            shown = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            took = time.perf_counter() - started
            print(f"· {name}: {shown} ({took:.0f} s)", file=sys.stderr, flush=True)
            figures |= {f"{name}_{key}": value for key, value in measured.items()}
    report(figures, torch.cuda.get_device_name())


def measurements(base: Path, steps: int) -> Iterator[tuple[str, Callable[[Path], Measured]]]:
    """What is measured, by name."""

    def ours_with(count: int = 1, **changes: Any) -> Callable[[Path], Measured]:
        return lambda scratch: ours(base, scratch, count, steps, **changes)

    yield "matmul", matmul
    yield "ours_1", ours_with(1)
    yield "ours_8", ours_with(8)
    yield "ours_1_recomputing", ours_with(1, gradient_checkpointing="on")
    yield "ours_8_recomputing", ours_with(8, gradient_checkpointing="on")
    yield "ours_1_nf4", ours_with(1, quantization="nf4")
    # What one TRL run of eight would take; ours trains all eight at once.
    yield "trl_1", lambda scratch: trl(base, scratch, EXAMPLES, steps)
    yield "trl_of_8", lambda scratch: trl(base, scratch, EXAMPLES // 8, steps)
    yield "peft_1", lambda _: peft_loop(base, EXAMPLES, steps)
    for count in COUNTS:
        # Rows that share no prefix: sharing works within an adapter, so it would favour one.
        yield f"distinct_{count}", ours_with(count, rows="distinct-mixed")
    for length in LENGTHS:
        yield f"length_{length}", ours_with(1, length=length)


def report(figures: Measured, device: str) -> None:
    """A table, and the same as one line of JSON."""
    peak = next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in device), None)
    if peak is None:
        raise SystemExit(f"the peak rate of {device} is not known; add it to PEAK_BF16_FLOPS")
    found: Measured = {}
    for name, value in figures.items():
        of, _, what = name.rpartition("_flops_")
        if what == "per_s":
            found[f"{of}_mfu"] = value / peak
        else:
            found[name] = value
    for ratio, above, below in (
        ("tokens_per_s_vs_trl_1", "ours_1", "trl_1"),
        ("tokens_per_s_vs_trl_8", "ours_8", "trl_of_8"),
        ("tokens_per_s_vs_peft_1", "ours_1", "peft_1"),
        ("tokens_per_s_16_vs_1", "distinct_16", "distinct_1"),
    ):
        top, bottom = f"{above}_tokens_per_s", f"{below}_tokens_per_s"
        if top in found and bottom in found:
            found[ratio] = found[top] / found[bottom]
    for name, value in found.items():
        print(f"{name:34} {value:12.4g}")
    print(json.dumps({"device": device, **{n: float(f"{v:.4g}") for n, v in found.items()}}))


def random_base(like: Path, directory: Path, **changes: Any) -> Path:
    """A base with random weights and the tokenizer of `like`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(like)
    shape = {
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "max_position_embeddings": max(LENGTHS),
        **changes,
    }
    for name, value in shape.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(like).save_pretrained(directory)
    return directory


def matmul(_scratch: Path) -> Measured:
    """Operations a second of one large product: what this card, as it is, can do at best."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.matmul(left, right)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"flops_per_s": 2 * 8192**3 / statistics.median(times[2:])}


def ours(
    base: Path,
    scratch: Path,
    count: int,
    steps: int,
    *,
    rows: str = "mixed",
    length: int | None = None,
    **training: Any,
) -> Measured:
    """Trains `count` adapters together with manylora."""
    import manylora_trainer
    from manylora_trainer.progress import Progress

    ends: list[float] = []

    class Clock(Progress):
        """Notes when each step has ended."""

        def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
            super().step(step, losses, tokens_per_s)
            ends.append(time.perf_counter())

    load = Load(
        base=str(base),
        tasks=count,
        batch_size=EXAMPLES // count if length is None else PACK_TOKENS // length,
        steps=steps,
        rows=rows,
        pack_tokens=PACK_TOKENS,
        rank=RANK,
        max_length=length or 512,
        threads=os.cpu_count() or 1,
    )
    if length is None:
        examples = conversations(rows, ROWS, 0)
    else:
        # Each begins differently, so none shares anything.
        examples = [
            chat(f"{number}.", "word " * (length // 4), "word " * 2 * length)
            for number in range(load.batch_size * steps)
        ]
    settings = {"gradient_checkpointing": "off", **training}
    manylora_trainer.train(write_recipe(load, scratch, examples, **settings), progress=Clock())
    lines = [json.loads(line) for line in (scratch / "run/metrics.jsonl").open()]
    per_step = {
        what: [
            sum(line[what] for line in lines if line["step"] == step and "loss" in line)
            for step in range(1, steps + 1)
        ]
        for what in ("tokens", "computed_tokens", "trained_tokens")
    }
    seconds = [after - before for before, after in pairwise(ends)]
    counted = range(UNCOUNTED, steps)
    work = [
        flops(base, per_step["computed_tokens"][n], per_step["trained_tokens"][n], RANK)
        for n in counted
    ]
    rates = [done / seconds[n - 1] for n, done in zip(counted, work, strict=True)]
    return {
        "tokens_per_s": statistics.median(per_step["tokens"][n] / seconds[n - 1] for n in counted),
        "flops_per_s": statistics.median(rates),
        "step_s": statistics.median(seconds[n - 1] for n in counted),
        "computed_share": sum(per_step["computed_tokens"]) / sum(per_step["tokens"]),
    }


def trl(base: Path, scratch: Path, examples: int, steps: int) -> Measured:
    """One adapter with TRL's SFTTrainer, padded, as it comes."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        """Notes when each step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    micro = min(MICRO_BATCH, examples)
    rows = conversations("mixed", ROWS, 0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(
            [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=str(scratch / "trl"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=examples // micro,
            max_steps=steps,
            gradient_checkpointing=False,
            max_length=512,
            bf16=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counted(batch: Any) -> Any:
        made = collate(batch)
        tokens.append(int(made["attention_mask"].sum()))
        return made

    trainer.data_collator = counted
    trainer.train()
    return _peer_figures(ends, tokens, examples // micro, steps)


def peft_loop(base: Path, examples: int, steps: int) -> Measured:
    """One adapter with transformers and PEFT in a loop of twenty lines, padded."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from manylora_trainer.formats import Message, Rendered
    from manylora_trainer.tokenization import ChatTokenizer

    rendered = [
        Rendered(
            tuple(Message(m["role"], m["content"]) for m in row["messages"][:-1]),
            row["messages"][-1]["content"],
        )
        for row in conversations("mixed", ROWS, 0)
    ]
    encoded = ChatTokenizer(base).encode(rendered)
    stock: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    stock = stock.to("cuda")
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(stock, adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ends: list[float] = []
    tokens: list[int] = []
    for step in range(steps):
        first = step * examples % ROWS
        batch = encoded[first : first + examples]
        for at in range(0, examples, MICRO_BATCH):
            some = batch[at : at + MICRO_BATCH]
            longest = max(len(example) for example in some)
            ids, labels = (torch.full((len(some), longest), fill) for fill in (0, -100))
            for row, example in enumerate(some):
                ids[row, : len(example)] = torch.from_numpy(example.tokens)
                own = torch.from_numpy(example.tokens).long()
                kept = torch.from_numpy(example.trained)
                labels[row, : len(example)] = own.masked_fill(~kept, -100)
            lengths = torch.tensor([len(example) for example in some])
            mask = torch.arange(longest)[None] < lengths[:, None]
            tokens.append(int(lengths.sum()))
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(
                    input_ids=ids.cuda(), attention_mask=mask.cuda(), labels=labels.cuda()
                ).loss
            (loss * MICRO_BATCH / examples).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return _peer_figures(ends, tokens, examples // MICRO_BATCH, steps)


def _peer_figures(ends: list[float], tokens: list[int], micro: int, steps: int) -> Measured:
    seconds = [after - before for before, after in pairwise(ends)]
    of_step = [sum(tokens[n * micro : (n + 1) * micro]) for n in range(steps)]
    counted = range(UNCOUNTED, steps)
    return {
        "tokens_per_s": statistics.median(of_step[n] / seconds[n - 1] for n in counted),
        "step_s": statistics.median(seconds[n - 1] for n in counted),
    }


if __name__ == "__main__":
    main()
