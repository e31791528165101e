"""Answers that are labels: accuracy, macro F1, and the report of every label."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import ClassificationSettings
from manylora_evaluator.scorers.tally import Tallies, Tally, one
from manylora_evaluator.scorers.text import folded, normalised

OTHER = "(other)"
"""Column of the confusion matrix for answers that are no label."""


@dataclass(frozen=True)
class LabelScores:
    """One label: how many rows expect it, and how answers fared; NaN-free, 0 where undefined."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassificationReport:
    """What became of every label."""

    score: str
    """Name of the scorer's chief score."""
    labels: tuple[LabelScores, ...]
    macro: LabelScores
    """Means over the labels with equal weight."""
    micro: LabelScores
    """Of all decisions together; answers that are no label lower its recall alone."""
    answers: tuple[str, ...]
    """Heads of the matrix's columns: the labels, and `(other)` where some answer was none."""
    matrix: tuple[tuple[int, ...], ...]
    """Rows: expected labels in order; columns: `answers`."""


class Classification:
    """Compares labels as normalised_match does; with punctuation where that tells labels apart.

    The chief score is accuracy; SCORE.macro_f1 is the mean of the labels' F1 (2TP over
    2TP + FP + FN), and SCORE.f1.LABEL one of them.
    """

    def __init__(self, settings: ClassificationSettings, rows: Iterable[Row]) -> None:
        labels = settings.labels or sorted({row.expected.strip() for row in rows} - {""})
        self._label = settings.name
        self._labels = {normalised(label): label for label in labels}
        self._form = normalised
        exactly = {folded(label): label for label in labels}
        if "" in self._labels or len(self._labels) < len(exactly):
            # C, C++ and C# are one word; nothing is left of + and -.
            self._labels, self._form = exactly, folded
        self._macro = f"{settings.name}.macro_f1"
        self._each = (
            {label: f"{settings.name}.f1.{label}" for label in self._labels.values()}
            if settings.per_label
            else {}
        )
        self.names = (settings.name, self._macro, *self._each.values())

    def unfit(self, row: Row) -> str | None:
        """One of the labels is needed."""
        if self.label_of(row.expected) is not None:
            return None
        return f"is none of the labels {', '.join(self._labels.values())}"

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """The row's share of accuracy, and of the F1 of the expected and the given label."""
        expected, given = self.label_of(row.expected), self.label_of(output)
        right = expected == given
        involved = {label for label in (expected, given) if label is not None}
        macro = tuple(Tally(2.0 * right, 1.0 + right, label) for label in sorted(involved))
        scores = {self._label: one(right), self._macro: macro}
        for label, name in self._each.items():
            scores[name] = (Tally(2.0 * right, 1.0 + right) if label in involved else Tally(0, 0),)
        return scores

    def label_of(self, text: str) -> str | None:
        """The label `text` names, if any."""
        return self._labels.get(self._form(text))

    def report(self, pairs: Sequence[tuple[str, str]]) -> ClassificationReport:
        """The report over (expected, answer) pairs."""
        labels = tuple(self._labels.values())
        cells = Counter((self.label_of(wanted), self.label_of(given)) for wanted, given in pairs)
        wanted = {label: sum(n for (w, _), n in cells.items() if w == label) for label in labels}
        given = {label: sum(n for (_, g), n in cells.items() if g == label) for label in labels}
        each = tuple(
            _scores(label, cells[label, label], given[label], wanted[label]) for label in labels
        )
        hits = sum(cells[label, label] for label in labels)
        columns: tuple[str | None, ...] = labels
        if any(answer is None for _, answer in cells):
            columns = (*labels, None)
        return ClassificationReport(
            score=self._label,
            labels=each,
            macro=_mean("macro", each),
            micro=_scores("micro", hits, sum(given.values()), len(pairs)),
            answers=tuple(OTHER if answer is None else answer for answer in columns),
            matrix=tuple(tuple(cells[label, answer] for answer in columns) for label in labels),
        )


def _scores(label: str, hits: int, given: int, wanted: int) -> LabelScores:
    precision = hits / given if given else 0.0
    recall = hits / wanted if wanted else 0.0
    f1 = 2 * hits / (given + wanted) if given + wanted else 0.0
    return LabelScores(label, wanted, precision, recall, f1)


def _mean(label: str, each: Sequence[LabelScores]) -> LabelScores:
    return LabelScores(
        label,
        sum(entry.support for entry in each),
        sum(entry.precision for entry in each) / len(each),
        sum(entry.recall for entry in each) / len(each),
        sum(entry.f1 for entry in each) / len(each),
    )
