"""What `trainer.py` asks of either side: the rows, and how what was learned is judged."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
USER_AGENT = (
    "Describe the browser's user agent as JSON with the keys browser, browser_version, os, "
    "os_version, type."
)
SPELLING = "Correct the spelling of the word. Answer with the word alone."
HELD_OUT_ROWS = 64


@dataclass(frozen=True)
class Load:
    """What a measurement is asked to do."""

    base: str
    tasks: int
    batch_size: int
    steps: int
    """Including the first, which is not counted."""
    rows: str
    """`mixed`, `spelling`, or either with `distinct-` before it: no two rows begin alike."""
    pack_tokens: int | None = None
    """None: as many as suit the machine."""
    rank: int = 8
    learning_rate: float = 2e-3
    max_length: int = 512
    threads: int = 2
    seed: int = 0
    dtype: str = "auto"
    """Of our base; TRL's is float32 under autocast to this, as it is by default on a GPU."""
    padding_free: bool = False
    """TRL's option of that name."""
    matmul: bool = False
    """Also measure the rate of plain products."""
    held_out: bool = False
    """Also measure the loss of rows nobody trained on."""


def conversations(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of `messages`; equal arguments give equal rows."""
    where = HERE.parent / "recipes" / "quickstart" / "tasks.py"
    spec = importlib.util.spec_from_file_location("quickstart_tasks", where)
    assert spec is not None
    assert spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    columns = ("browser", "browser_version", "os", "os_version", "type")
    spelling = [chat(SPELLING, row["wrong"], row["right"]) for row in tasks.misspellings()]
    chance = random.Random(seed)
    if kind.endswith("spelling"):
        rows = chance.sample(spelling, count)
    else:
        agents = [
            chat(
                USER_AGENT,
                row["user_agent"],
                json.dumps({key: row[key] for key in columns}, sort_keys=True),
            )
            for row in itertools.islice(tasks.user_agents(), 4000)
        ]
        # As many of one as of the other, alternating: batches of every size are mixed alike.
        half = -(-count // 2)
        pairs = zip(chance.sample(agents, half), chance.sample(spelling, half), strict=True)
        rows = [row for pair in pairs for row in pair][:count]
    if kind.startswith("distinct-"):
        numbers = chance.sample(range(1000, 10_000), count)
        for number, row in zip(numbers, rows, strict=True):
            row["messages"][0]["content"] = f"{number}: {row['messages'][0]['content']}"
    return rows


def chat(system: str, user: str, assistant: str) -> dict[str, Any]:
    """A row of the column `messages`."""
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    }


def peak_bytes() -> int:
    """Most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_out_loss(load: Load, adapter: Path) -> dict[str, float]:
    """Cross-entropy of rows that nobody trained on, by transformers and PEFT for both sides."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from manylora_trainer.formats import Message, Rendered
    from manylora_trainer.tokenization import ChatTokenizer

    tokenizer = ChatTokenizer(Path(load.base))
    rows = conversations("spelling", HELD_OUT_ROWS, 10_000)
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
    return {"held_out_loss": summed / count}
