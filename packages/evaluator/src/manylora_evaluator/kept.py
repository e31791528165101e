"""Answers on disk as they come, so that an evaluation that was broken off can go on."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ValidationError

from manylora_client import FinishReason
from manylora_evaluator.errors import ResultsError

LOG = logging.getLogger(__name__)
NAME = "answers.jsonl"


def content_key(parts: Mapping[str, Any]) -> str:
    """The hexadecimal sha256 of `parts` as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    requests under way. A lock on the file, which the kernel drops with the process, keeps other
    evaluations out of the directory until this is closed.
    """

    verdicts: Path
    """Directory where judges without a cache of their own keep theirs meanwhile."""

    def __init__(self, directory: Path, *, resume: bool) -> None:
        """Opens the file, and makes the directory.

        Args:
            directory: of the report.
            resume: whether answers that are there already are used; else they are dropped.

        Raises:
            ResultsError: the directory cannot be written, or another evaluation writes into it.
        """
        self.path = directory / NAME
        self.verdicts = directory / "verdicts"
        self._answers: dict[str, KeptAnswer] = {}
        self._keeps = True
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Nothing is cut off before the file is this one's.
            self._file = self.path.open("a", encoding="utf-8")
            if not _is_ours(self._file):
                raise ResultsError(
                    f"another evaluation writes into {directory}: wait for its end, or give this "
                    "one another directory"
                )
            if resume:
                self._read(self.path.read_bytes())
            elif self.verdicts.exists():
                shutil.rmtree(self.verdicts)
            if self._answers:
                # What follows a line that was cut off begins a line of its own.
                self._file.write("\n")
            elif os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
        except OSError as error:
            raise ResultsError(f"{directory} cannot be written: {error.strerror}") from error

    def get(self, key: str) -> KeptAnswer | None:
        """What is kept under `key`."""
        return self._answers.get(key)

    def put(self, answer: KeptAnswer) -> None:
        """Keeps `answer`; on a full disk the evaluation goes on without."""
        if not self._keeps:
            return
        try:
            self._file.write(answer.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            LOG.warning("answers are no longer kept in %s: %s", self.path, error.strerror)
            self._keeps = False

    def discard(self) -> None:
        """Deletes what was kept: the results have it all."""
        shutil.rmtree(self.verdicts, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file, and lets other evaluations have the directory."""
        # Each line was flushed; one that could not be has been told of.
        with suppress(OSError):
            self._file.close()

    def _read(self, content: bytes) -> None:
        for line in content.splitlines():
            try:
                answer = KeptAnswer.model_validate_json(line)
            except ValidationError:
                # Cut off by a full disk or a signal; asked again.
                continue
            self._answers[answer.key] = answer


def _is_ours(file: TextIO) -> bool:
    """Locks `file`, unless another evaluation has it, or had and deleted it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(file.fileno()).st_nlink > 0
