"""Scores adapters through a gateway on held-out rows.

    from pathlib import Path
    from manylora_evaluator import evaluate

    result = evaluate(Path("recipes/quickstart-suite.yaml"), out=Path("report"))
    print(result.score("spelling", "spelling", "exact_match").mean)

What needs numpy or gRPC is imported when it is first named.
"""

from typing import TYPE_CHECKING

from manylora_evaluator.errors import (
    EvaluationFailedError,
    EvaluatorError,
    FixtureError,
    GateError,
    ResultsError,
    RowsError,
    SuiteError,
    UnknownTaskError,
)

if TYPE_CHECKING:
    from manylora_evaluator.results import EvaluationResult
    from manylora_evaluator.run import evaluate

__all__ = [
    "EvaluationFailedError",
    "EvaluationResult",
    "EvaluatorError",
    "FixtureError",
    "GateError",
    "ResultsError",
    "RowsError",
    "SuiteError",
    "UnknownTaskError",
    "evaluate",
]


def __getattr__(name: str) -> object:
    """Imports the evaluation itself when it is first named."""
    if name == "evaluate":
        from manylora_evaluator.run import evaluate

        return evaluate
    if name == "EvaluationResult":
        from manylora_evaluator.results import EvaluationResult

        return EvaluationResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
