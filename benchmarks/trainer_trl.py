"""The peer of `trainer.py`: TRL's SFTTrainer over PEFT."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from benchmarks.trainer_load import Load, conversations, held_out_loss, peak_bytes

if TYPE_CHECKING:
    from pathlib import Path


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
                padding_free=load.padding_free,
                # Not to be given together; no row is that long.
                max_length=None if load.padding_free else load.max_length,
                bf16=load.dtype == "bfloat16",
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
            real = batch.get("attention_mask")
            tokens.append(batch["input_ids"].numel() if real is None else int(real.sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
        if number == 0 and load.held_out:
            trainer.save_model(str(directory / "adapter"))
    return {
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "peak_bytes": peak_bytes(),
        **(held_out_loss(load, directory / "adapter") if load.held_out else {}),
    }
