"""Verdicts kept on disk by what was asked."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from manylora_evaluator.errors import JudgeError
from manylora_evaluator.judge.model import Completion

_COMPLETION = TypeAdapter(Completion)


class Cache:
    """Completions in `directory/ab/<key>.json`, each written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory.

        Raises:
            JudgeError: it cannot be written.
        """
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise JudgeError(
                f"the judge's cache {directory} cannot be written: {error.strerror}"
            ) from error

    def keys(self) -> set[str]:
        """What is kept."""
        return {path.stem for path in self._directory.glob("*/*.json")}

    def get(self, key: str) -> Completion | None:
        """What is kept under `key`; a file that is damaged counts as none."""
        try:
            return _COMPLETION.validate_json(self._path(key).read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, key: str, completion: Completion) -> None:
        """Keeps `completion`, in place of what was there."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(completion), file)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"
