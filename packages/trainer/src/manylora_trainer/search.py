"""Which settings to try next: every combination, at random, or learning from results."""

# optuna is only partly typed.
# pyright: reportUnknownMemberType=false

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from manylora_trainer.sweep_settings import Range, Settings, Sweep


@dataclass(frozen=True)
class Outcome:
    """What came of a trial, as far as a search wants to know."""

    loss: float | None
    """At its end; None where it stopped before."""
    rungs: Mapping[int, float]
    """Loss at the steps where trials were compared."""


class Search(Protocol):
    """Proposes settings. The same questions and answers always give the same proposals."""

    def ask(self) -> tuple[int, Settings]:
        """Number and settings of the next trial."""
        ...

    def tell(self, number: int, outcome: Outcome) -> None:
        """Learns what came of a trial."""
        ...


def make_search(sweep: Sweep) -> Search:
    """The search that a sweep asks for, at its beginning."""
    return Grid(sweep) if sweep.method == "grid" else OptunaSearch(sweep)


class Grid:
    """Every combination in turn."""

    def __init__(self, sweep: Sweep) -> None:
        self._settings = enumerate(sweep.grid())

    def ask(self) -> tuple[int, Settings]:
        """Number and settings of the next combination."""
        return next(self._settings)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Learns nothing: what to try is settled."""


class OptunaSearch:
    """Random or TPE search by Optuna, kept in memory and replayed when a sweep is resumed."""

    def __init__(self, sweep: Sweep) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        samplers = optuna.samplers
        sampler = (
            samplers.RandomSampler(seed=sweep.seed)
            if sweep.method == "random"
            # The first run is drawn at random; then trials under way count as poor ones, so that
            # those asked for together differ.
            else samplers.TPESampler(
                seed=sweep.seed, n_startup_trials=sweep.trials_per_run, constant_liar=True
            )
        )
        self._study = optuna.create_study(sampler=sampler, direction="minimize")
        self._space = {path: self._distribution(values) for path, values in sweep.space.items()}
        self._named = {path for path, values in sweep.space.items() if isinstance(values, tuple)}
        self._trials: dict[int, optuna.Trial] = {}

    def ask(self) -> tuple[int, Settings]:
        """Number and settings that the sampler proposes."""
        trial = self._study.ask(self._space)
        self._trials[trial.number] = trial
        drawn: dict[str, Any] = trial.params
        return trial.number, {
            path: json.loads(drawn[path]) if path in self._named else drawn[path]
            for path in self._space
        }

    def tell(self, number: int, outcome: Outcome) -> None:
        """Gives the sampler a loss; of a stopped trial those it had on its way."""
        from optuna.trial import TrialState

        trial = self._trials.pop(number)
        for step, loss in outcome.rungs.items():
            trial.report(loss, step)
        if outcome.loss is not None:
            self._study.tell(trial, outcome.loss)
        else:
            state = TrialState.PRUNED if outcome.rungs else TrialState.FAIL
            self._study.tell(trial, state=state)

    @staticmethod
    def _distribution(values: Range | tuple[Any, ...]) -> Any:
        from optuna import distributions

        if isinstance(values, tuple):
            # Lists of module names are no categories of Optuna's; their JSON is.
            return distributions.CategoricalDistribution([json.dumps(value) for value in values])
        if values.is_whole:
            return distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
        return distributions.FloatDistribution(values.low, values.high, log=values.log)
