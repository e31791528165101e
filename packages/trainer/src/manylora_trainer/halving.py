"""Which trials go on at a rung, and which leave the run."""

import math
from collections.abc import Mapping

from manylora_trainer.sweep_settings import Halving


class Rungs:
    """The losses of all trials so far at the steps where they are compared."""

    def __init__(self, halving: Halving | None) -> None:
        self._halving = halving
        self._losses: dict[int, dict[str, float]] = {}

    def add(self, trial: str, losses: Mapping[int, float]) -> None:
        """Counts a trial of an earlier run in."""
        for step, loss in losses.items():
            self._losses.setdefault(step, {})[trial] = loss

    def at(self, trial_losses: Mapping[int, float], steps: int) -> dict[int, float]:
        """Of the losses of a trial, by step, those at a rung."""
        rungs = [] if self._halving is None else self._halving.rungs(steps)
        return {step: trial_losses[step] for step in rungs if step in trial_losses}

    def losers(
        self, step: int, losses: Mapping[str, float], steps: Mapping[str, int]
    ) -> dict[str, str]:
        """Those of the trials under way that leave at `step`, each with the reason.

        `losses` are the validation losses just measured, `steps` where each trial would end.
        A trial goes on when it is among the best 1 / factor of all that came as far, in this run
        and before. Nothing but those losses decides, so a resumed run decides the same.
        """
        if self._halving is None:
            return {}
        here = {
            trial: loss
            for trial, loss in losses.items()
            if step in self._halving.rungs(steps[trial])
        }
        if not here:
            return {}
        for trial, loss in here.items():
            self.add(trial, {step: loss})
        reached = self._losses[step]
        ranked = sorted(reached, key=lambda trial: (_rank(reached[trial]), trial))
        kept = max(1, len(ranked) // self._halving.factor)
        return {
            trial: f"step {step}: validation loss {here[trial]:.4g} is place "
            f"{ranked.index(trial) + 1} of {len(ranked)}, and {kept} go on"
            for trial in here
            if ranked.index(trial) >= kept
        }


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
