"""The loop in two processes, without what starts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

import manylora_trainer
from manylora_trainer.saved_runs import read_run

ONE_WORKER = """
import sys
from datetime import timedelta
from pathlib import Path
from torch import distributed
from manylora_trainer.interruption import Signals
from manylora_trainer.loop import nobody, train_run
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import load_recipe
from manylora_trainer.workers import ProcessGroup

rank, recipe, run, store = int(sys.argv[1]), *map(Path, sys.argv[2:])
recipe = load_recipe(recipe)
distributed.init_process_group(
    "gloo", init_method=store.as_uri(), rank=rank, world_size=2, timeout=timedelta(minutes=2)
)
with Signals() as interruption, Progress() as watch:
    train_run(
        recipe, run, resume=rank > 0, watch=watch, how_to_resume="that", judge=nobody,
        interruption=interruption, workers=ProcessGroup(sharded=recipe.workers.sharding == "fsdp"),
    )
"""


def trained_by_two(recipe: Path, run: Path) -> list[str]:
    """Trains with two workers; what each of them says."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_WORKER, str(rank), recipe, run, run.with_name("store")],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    return [worker.communicate()[1] for worker in workers]


ROWS_THAT_ONE_WORKER_CANNOT_READ = """
from torch import distributed

def rows():
    for number in range(200):
        broken = number == 60 and distributed.is_initialized() and distributed.get_rank() == 1
        yield {"wrong": f"word{number}"} | ({} if broken else {"right": str(number)})
"""


def test_a_row_that_fails_for_one_worker_alone_keeps_what_all_have_trained(
    make_task, write_recipe, tmp_path
):
    (tmp_path / "rows.py").write_text(ROWS_THAT_ONE_WORKER_CANNOT_READ)
    source = {"kind": "python", "file": str(tmp_path / "rows.py"), "function": "rows"}
    split = {"validation": 0.1, "held_out": 0.1, "scan_rows": 20}
    task = make_task("one", source=source, split=split, shuffle_buffer=8, steps=20)
    recipe = write_recipe(task, checkpoint_every=10_000)
    run = tmp_path / "run"
    for said in trained_by_two(recipe, run):
        assert re.search(r"RowError: .*row 61, field 'right'", said)
    (step,) = (run / "checkpoints").iterdir()
    assert step.name > "step-00000005"
    manylora_trainer.train(recipe, run, resume=True)
    assert read_run(run).state == "finished"


def test_workers_that_divide_the_base_may_hold_adapters_of_different_layers(
    make_task, write_recipe, tmp_path
):
    # A pack of 128 tokens is one example, so that the two workers hold one adapter each.
    low, high = (
        make_task(name, lora={"rank": 4, "target_modules": [module]}, batch_size=1, steps=3)
        for name, module in (("low", "layers.0.mlp.up_proj"), ("high", "layers.1.mlp.up_proj"))
    )
    recipe = write_recipe(low, high)
    manylora_trainer.train(recipe, tmp_path / "alone")
    settings = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**settings, "workers": {"count": 2, "sharding": "fsdp"}}))
    trained_by_two(recipe, tmp_path / "divided")
    for name in ("low", "high"):
        weights = Path("adapters") / name / "adapter_model.safetensors"
        ours, theirs = (load_file(tmp_path / run / weights) for run in ("divided", "alone"))
        assert ours == {key: pytest.approx(value, abs=1e-5) for key, value in theirs.items()}
