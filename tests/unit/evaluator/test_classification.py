"""Labels: beside scikit-learn, and by hand where it has no word for an answer that is none."""

import random
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from manylora_evaluator.bootstrap import estimate
from manylora_evaluator.scorer_settings import ClassificationSettings
from manylora_evaluator.scorers.classification import OTHER, Classification
from tests.unit.evaluator.scorer_cases import row

LABELS = ["benign", "malign", "unclear"]


def classification(**settings: object) -> Classification:
    return Classification(
        ClassificationSettings.model_validate({"kind": "classification"} | settings),
        [row(label) for label in LABELS],
    )


def test_the_report_is_scikit_learns() -> None:
    coins = random.Random(0)
    pairs = [(coins.choice(LABELS), coins.choice(LABELS)) for _ in range(200)]
    made = classification()

    report = made.report(pairs)

    wanted, given = zip(*pairs, strict=True)
    theirs: Any = precision_recall_fscore_support(wanted, given, labels=LABELS)
    each = zip(*theirs, strict=True)
    for ours, (precision, recall, f1, support) in zip(report.labels, each, strict=True):
        assert (ours.precision, ours.recall, ours.f1, ours.support) == pytest.approx(
            (precision, recall, f1, support)
        )
    for ours, average in ((report.macro, "macro"), (report.micro, "micro")):
        theirs = precision_recall_fscore_support(wanted, given, average=average)
        assert (ours.precision, ours.recall, ours.f1) == pytest.approx(theirs[:3])
    assert [list(line) for line in report.matrix] == confusion_matrix(
        wanted, given, labels=LABELS
    ).tolist()


def test_the_scores_are_those_of_the_report() -> None:
    coins = random.Random(1)
    pairs = [(coins.choice(LABELS), coins.choice([*LABELS, "what?"])) for _ in range(100)]
    made = classification(per_label=True)

    shares = [made.score(given, row(wanted)) for wanted, given in pairs]

    report = made.report(pairs)
    assert made.names == (
        "classification",
        "classification.macro_f1",
        "classification.f1.benign",
        "classification.f1.malign",
        "classification.f1.unclear",
    )
    values = [estimate([share[name] for share in shares], seed=0).mean for name in made.names]
    accuracy = sum(wanted == given for wanted, given in pairs) / len(pairs)
    assert values == pytest.approx(
        [accuracy, report.macro.f1, *(label.f1 for label in report.labels)]
    )


def test_an_answer_that_is_no_label_misses_without_a_false_alarm() -> None:
    report = classification().report([("benign", "Benign."), ("malign", "no idea")])

    assert report.answers == (*LABELS, OTHER)
    assert report.matrix == ((1, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0))
    assert (report.micro.precision, report.micro.recall) == (1, 0.5)
    assert [label.recall for label in report.labels] == [1, 0, 0]


@pytest.mark.parametrize(
    "labels", [["C", "C++", "C#"], ["+", "-"], ["<=50K", ">50K"], ["yes", "yes!"]]
)
def test_labels_that_differ_in_punctuation_alone_are_told_apart(labels: list[str]) -> None:
    for made in (
        classification(labels=labels),
        Classification(ClassificationSettings(kind="classification"), list(map(row, labels))),
    ):
        assert [made.label_of(f" {label.lower()}\n") for label in labels] == labels


def test_otherwise_punctuation_and_case_are_nothing() -> None:
    made = classification(labels=["yes", "No", "not sure"])

    assert [made.label_of(text) for text in ("Yes.", "*no*", "Not-sure", "yesno")] == [
        "yes",
        "No",
        "not sure",
        None,
    ]


def test_a_row_that_expects_nothing_has_no_label() -> None:
    made = Classification(
        ClassificationSettings(kind="classification"), [row("yes"), row("no"), row(" ")]
    )

    assert made.unfit(row(" ")) == "is none of the labels no, yes"
