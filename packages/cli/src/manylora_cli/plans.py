"""How a dry run is shown: a table of the tasks, what the run needs, and one example of each."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING

from manylora_cli.output import print_table

if TYPE_CHECKING:
    from manylora_trainer.dry_run import Plan, Segment, TaskPlan

MARKS = ("⟦", "⟧")
"""Around text that trains, where there are no colours."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that command a terminal; all but tab and line end."""


def show_plan(plan: "Plan") -> None:
    """Prints a plan to standard output, with colours on a terminal only."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    print_table(
        ("", *(entry.task for entry in plan.tasks)),
        [(title, *cells) for title, cells in _table(plan)],
    )
    console.print(_memory(plan), highlight=False)
    console.print(_time(plan), highlight=False)
    # A terminal may have none either, as `TERM=dumb`.
    in_colour = console.is_terminal and console.color_system is not None
    how = "highlighted" if in_colour else f"between {MARKS[0]} and {MARKS[1]}"
    for entry in plan.tasks:
        console.print(Text(f"\n{entry.task}: one example; what it learns is {how}"))
        console.print(Text.assemble(*(_shown(segment, in_colour) for segment in entry.example)))


def _table(plan: "Plan") -> list[tuple[str, list[str]]]:
    def row(title: str, *names: str) -> tuple[str, list[str]]:
        return title, [" / ".join(f"{getattr(t, name):,}" for name in names) for t in plan.tasks]

    return [
        row("rows sampled", "rows_sampled"),
        row("malformed", "rows_malformed"),
        row("train / validation / held out", "train", "validation", "held_out"),
        row(
            "tokens: p50 / p90 / p99 / max", *(f"tokens_{n}" for n in ("p50", "p90", "p99", "max"))
        ),
        row("overlong: dropped / truncated", "overlong_dropped", "overlong_truncated"),
        ("share dropped", [f"{entry.dropped_share:.1%}" for entry in plan.tasks]),
        ("share of tokens that train", [f"{entry.trained_share:.0%}" for entry in plan.tasks]),
        row("trainable parameters", "trainable_parameters"),
        ("steps", [_steps(entry) for entry in plan.tasks]),
        row("a step: examples / tokens", "examples_per_step", "tokens_per_step"),
    ]


def _steps(entry: "TaskPlan") -> str:
    if entry.steps is None:
        return f"{entry.epochs:g} epochs, rows not counted"
    return f"{entry.steps:,}" + (f" ({entry.epochs:g} epochs)" if entry.epochs else "")


def _memory(plan: "Plan") -> str:
    memory = plan.memory
    parts = {
        "base": memory.base_weights,
        "adapters with gradients": memory.adapters,
        "optimisers": memory.optimizers,
        f"activations of {memory.pack_tokens:,} tokens"
        + (", recomputed" if memory.recomputed else ""): memory.activations,
        "logits": memory.logits,
    }
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"memory: about {_bytes(memory.total)} ({listed}), and what the libraries take"


def _time(plan: "Plan") -> str:
    if plan.time is None:
        return "time: not known, as the rows that make the epochs are not counted in a dry run"
    took = timedelta(seconds=max(1, round(plan.time.seconds)))
    return (
        f"time: {took} of matrix products for {plan.time.tokens:,} tokens, at the "
        f"{plan.time.flops_per_s / 1e9:,.0f} GFLOP/s one just reached here; a prefix that examples "
        "share is computed once, which takes less, and all else a step does comes on top"
    )


def _bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _shown(segment: "Segment", in_colour: bool) -> tuple[str, str]:
    # A terminal would obey them: a row could clear the screen, or hide what else it holds.
    text = CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", segment.text)
    if not segment.trained:
        return text, ""
    return (text, "bold green reverse") if in_colour else (text.join(MARKS), "")
