"""Scores adapters through a gateway on held-out rows.

    from pathlib import Path
    from manylora_evaluator import evaluate

    result = evaluate(Path("recipes/quickstart/suite.yaml"), out=Path("report"))
    print(result.score("spelling", "spelling", "exact_match").mean)

What needs numpy or gRPC is imported when it is first named.
"""

import importlib
from typing import TYPE_CHECKING

from manylora_evaluator.errors import (
    EvaluationFailedError,
    EvaluatorError,
    FixtureError,
    GateError,
    JudgeError,
    JudgeRefusesError,
    ReportError,
    ResultsError,
    RowsError,
    SuiteError,
    UnknownTaskError,
)

if TYPE_CHECKING:
    from manylora_evaluator.gates import compare, gate
    from manylora_evaluator.results import EvaluationResult
    from manylora_evaluator.run import evaluate
    from manylora_evaluator.suite import Decision
    from manylora_evaluator.verdicts import Comparison, Gate

__all__ = [
    "Comparison",
    "Decision",
    "EvaluationFailedError",
    "EvaluationResult",
    "EvaluatorError",
    "FixtureError",
    "Gate",
    "GateError",
    "JudgeError",
    "JudgeRefusesError",
    "ReportError",
    "ResultsError",
    "RowsError",
    "SuiteError",
    "UnknownTaskError",
    "compare",
    "evaluate",
    "gate",
]

_MODULES = {
    "Comparison": "verdicts",
    "Decision": "suite",
    "EvaluationResult": "results",
    "Gate": "verdicts",
    "compare": "gates",
    "evaluate": "run",
    "gate": "gates",
}


def __getattr__(name: str) -> object:
    """Imports what is heavy when it is first named."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
