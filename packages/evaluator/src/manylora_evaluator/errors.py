"""Every error the evaluator raises.

EvaluatorError
├── RowsError                 held-out rows are malformed
├── FixtureError              the script of a SQL fixture fails
├── SuiteError                a suite that reads well asks for what its scorers or rows lack
├── JudgeError                a judge cannot be asked at all
│   ├── AttemptError          one attempt to ask it failed; a caller sees NoVerdictError
│   ├── JudgeRefusesError     it answers nobody: a wrong key or address
│   └── NoVerdictError        it never answered; counted, and what it was asked about fails
├── UnknownTaskError          the suite has no task of that name
├── ResultsError              results cannot be read, kept or recorded, or hold no such score
├── EvaluationFailedError     requests failed; carries the result of those that did not
├── ReportError               results cannot be written; carries them
└── GateError                 a threshold is broken, or a version no match for its baseline

A suite that is wrong in itself is a manylora_registry ConfigError; a server that is away, or an
adapter it does not know, is a manylora_client StatusError.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora_evaluator.results import EvaluationResult


class EvaluatorError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "EVALUATOR"

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception by itself is made again from its text alone, and a pool of processes hangs
        # on one that cannot be.
        return Exception.__new__, (type(self), *self.args), vars(self)


class RowsError(EvaluatorError):
    """Held-out rows are malformed."""

    reason = "ROWS_INVALID"

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        self.problem = problem
        super().__init__(f"{path}{'' if line is None else f' line {line}'}: {problem}")


class FixtureError(EvaluatorError):
    """The script of a SQL fixture fails."""

    reason = "FIXTURE_INVALID"


class SuiteError(EvaluatorError):
    """A suite asks for what its scorers or rows do not have."""

    reason = "SUITE_INVALID"


class JudgeError(EvaluatorError):
    """A judge cannot be asked at all."""

    reason = "JUDGE_UNUSABLE"


class AttemptError(JudgeError):
    """One attempt to ask a judge failed."""

    reason = "JUDGE_ATTEMPT_FAILED"

    def __init__(
        self, message: str, *, again: bool, after: float | None = None, refused: bool = False
    ) -> None:
        self.again = again
        """Whether another attempt may help."""
        self.refused = refused
        """Whether it is the key or the address and not the question that is wrong."""
        self.after = after
        """Seconds the server asks to wait before it."""
        super().__init__(" ".join(message.split()))


class JudgeRefusesError(JudgeError):
    """A judge that has answered nothing yet refuses, whatever it would be asked."""

    reason = "JUDGE_REFUSES"


class NoVerdictError(JudgeError):
    """A judge gave no answer, however often it was asked."""

    reason = "JUDGE_SILENT"


class UnknownTaskError(EvaluatorError):
    """The suite has no task of that name."""

    reason = "TASK_UNKNOWN"


class ResultsError(EvaluatorError):
    """Results cannot be read, kept or recorded, or hold no such score."""

    reason = "RESULTS_INVALID"


class EvaluationFailedError(EvaluatorError):
    """Requests failed, so the scores are not to be relied on."""

    reason = "EVALUATION_FAILED"

    def __init__(self, message: str, result: "EvaluationResult") -> None:
        self.result = result
        super().__init__(message)


class ReportError(EvaluatorError):
    """Results cannot be written."""

    reason = "REPORT_UNWRITABLE"

    def __init__(self, message: str, result: "EvaluationResult") -> None:
        self.result = result
        super().__init__(message)


class GateError(EvaluatorError):
    """A threshold is broken, or a version is no match for its baseline."""

    reason = "GATE_CLOSED"

    def __init__(self, message: str, result: "EvaluationResult") -> None:
        self.result = result
        super().__init__(message)
