"""Answers on disk as they come, so that an evaluation that was broken off can go on."""

import logging
import shutil
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ValidationError

from manylora_client import FinishReason
from manylora_evaluator.errors import ResultsError

LOG = logging.getLogger(__name__)
NAME = "answers.jsonl"


class KeptAnswer(BaseModel, frozen=True):
    """One answer and what it took."""

    key: str
    """Digest of what was asked of whom."""
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class KeptAnswers:
    """The answers in `directory/answers.jsonl`, a line each.

    Each is written when it comes, so that whatever ends the evaluation costs no more than the
    requests under way.
    """

    verdicts: Path
    """Directory where judges without a cache of their own keep theirs meanwhile."""

    def __init__(self, directory: Path, *, resume: bool) -> None:
        """Opens the file, and makes the directory.

        Args:
            directory: of the report.
            resume: whether answers that are there already are used; else they are dropped.

        Raises:
            ResultsError: the directory cannot be written.
        """
        self.path = directory / NAME
        self.verdicts = directory / "verdicts"
        self._answers: dict[str, KeptAnswer] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resume and self.path.exists():
                self._read(self.path.read_bytes())
            if not resume and self.verdicts.exists():
                shutil.rmtree(self.verdicts)
            # What follows a line that was cut off begins a line of its own.
            mode = "a" if self._answers else "w"
            self._file: TextIO | None = self.path.open(mode, encoding="utf-8")
            self._file.write("\n" if self._answers else "")
        except OSError as error:
            raise ResultsError(f"{directory} cannot be written: {error.strerror}") from error

    def get(self, key: str) -> KeptAnswer | None:
        """What is kept under `key`."""
        return self._answers.get(key)

    def put(self, answer: KeptAnswer) -> None:
        """Keeps `answer`; on a full disk the evaluation goes on without."""
        if self._file is None:
            return
        try:
            self._file.write(answer.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            LOG.warning("answers are no longer kept in %s: %s", self.path, error.strerror)
            self._file = None

    def discard(self) -> None:
        """Deletes what was kept: the results have it all."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.verdicts, ignore_errors=True)

    def _read(self, content: bytes) -> None:
        for line in content.splitlines():
            try:
                answer = KeptAnswer.model_validate_json(line)
            except ValidationError:
                # Cut off by a full disk or a signal; asked again.
                continue
            self._answers[answer.key] = answer
