"""Dividing the requests for an alias among versions, so that it survives a restart.

A rollout holds for what its alias pointed at when it was set. When the alias moves, the rollout
is over: promoting the new version and rolling back to the old one are the same single move.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora_gateway.errors import InvalidRequestError, UnavailableError, Violation
from manylora_gateway.figures import ShadowFigures
from manylora_registry import Version

AliasKey = tuple[str, str]
Division = Sequence[tuple[int, int]]
"""Version numbers with percentages."""
BUCKETS = 10_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What a version gets."""

    version: Version
    percent: int


@dataclass(frozen=True)
class Rollout:
    """How the requests for one alias are divided."""

    under: str
    """Digest of what the alias pointed at when this was set."""
    shares: tuple[Share, ...]
    """Empty: all get what the alias points at."""
    shadow: Share | None = None
    figures: ShadowFigures = field(default_factory=ShadowFigures, compare=False)

    @property
    def versions(self) -> list[Version]:
        """All that must be loaded."""
        shadow = [] if self.shadow is None else [self.shadow.version]
        return [*(share.version for share in self.shares), *shadow]

    def choose(self, serving: Version, key: AliasKey, sticky: str) -> Version:
        """The version for a request.

        Requests with equal `sticky` get the same one, and those of a version keep it while its
        share and those listed before it only grow.
        """
        bucket = _bucket("share", key, sticky)
        for share in self.shares:
            bucket -= share.percent * BUCKETS // 100
            if bucket < 0:
                return share.version
        return serving

    def copies(self, key: AliasKey, request_id: str) -> Version | None:
        """The version that answers a copy of a request, if one does."""
        shadow = self.shadow
        if shadow is None or _bucket("copy", key, request_id) >= shadow.percent * BUCKETS // 100:
            return None
        return shadow.version


def check_division(shares: Division, shadow: tuple[int, int] | None) -> None:
    """Refuses a division that is none.

    Raises:
        InvalidRequestError: with every field that is wrong.
    """
    parts = [(f"shares[{index}]", *share) for index, share in enumerate(shares)]
    if shadow is not None:
        parts.append(("shadow", *shadow))
    wrong: list[Violation] = []
    for part, number, percent in parts:
        if number < 1:
            wrong.append(Violation(f"{part}.version", "must be a version's number, from 1 on"))
        if not 1 <= percent <= 100:
            wrong.append(Violation(f"{part}.percent", "must be from 1 to 100"))
    total = sum(percent for _, percent in shares)
    if shares and total != 100:
        wrong.append(Violation("shares", f"are {total} percent together, not 100"))
    if len({number for number, _ in shares}) != len(shares):
        wrong.append(Violation("shares", "name a version twice"))
    if wrong:
        raise InvalidRequestError(wrong)


class Rollouts:
    """The rollouts of a gateway, kept in a file if there is a place for it.

    Args:
        state: directory for what must survive a restart; None keeps rollouts in memory.
    """

    def __init__(self, state: Path | None = None) -> None:
        self._file = None if state is None else state / "rollouts.json"
        self._rollouts: dict[AliasKey, Rollout] = {}
        # What the file says. A rollout that could not be set again when the gateway started stays
        # there until its alias moves.
        self._entries: dict[AliasKey, dict[str, Any]] = {}

    @property
    def durable(self) -> bool:
        """Whether they survive a restart."""
        return self._file is not None

    def get(self, key: AliasKey, serving: Version | None) -> Rollout | None:
        """The rollout of an alias that serves `serving`."""
        rollout = self._rollouts.get(key)
        holds = rollout is not None and serving is not None and rollout.under == serving.digest
        return rollout if holds else None

    def put(self, key: AliasKey, rollout: Rollout) -> Rollout | None:
        """Replaces the rollout of an alias, on disk first; returns the one before.

        Raises:
            UnavailableError: it cannot be written; nothing has changed.
        """
        entries = {each: entry for each, entry in self._entries.items() if each != key}
        if rollout.versions:
            entries[key] = _entry(key, rollout)
        try:
            self._write(entries)
        except OSError as error:
            logger.error("a rollout cannot be written: %s", error)
            raise UnavailableError(
                f"The rollout cannot be written ({error.strerror}); nothing has changed."
            ) from error
        self._entries = entries
        before = self._rollouts.pop(key, None)
        if rollout.versions:
            self._rollouts[key] = rollout
        return before

    def end(self, key: AliasKey) -> list[Version]:
        """Ends the rollout of an alias, whether that can be written or not.

        Returns the versions it needed. One that the file still has is not set again: its alias
        has moved, or its version is gone.
        """
        if self._entries.pop(key, None) is not None:
            try:
                self._write(self._entries)
            except OSError as error:
                logger.error("the end of a rollout cannot be written: %s", error)
        ended = self._rollouts.pop(key, None)
        return [] if ended is None else ended.versions

    def end_others(self, key: AliasKey, target: Version) -> list[Version]:
        """Ends the rollout of an alias that moved to `target`; see `end`.

        One that was set for `target` goes on: the alias had only fallen back behind it.
        """
        entry = self._entries.get(key)
        return [] if entry is None or entry["under"] == target.digest else self.end(key)

    def end_with(self, name: str, number: int) -> list[Version]:
        """Ends the rollouts of an adapter that need one of its versions; see `end`."""
        keys = [
            key
            for key, entry in self._entries.items()
            if key[0] == name and number in _numbers(entry)
        ]
        for key in keys:
            logger.warning("%s: its rollout ended, version %d is withdrawn", "@".join(key), number)
        return [version for key in keys for version in self.end(key)]

    def serve(self, digest: str) -> bool:
        """Whether a rollout needs the version."""
        return any(
            version.digest == digest
            for rollout in self._rollouts.values()
            for version in rollout.versions
        )

    def read(self) -> None:
        """Reads the file, as a gateway does when it starts; see `unset`."""
        if self._file is None or not self._file.is_file():
            return
        try:
            entries = json.loads(self._file.read_text("utf-8"))["rollouts"]
            found = {(entry["adapter"], entry["alias"]): entry for entry in entries}
            for entry in entries:
                _numbers(entry)
                _ = entry["under"]
        except (ValueError, KeyError, TypeError) as error:
            # Half of it would divide traffic as nobody asked for.
            logger.error("%s is not a list of rollouts and is not used: %s", self._file, error)
        else:
            self._entries = found

    def unset(self) -> list[dict[str, Any]]:
        """What the file says, hardly checked, that is to be set again."""
        return [entry for key, entry in self._entries.items() if key not in self._rollouts]

    def _write(self, entries: dict[AliasKey, dict[str, Any]]) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"rollouts": list(entries.values())}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._file)
        directory = os.open(self._file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _entry(key: AliasKey, rollout: Rollout) -> dict[str, Any]:
    shadow = rollout.shadow
    return {
        "adapter": key[0],
        "alias": key[1],
        "under": rollout.under,
        "shares": [
            {"version": share.version.number, "percent": share.percent} for share in rollout.shares
        ],
        "shadow": shadow and {"version": shadow.version.number, "percent": shadow.percent},
    }


def _numbers(entry: dict[str, Any]) -> list[int]:
    """The versions that what `_entry` made needs."""
    shadow = entry["shadow"]
    return [each["version"] for each in [*entry["shares"], *([shadow] if shadow else [])]]


def _bucket(purpose: str, key: AliasKey, sticky: str) -> int:
    text = "\0".join((purpose, *key, sticky)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % BUCKETS
