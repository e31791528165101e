"""From rows to tokens with the real commands: two tasks, one run, one running gateway."""

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import Gateway

COLOURS = {"dusk": "violet", "dawn": "amber"}
"""Two tasks that answer every question with one word, each its own."""

RECIPE = """
base: {base}
run_directory: run
tasks:
{tasks}
"""

TASK = """
  - name: {name}
    source: {{kind: jsonl, path: {name}.jsonl}}
    format: {{kind: prompt_completion, system: Name the colour.}}
    split: {{validation: 0.1, held_out: 0.1}}
    lora: {{rank: {rank}, alpha: 16, target_modules: {targets}}}
    optimizer: {{learning_rate: 5.0e-3}}
    steps: 8
    batch_size: 4
"""


def manylora(*arguments: str) -> str:
    command = [sys.executable, "-m", "manylora_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_trained_in_one_run_is_what_is_served(
    gateway: Gateway, base: Path, registry_directory: Path, tmp_path: Path
) -> None:
    """Promise 8, and adapters published after the start are served without a restart."""
    for name, colour in COLOURS.items():
        rows = [{"prompt": f"What is the colour of {i}?", "completion": colour} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shapes = {"dusk": (8, "all-linear"), "dawn": (4, "[q_proj, v_proj, up_proj, down_proj]")}
    tasks = [
        TASK.format(name=name, rank=rank, targets=targets)
        for name, (rank, targets) in shapes.items()
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, tasks="".join(tasks)))
    manylora("train", str(recipe))
    where = ("--registry", str(registry_directory))
    manylora("publish", str(tmp_path / "run"), "--alias", "production", *where)
    for name, colour in COLOURS.items():
        answer = manylora(
            *("generate", "--adapter", name, "--server", gateway.inference, "--json"),
            *("--system", "Name the colour.", "What is the colour of the sky?"),
        )
        assert json.loads(answer)["text"] == colour
        assert json.loads(answer)["adapter"]["number"] == 1
