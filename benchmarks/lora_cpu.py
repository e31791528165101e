"""Are our CPU LoRA kernels as fast as no LoRA at all, and how far ahead of what else there is?

Sixteen concurrent requests over one base and four random adapters (and the bare base): vLLM with
our kernels, with its own, with LoRA off, and transformers + PEFT's mixed `adapter_names`.
Each runs in a process of its own, all alike in threads and settings; they take turns, one at work
at a time, so that what else the machine does falls on all of them. Medians of the rounds.

    python benchmarks/lora_cpu.py [--base DIR] [--quick] [--dtype bfloat16] [--only off grouped]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMPARED_TOKENS = 8
CELL_SECONDS = 50.0
"""A measurement that has taken this long over its rounds is left out of the later ones."""


@dataclass(frozen=True)
class Load:
    """What every variant is asked to do."""

    base: Path
    adapters: tuple[Path, ...]
    requests: int
    decode_tokens: int
    prefill_tokens: int
    rank: int
    dtype: Literal["float32", "bfloat16"]

    def prompts(self, length: int) -> list[list[int]]:
        """Prompts of arbitrary tokens, the same in every process."""
        return [
            [100 + (7919 * (row * length + column)) % 20_000 for column in range(length)]
            for row in range(self.requests)
        ]

    def choice(self, mode: str) -> list[int | None]:
        """The adapter of each request, None for the bare base."""
        match mode:
            case "mixed":
                options = [None, *range(len(self.adapters))]
                return [options[row % len(options)] for row in range(self.requests)]
            case "one":
                return [0] * self.requests
            case _:
                return [None] * self.requests


class Variant(Protocol):
    """Something that can serve the load."""

    def generate(
        self, prompts: list[list[int]], adapters: Sequence[int | None], tokens: int
    ) -> list[list[int]]:
        """Exactly `tokens` greedy tokens for each prompt."""
        ...


class Vllm:
    """An in-process vLLM engine."""

    def __init__(self, load: Load, lora: bool) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        slots = len(load.adapters)
        options: dict[str, Any] = (
            {"enable_lora": True, "max_loras": slots, "max_lora_rank": load.rank} if lora else {}
        )
        self.engine = LLM(
            str(load.base),
            dtype=load.dtype,
            max_num_seqs=load.requests,
            max_model_len=2 * load.prefill_tokens,
            enforce_eager=True,
            enable_prefix_caching=False,
            **options,
        )
        self.adapters = [
            LoRARequest(path.name, index + 1, str(path)) for index, path in enumerate(load.adapters)
        ]

    def generate(
        self, prompts: list[list[int]], adapters: Sequence[int | None], tokens: int
    ) -> list[list[int]]:
        """See `Variant`."""
        from vllm import SamplingParams, TokensPrompt

        requests = [None if index is None else self.adapters[index] for index in adapters]
        outputs = self.engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
            lora_request=cast("Any", requests if any(requests) else None),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


class Peft:
    """Transformers' generate with every adapter attached by PEFT."""

    def __init__(self, load: Load) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.names = [path.name for path in load.adapters]
        base = AutoModelForCausalLM.from_pretrained(load.base, dtype=getattr(torch, load.dtype))
        model = PeftModel.from_pretrained(base, str(load.adapters[0]), adapter_name=self.names[0])
        for path in load.adapters[1:]:
            model.load_adapter(str(path), adapter_name=path.name)
        self.model = cast("Any", model.eval())

    def generate(
        self, prompts: list[list[int]], adapters: Sequence[int | None], tokens: int
    ) -> list[list[int]]:
        """See `Variant`."""
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=["__base__" if a is None else self.names[a] for a in adapters],
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return cast("list[list[int]]", output[:, ids.shape[1] :].tolist())


def serve(name: str, load: Load) -> None:
    """A variant's process: does what it is told on stdin, one JSON line for another on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is not an answer
    variant: Variant = Peft(load) if name == "peft" else Vllm(load, lora=name != "off")

    def seconds(length: int, mode: str, tokens: int) -> float:
        prompts, adapters = load.prompts(length), load.choice(mode)
        began = time.perf_counter()
        variant.generate(prompts, adapters, tokens)
        return time.perf_counter() - began

    seconds(16, "mixed" if name != "off" else "bare", 2)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        what, mode = json.loads(line)
        began = time.perf_counter()
        if what == "decode":
            spent = seconds(16, mode, load.decode_tokens + 1) - seconds(16, mode, 1)
            result: Any = load.requests * load.decode_tokens / spent
        elif what == "prefill":
            result = load.requests * load.prefill_tokens / seconds(load.prefill_tokens, mode, 1)
        else:
            result = variant.generate(load.prompts(32), load.choice(mode), COMPARED_TOKENS)
        print(json.dumps([result, time.perf_counter() - began]), file=answers)


@dataclass
class Child:
    """A variant's process, seen from the benchmark."""

    name: str
    process: subprocess.Popen[str]
    spent: dict[tuple[str, str], float] = field(default_factory=dict)
    measured: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def ask(self, what: str, mode: str) -> tuple[Any, float]:
        """A measurement, and the seconds it took in all."""
        assert self.process.stdin is not None
        print(json.dumps([what, mode]), file=self.process.stdin, flush=True)
        result, seconds = self.answer()
        return result, seconds

    def answer(self) -> Any:
        """The process's next answer; ends the benchmark where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; run again with --verbose to see why")
        return json.loads(line)

    def measure(self, what: str, mode: str) -> None:
        """One more round, unless this measurement has had its time."""
        key = (what, mode)
        if self.spent.get(key, 0.0) < CELL_SECONDS:
            rate, seconds = self.ask(what, mode)
            self.measured.setdefault(key, []).append(rate)
            self.spent[key] = self.spent.get(key, 0.0) + seconds

    def rate(self, what: str, mode: str) -> float:
        """Median tokens/s."""
        return statistics.median(self.measured[what, mode])

    def ratio(self, what: str, mode: str, peer: Child, peer_mode: str) -> float:
        """Median over the rounds of this rate over a peer's: a machine's drift hits both alike."""
        pairs = zip(self.measured[what, mode], peer.measured[what, peer_mode], strict=True)
        return statistics.median(own / other for own, other in pairs)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start(name: str, options: argparse.Namespace, directory: Path) -> Child:
    """Starts a variant's process; it is ready when it has answered once."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "MANYLORA_CPU_LORA": "stock" if name == "stock" else "grouped",
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    arguments = [*sys.argv[1:], "--serve", name, "--directory", str(directory)]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
    )
    return Child(name, process)


def write_adapter(directory: Path, tensors: dict[str, tuple[int, ...]], rank: int) -> None:
    """A random adapter of every linear layer, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    generator = torch.Generator().manual_seed(len(str(directory)) + int(directory.name[1:]))
    weights: dict[str, torch.Tensor] = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in ADAPTED:
            out, width = shape
            a = torch.randn(rank, width, generator=generator) / width**0.5
            b = torch.randn(out, rank, generator=generator) * 0.02
            weights[f"base_model.model.{module}.lora_A.weight"] = a
            weights[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(ADAPTED),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, default=Path("bases/smollm2-135m"))
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, choices=[1, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of a quarter the tokens")
    parser.add_argument(
        "--only", nargs="+", choices=list(PLAN), default=list(PLAN), help="leave out the others"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the processes log")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_of(options: argparse.Namespace, directory: Path) -> Load:
    """The load the options ask for, with its adapters in `directory`."""
    return Load(
        base=options.base,
        adapters=tuple(directory / f"a{index}" for index in range(options.adapters)),
        requests=options.requests,
        decode_tokens=16 if options.quick else 64,
        prefill_tokens=64 if options.quick else 256,
        rank=options.rank,
        dtype=options.dtype,
    )


PLAN = {
    "off": ("bare",),
    "grouped": ("mixed", "one", "bare"),
    "stock": ("mixed",),
    "peft": ("mixed",),
}
"""What each variant is measured in, in the order of their turns."""

TITLES = {
    "off": "vLLM, LoRA off",
    "grouped": "vLLM, our kernels",
    "stock": "vLLM, its own kernels",
    "peft": "transformers + PEFT",
}


def main() -> None:
    """Runs the rounds, prints the table and, last, one JSON line."""
    options = parse()
    if options.serve:
        serve(options.serve, load_of(options, options.directory))
        return
    if not (options.base / "config.json").is_file():
        raise SystemExit(f"No base model in {options.base}: manylora base fetch smollm2-135m DIR")
    from manylora_registry.base import identify_base

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        load = load_of(options, directory)
        tensors = dict(identify_base(options.base).tensors)
        for path in load.adapters:
            write_adapter(path, tensors, load.rank)
        children: dict[str, Child] = {}
        for name in options.only:
            print(f"starting {TITLES[name]} ...", file=sys.stderr)
            children[name] = start(name, options, directory)
            children[name].answer()
        tokens = {
            name: child.ask("tokens", "mixed")[0]
            for name, child in children.items()
            if name != "off"
        }
        rounds = 1 if options.quick else options.rounds
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds} ...", file=sys.stderr)
            for name, child in children.items():
                for mode in PLAN[name]:
                    child.measure("decode", mode)
                    child.measure("prefill", mode)
                    last = [child.measured[what, mode][-1] for what in ("decode", "prefill")]
                    print(
                        f"  {TITLES[name]}, {mode}: decode {last[0]:.1f}, prefill {last[1]:.1f}",
                        file=sys.stderr,
                    )
        for child in children.values():
            child.close()
    report(children, tokens, load, options.threads)


def report(
    children: dict[str, Child], tokens: dict[str, list[list[int]]], load: Load, threads: int
) -> None:
    """The table, then the JSON line."""
    print(
        f"{load.requests} requests, {len(load.adapters)} adapters of rank {load.rank} and the bare "
        f"base, {load.dtype}, {threads} threads; tokens/s, median"
    )
    print(f"{'':<24}{'requests':<10}{'decode':>10}{'prefill':>10}{'as PEFT':>10}")
    same = {
        name: sum(mine == theirs for mine, theirs in zip(rows, tokens["peft"], strict=True))
        for name, rows in tokens.items()
        if "peft" in tokens
    }
    result: dict[str, float] = {}
    for name, child in children.items():
        for mode in PLAN[name]:
            decode, prefill = child.rate("decode", mode), child.rate("prefill", mode)
            shown = f"{same[name]}/{load.requests}" if mode == "mixed" and same else ""
            print(f"{TITLES[name]:<24}{mode:<10}{decode:>10.1f}{prefill:>10.1f}{shown:>10}")
            result[f"decode_{name}_{mode}"] = round(decode, 1)
            result[f"prefill_{name}_{mode}"] = round(prefill, 1)
    ratios = {
        f"{what}_mixed_vs_{label}": round(
            children["grouped"].ratio(what, "mixed", children[peer], mode), 3
        )
        for label, peer, mode in (
            ("lora_off", "off", "bare"),
            ("stock", "stock", "mixed"),
            ("peft", "peft", "mixed"),
        )
        for what in ("decode", "prefill")
        if {"grouped", peer} <= set(children)
    }
    agreement = {f"rows_as_peft_{name}": count for name, count in same.items() if name != "peft"}
    print(json.dumps(ratios | result | agreement))


if __name__ == "__main__":
    main()
