"""How far two ways of passing and failing the same answers agree."""

from collections.abc import Sequence

import numpy as np

from manylora_evaluator.bootstrap import RESAMPLES, TAIL, Floats
from manylora_evaluator.judgements import Agreement


def agreement(
    criterion: str, beside: str, pairs: Sequence[tuple[bool, bool]], seed: int
) -> Agreement:
    """Accuracy and Cohen's kappa (1960) of (judge, other) `pairs`.

    Kappa is agreement beyond chance: 1 is all, 0 what chance gives. Its 95 % interval is a
    percentile bootstrap over the answers. It is None where one side never changes its word, or
    the interval where hardly a resample does.
    """
    cells = np.zeros(4)
    for judge, other in pairs:
        cells[2 * judge + other] += 1
    rows = len(pairs)
    drawn = _kappa(
        np.random.default_rng(seed).multinomial(rows, cells / rows, RESAMPLES).astype(np.float64)
    )
    drawn = drawn[~np.isnan(drawn)]
    kappa = float(_kappa(cells[None])[0])
    enough = len(drawn) > RESAMPLES / 2
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL]) if enough else (np.nan, np.nan)
    return Agreement(
        criterion=criterion,
        beside=beside,
        answers=rows,
        accuracy=float((cells[0] + cells[3]) / rows),
        kappa=None if np.isnan(kappa) else kappa,
        low=float(low) if enough else None,
        high=float(high) if enough else None,
        judge_passed=int(cells[2] + cells[3]),
        other_passed=int(cells[1] + cells[3]),
    )


def _kappa(cells: Floats) -> Floats:
    """Of each line of [_, 4]: neither passed, other alone, judge alone, both; NaN: undefined."""
    share = cells / cells.sum(axis=1, keepdims=True)
    agreed = share[:, 0] + share[:, 3]
    judge, other = share[:, 2] + share[:, 3], share[:, 1] + share[:, 3]
    chance = judge * other + (1 - judge) * (1 - other)
    undefined = chance > 1 - 1e-12
    return np.where(undefined, np.nan, (agreed - chance) / np.where(undefined, 1, 1 - chance))
