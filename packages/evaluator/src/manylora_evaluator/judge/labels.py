"""Answers that people passed or failed, to measure a judge by."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from manylora_evaluator.errors import RowsError
from manylora_evaluator.rows import Message, Row
from manylora_evaluator.scorer_settings import JudgeSettings


class _Line(BaseModel, frozen=True):
    messages: tuple[Message, ...] = Field(min_length=1)
    expected: str = ""
    answer: str
    labels: dict[str, bool] = Field(min_length=1)


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer and what people say of it."""

    row: Row
    answer: str
    labels: dict[str, bool]
    """Whether it passes, by criterion."""


def load_labels(settings: JudgeSettings) -> list[LabelledAnswer]:
    """The labelled answers of `settings`; none where it names no file.

    A line is `{"messages": [...], "expected": TEXT, "answer": TEXT, "labels": {CRITERION: true}}`.

    Raises:
        RowsError: a line is malformed, or labels what is no criterion.
    """
    path = settings.labels
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RowsError(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RowsError(path, f"is no UTF-8: {error}") from error
    found = [
        _parse(path, number, line, settings)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise RowsError(path, "holds no labelled answers")
    return found


def _parse(path: Path, number: int, line: str, settings: JudgeSettings) -> LabelledAnswer:
    try:
        parsed = _Line.model_validate(json.loads(line))
    except (ValueError, ValidationError, RecursionError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise RowsError(path, f"is no labelled answer: {said}", number) from error
    strange = [name for name in parsed.labels if name not in settings.criteria]
    if strange:
        raise RowsError(path, f"labels: {', '.join(strange)} is no criterion", number)
    return LabelledAnswer(Row(parsed.messages, parsed.expected, {}), parsed.answer, parsed.labels)
