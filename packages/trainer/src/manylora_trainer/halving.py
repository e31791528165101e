"""Which trials go on at a rung, and which leave the run."""

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

    def at(self, losses: Mapping[int, float], end: int | None) -> dict[int, float]:
        """Of a trial's losses by step those at a rung; at its `end` it is compared no more."""
        return {step: loss for step, loss in losses.items() if self._is_rung(step) and step != end}

    def losers(self, step: int, losses: Mapping[str, float]) -> dict[str, str]:
        """Those of the trials under way that leave at `step`, each with the reason.

        `losses` are the validation losses of those with steps ahead of them. A trial goes on when
        it is among the best 1 / factor of all that came as far, in this run and before. Nothing
        but those losses decides, so a resumed run decides the same.
        """
        if self._halving is None or not losses or not self._is_rung(step):
            return {}
        for trial, loss in losses.items():
            self.add(trial, {step: loss})
        reached = self._losses[step]
        ranked = sorted(reached, key=lambda trial: (reached[trial], trial))
        kept = max(1, len(ranked) // self._halving.factor)
        return {
            trial: f"step {step}: validation loss {loss:.4g} is place "
            f"{ranked.index(trial) + 1} of {len(ranked)}, and {kept} go on"
            for trial, loss in losses.items()
            if ranked.index(trial) >= kept
        }

    def _is_rung(self, step: int) -> bool:
        return self._halving is not None and self._halving.is_rung(step)
