"""Every error of every package passes whole from one process to another."""

import inspect
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pytest

from manylora_client import FieldViolation
from manylora_client import errors as client
from manylora_evaluator import EvaluationResult
from manylora_evaluator import errors as evaluator
from manylora_evaluator.suite import Decision
from manylora_gateway import errors as gateway
from manylora_registry import errors as registry
from manylora_trainer import errors as trainer

RESULT = EvaluationResult(
    suite="nightly",
    server="localhost:8700",
    started_at=datetime(2026, 1, 1, tzinfo=UTC),
    seconds=1.5,
    seed=0,
    decision=Decision(),
    tasks=(),
)
PROBLEMS = [registry.Problem("threads", "must be positive", 3)]
MADE: dict[type[Exception], Exception] = {
    type(error): error
    for error in (
        client.StatusError("is full", code="RESOURCE_EXHAUSTED", retry_after=1.5),
        client.InvalidArgumentError(
            "wrong", code="INVALID_ARGUMENT", violations=[FieldViolation("chat", "is empty")]
        ),
        evaluator.RowsError(Path("rows.jsonl"), "is not JSON", 3),
        evaluator.AttemptError("is full", again=True, after=1.5),
        evaluator.EvaluationFailedError("3 requests failed", RESULT),
        evaluator.ReportError("report cannot be written", RESULT),
        evaluator.GateError("exact_match 0.612 is below 0.700", RESULT),
        gateway.InvalidRequestError([gateway.Violation("chat", "is empty")]),
        gateway.TokenRateError("over quota", 1.5),
        trainer.RowError("rows.jsonl", 3, "text", "is null"),
        trainer.UnfitTaskError("spelling", "has no rows"),
        registry.ConfigError(Path("recipe.yaml"), PROBLEMS),
        registry.DatabaseUnavailableError("registry.sqlite", "locked"),
        registry.DatabaseDamagedError("registry.sqlite", "no database"),
        registry.InvalidAdapterError("spelling", PROBLEMS),
        registry.WrongBaseError("spelling@1", "sha256:aa", "sha256:bb"),
        registry.DescriptionError("spelling@1", PROBLEMS),
        registry.AliasConflictError("spelling@production", 1, 2),
        registry.CorruptBlobError("sha256:aa", "is missing"),
    )
}
KINDS = [
    kind
    for package in (client, evaluator, gateway, registry, trainer)
    for kind in vars(package).values()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == package.__name__
]


def an_error(kind: type[Exception]) -> Exception:
    if kind in MADE:
        return MADE[kind]
    if issubclass(kind, client.StatusError):
        return kind("wrong", code="INTERNAL")
    return kind("is wrong")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_an_error_passes_whole_from_one_process_to_another(kind: type[Exception]) -> None:
    error = an_error(kind)
    passed = pickle.loads(pickle.dumps(error))

    assert type(passed) is kind
    assert (str(passed), vars(passed)) == (str(error), vars(error))
