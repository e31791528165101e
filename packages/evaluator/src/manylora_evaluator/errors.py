"""Every error the evaluator raises.

EvaluatorError
├── RowsError                 a file of held-out rows is malformed
├── UnknownTaskError          the suite has no task of that name
├── ResultsError              a results.json cannot be read, or holds no such score
└── EvaluationFailedError     requests failed; carries the result of those that did not

A suite that is wrong is a manylora_registry ConfigError; a server that is away, or an adapter it
does not know, is a manylora_client StatusError.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manylora_evaluator.results import EvaluationResult


class EvaluatorError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "EVALUATOR"


class RowsError(EvaluatorError):
    """A file of held-out rows is malformed."""

    reason = "ROWS_INVALID"

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        self.problem = problem
        super().__init__(f"{path}{'' if line is None else f' line {line}'}: {problem}")


class UnknownTaskError(EvaluatorError):
    """The suite has no task of that name."""

    reason = "TASK_UNKNOWN"


class ResultsError(EvaluatorError):
    """Results cannot be read, or hold no such score."""

    reason = "RESULTS_INVALID"


class EvaluationFailedError(EvaluatorError):
    """Requests failed, so the scores are not to be relied on."""

    reason = "EVALUATION_FAILED"

    def __init__(self, message: str, result: "EvaluationResult") -> None:
        self.result = result
        super().__init__(message)
