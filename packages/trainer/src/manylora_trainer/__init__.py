"""Trains many LoRA adapters over one base model in one run."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from manylora_trainer.errors import WorkersUnavailableError
from manylora_trainer.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from manylora_trainer.loop import Judge
    from manylora_trainer.progress import Progress
    from manylora_trainer.result import RunResult

__all__ = ["Recipe", "load_recipe", "train"]


def train(
    recipe: Recipe | Path | str,
    run_dir: Path | str | None = None,
    resume: bool = False,
    *,
    progress: "Progress | None" = None,
    how_to_resume: str = "resume=True",
    allow_changes: Sequence[str] = (),
    judge: "Judge | None" = None,
    date: datetime | None = None,
) -> "RunResult":
    """Trains every task of a recipe in one run, and writes one adapter for each.

        result = train("recipes/quickstart/recipe.yaml")
        print(result.tasks["spelling"].metrics)

    Args:
        recipe: A recipe, or the path of one.
        run_dir: Where the run goes instead of the recipe's `run_directory`.
        resume: Go on from the newest checkpoint in that directory, or start if it is empty. On a
            CPU with the same number of threads the adapters are the same bytes as without the
            interruption.
        progress: Where to show progress; standard error unless given.
        allow_changes: Dotted paths such as `tasks.0.steps` in which the recipe may differ from
            the one that the run was started with.
        how_to_resume: What the message of an interruption tells the user to do.
        judge: Called with a step and the validation losses measured after it, of adapters with
            steps ahead of them; names those that leave the run there, each with the reason. It
            must decide by these alone, so that a resumed run decides the same.
        date: What a chat template that writes the date writes; the day of the run's start unless
            given.

    Raises:
        ConfigError: the recipe has mistakes.
        BaseError, UnsupportedBaseError: the base cannot be read or trained on.
        DataError: rows cannot be read or trained on.
        UnfitTaskError: a task's settings do not go with its rows or its base.
        InitialAdapterError: the adapter to go on from is not there or of another shape.
        RunDirectoryError: the run directory cannot be used as asked.
        DeviceMemoryError: the GPU has too little memory; the last checkpoint is whole.
        StorageError: the disk is full; the last checkpoint is whole.
        WorkersUnavailableError: several workers were asked for, and Ray is not installed.
        WorkersLostError: workers were lost more often than they may be started again.
        RunInterruptedError: SIGINT, SIGTERM or SIGHUP came; a checkpoint was written first, unless
            no step was taken.
    """
    # Bases are local directories: without this the libraries look for a hub first.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from manylora_trainer.interruption import Signals
    from manylora_trainer.progress import Progress

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    path = Path(run_dir) if run_dir is not None else recipe.run_directory
    with progress or Progress() as watch:
        if recipe.workers.count > 1:
            try:
                from manylora_trainer.ray_train import train_on_workers
            except ModuleNotFoundError as error:
                raise WorkersUnavailableError(
                    "workers.count above 1 needs Ray: install manylora-trainer[ray]"
                ) from error

            return train_on_workers(
                recipe,
                path,
                resume=resume,
                watch=watch,
                how_to_resume=how_to_resume,
                allow_changes=allow_changes,
                judge=judge,
                date=date,
            )
        with Signals() as interruption:
            # Within, as an import that is broken off is told of in strange ways.
            from manylora_trainer.loop import nobody, train_run

            return train_run(
                recipe,
                path,
                resume=resume,
                watch=watch,
                how_to_resume=how_to_resume,
                allow_changes=allow_changes,
                judge=judge or nobody,
                date=date,
                interruption=interruption,
            )
