"""A dry run tells what would train, what it needs, and shows an example; it writes nothing."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import manylora_trainer
from manylora_cli.train import train
from manylora_trainer import memory
from manylora_trainer.base_model import BaseModel
from manylora_trainer.dataset import load_task
from manylora_trainer.dry_run import plan
from manylora_trainer.errors import NoExamplesError, RowError, UnfitTaskError
from manylora_trainer.estimates import MemoryEstimate
from manylora_trainer.recipe import load_recipe
from manylora_trainer.tokenization import ChatTokenizer

app = typer.Typer()
app.command()(train)

PARTIAL = {"rank": 2, "alpha": 6, "target_modules": ["q_proj", "mlp.up_proj"]}


def dry_run(recipe, *arguments):
    result = CliRunner().invoke(app, [str(recipe), "--dry-run", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(make_task, write_recipe):
    rows = [{"wrong": f"w{i}", "right": "x" * (200 if i % 4 == 3 else 9)} for i in range(80)]
    talk = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}
    talks = [{"messages": [*talk, *talk[:1], {**talk[1], "content": f"two{i}"}]} for i in range(9)]
    return write_recipe(
        make_task("first", rows=rows, batch_size=None, batch_tokens=500),
        make_task(
            "second",
            rows=talks,
            lora=PARTIAL,
            steps=None,
            epochs=2,
            format={"kind": "chat", "train": "all"},
            split={"validation": 0, "held_out": 0},
        ),
    )


def test_a_plan_says_what_the_run_will_do(recipe, tmp_path, tiny_base):
    planned = json.loads(dry_run(recipe, "--json"))
    assert not (tmp_path / "runs").exists()
    first, second = planned["tasks"]
    assert (first["rows_sampled"], first["steps"]) == (80, 6)
    loaded = load_recipe(recipe)
    data = load_task(loaded.tasks[0], ChatTokenizer(tiny_base), 7)
    assert first["train"] == data.train_rows
    assert first["validation"] + first["held_out"] == 80 - data.train_rows
    assert first["overlong_dropped"] > 10
    assert first["dropped_share"] == pytest.approx(
        first["overlong_dropped"] / first["train"], abs=1e-4
    )
    assert first["tokens_p50"] < 200 < first["tokens_p90"] <= first["tokens_max"]
    assert second["trainable_parameters"] == 2 * 2 * (32 + 32 + 32 + 48)
    assert second["steps"] == 5  # Two epochs of nine examples, four a step.
    assert 0 < planned["time"]["seconds"] < 60

    result = manylora_trainer.train(recipe, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]
    assert told["second"]["steps"] == 5
    tokens = sum(task.tokens for task in result.tasks.values())
    assert planned["time"]["tokens"] == pytest.approx(tokens, rel=0.15)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_a_function_of_rows_prints_is_no_part_of_the_result(
    make_task, write_recipe, tmp_path, dry
):
    rows = "def rows():\n    print('reading')\n" + "".join(
        f"    yield {{'wrong': 'w{i}', 'right': 'r{i}'}}\n" for i in range(40)
    )
    (tmp_path / "rows.py").write_text(rows)
    source = {"kind": "python", "file": "rows.py", "function": "rows"}
    recipe = write_recipe(make_task("first", source=source, steps=1))

    ended = CliRunner().invoke(app, [str(recipe), "--json", *dry])

    assert ended.exit_code == 0, ended.output
    assert "first" in json.dumps(json.loads(ended.stdout))
    assert "reading" in ended.stderr


def test_an_example_shows_what_trains(recipe):
    planned = json.loads(dry_run(recipe, "--json"))
    segments = planned["tasks"][1]["example"]
    assert [part["trained"] for part in segments] == [False, True, False, True]
    assert [part["text"] for part in segments if part["trained"]] == [
        "one<|im_end|>",
        "two0<|im_end|>",
    ]
    shown = dry_run(recipe)
    assert "⟦one<|im_end|>⟧" in shown
    assert shown.splitlines()[0] == "\tfirst\tsecond", "as all tables in a pipe"
    assert "\x1b[" not in shown


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [("dumb", "\u27e6a\\x1b[2Jb\\x07\\x9bc<|im_end|>\u27e7"), ("xterm", "\x1b[1;7;32ma\\x1b[2Jb")],
)
def test_a_terminal_obeys_no_row_and_shows_what_trains(
    make_task, write_recipe, monkeypatch, terminal, shown
):
    # As rich tells a terminal by.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", terminal)
    rows = [{"wrong": "[red]w", "right": "a\x1b[2Jb\a\x9bc"}] * 9
    found = dry_run(
        write_recipe(make_task("task", rows=rows, split={"validation": 0, "held_out": 0}))
    )
    assert shown in found
    assert "Fix: [red]w<|im_end|>" in found


def test_weights_are_reckoned_as_they_are(recipe, tiny_base):
    memory = plan(load_recipe(recipe)).memory
    base = BaseModel(tiny_base, torch.float32, torch.device("cpu"))
    assert memory.base_weights == sum(p.numel() * 4 for p in base.model.parameters())
    assert memory.optimizers > 0
    assert memory.adapters == memory.optimizers / 2 * 3  # Weights, a sound copy, gradients.
    # Of as many predictions as are computed at one time, over a vocabulary that is one block.
    vocabulary = base.model.config.vocab_size
    assert memory.logits == min(memory.pack_tokens, 512) * vocabulary * 4


def test_packs_of_a_cpu_leave_room_unless_told_otherwise(
    make_task, write_recipe, tmp_path, monkeypatch
):
    rows = [{"wrong": "w" * 100, "right": f"{i}"} for i in range(120)]
    task = make_task("a", rows, batch_size=64)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)

    def taken(given: int | None) -> int:
        return plan(load_recipe(write_recipe(task, pack_tokens=given))).memory.pack_tokens

    limit.write_text("max\n")
    assert taken(None) == 2048
    kept = plan(load_recipe(write_recipe(task, pack_tokens=2048))).memory.activations
    # A half of the 40 % that activations may take.
    limit.write_text(str(round(kept / 0.2) + 5))
    assert taken(None) == 2048
    limit.write_text(str(round(kept / 0.2) - 5))
    assert taken(None) == 1024
    limit.write_text(str(round(kept / 0.2 / 8)))
    assert taken(None) == 512, "fewer would not train"
    assert taken(4096) == 4096


def test_four_bits_are_reckoned_as_such(make_task, write_recipe, tiny_base):
    base = BaseModel(tiny_base, torch.float32, torch.device("cpu"))
    sizes = {name: p.numel() for name, p in base.model.named_parameters()}
    linear = sum(size for name, size in sizes.items() if "proj" in name)
    reckoned = plan(load_recipe(write_recipe(make_task("a"), quantization="nf4"))).memory
    # 0.127 bits of scales beside the four.
    expected = linear * 4.127 / 8 + (sum(sizes.values()) - linear) * 4
    assert reckoned.base_weights == pytest.approx(expected, rel=1e-3)


def test_activations_are_reckoned_as_they_are(make_task, write_recipe, tmp_path):
    """Counts what autograd keeps of a step, each storage once, beside the estimate."""
    rows = [{"wrong": f"{i}" + "w" * 60, "right": "x" * 60} for i in range(16)]
    task = make_task("one", rows=rows, split={"validation": 0, "held_out": 0}, steps=1)

    def counted(checkpointing: str) -> tuple[int, MemoryEstimate]:
        recipe = write_recipe(task, pack_tokens=1024, gradient_checkpointing=checkpointing)
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            manylora_trainer.train(recipe, tmp_path / checkpointing)
        return sum(kept.values()), plan(load_recipe(recipe)).memory

    everything, estimate = counted("off")
    assert not estimate.recomputed
    assert estimate.activations == pytest.approx(everything, rel=0.2)
    entering, estimate = counted("on")
    assert estimate.recomputed
    # What one of the two layers keeps while it is computed again is hidden from the hooks.
    assert estimate.activations == pytest.approx(entering + everything / 2, rel=0.2)


def test_the_steps_of_epochs_are_not_known_where_rows_were_not_counted(make_task, write_recipe):
    rows = [{"wrong": f"w{i}", "right": "r"} for i in range(1001)]
    recipe = write_recipe(make_task("many", rows=rows, steps=None, epochs=3))
    planned = plan(load_recipe(recipe))
    assert (planned.tasks[0].steps, planned.time) == (None, None)
    assert "3 epochs, rows not counted" in dry_run(recipe)


def test_a_dry_run_finds_what_is_wrong_with_rows(make_task, write_recipe):
    bad = [{"wrong": "a", "right": "b"}, {"wrong": "a"}]
    with pytest.raises(RowError, match="row 2, field 'right': missing"):
        plan(load_recipe(write_recipe(make_task("bad", rows=bad))))
    everything = {"validation": 0, "held_out": 0}
    skipping = make_task("bad", rows=bad, on_bad_row="skip", split=everything)
    assert plan(load_recipe(write_recipe(skipping))).tasks[0].rows_malformed == 1
    with pytest.raises(NoExamplesError, match="1 are longer than max_length 8"):
        plan(load_recipe(write_recipe({**skipping, "max_length": 8})))


def test_a_dry_run_refuses_what_the_rows_it_has_seen_make_impossible(make_task, write_recipe):
    without_steps = {**make_task("one"), "batch_size": 4, "epochs": 1}
    del without_steps["steps"]
    warm = {**without_steps, "optimizer": {"warmup_steps": 50}}
    with pytest.raises(UnfitTaskError, match=r"are 8 steps.*warmup_steps \(50\)"):
        plan(load_recipe(write_recipe(warm)))
    unmeasured = make_task("one", early_stopping={}, split={"validation": 1e-9})
    with pytest.raises(NoExamplesError, match="early_stopping has no validation rows"):
        plan(load_recipe(write_recipe(unmeasured)))


def test_a_step_has_no_more_examples_than_the_epochs(make_task, write_recipe):
    task = make_task("one", split={"validation": 0, "held_out": 0}, epochs=1, batch_size=1000)
    del task["steps"]
    (planned,) = plan(load_recipe(write_recipe(task))).tasks
    assert planned.examples_per_step == 40
