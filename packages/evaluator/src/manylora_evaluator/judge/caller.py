"""Asks a judge: cached, bounded, retried, and counted."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manylora_evaluator.errors import AttemptError, JudgeRefusesError, NoVerdictError
from manylora_evaluator.judge.cache import Cache
from manylora_evaluator.judge.model import Chat, Completion, Model
from manylora_evaluator.judge_settings import JudgeModel
from manylora_evaluator.judgements import JudgeUsage
from manylora_evaluator.kept import content_key

LONGEST_WAIT_S = 60.0
LOG = logging.getLogger(__name__)


@dataclass
class Counts:
    """What was spent."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    failures: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: list[float] = field(default_factory=list[float])

    def spend(self, completion: Completion) -> None:
        """Counts what an answer took."""
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens


class Caller:
    """One judge for one evaluation. The same question is asked once, even while under way."""

    def __init__(
        self, settings: JudgeModel, model: Model, kept: Cache | None, asked_before: set[str]
    ) -> None:
        """Prepares to ask `model`.

        Verdicts are `kept` where the settings name no cache. The keys in `asked_before` are what
        the evaluation asked before it was broken off; who counts one takes it out.

        Raises:
            JudgeError: the directory of its cache cannot be written.
        """
        self._settings = settings
        self._model = model
        self._cache = kept if settings.cache is None else Cache(settings.cache)
        self._asked_before = asked_before if settings.cache is None else set[str]()
        self._free = asyncio.Semaphore(settings.concurrency)
        self._asked: dict[str, asyncio.Task[Completion]] = {}
        self.concurrency = settings.concurrency
        self.counts = Counts()

    async def ask(
        self, chat: Chat, schema: Mapping[str, Any], sample: int, readable: Callable[[str], bool]
    ) -> str:
        """The judge's words; only those that are `readable` are kept for other evaluations.

        Raises:
            NoVerdictError: there are none.
            JudgeRefusesError: nor will there be any; nothing was answered before.
        """
        key = content_key(
            {
                "model": self._model.identity,
                "chat": list(chat),
                "schema": schema,
                "max_tokens": self._settings.max_tokens,
                "temperature": self._settings.temperature,
                "response_format": self._settings.response_format,
                "sample": sample,
            }
        )
        if key in self._asked:
            self.counts.cached += 1
        else:
            self._asked[key] = asyncio.create_task(
                self._complete(key, chat, schema, sample, readable)
            )
        return (await self._asked[key]).text

    async def _complete(
        self,
        key: str,
        chat: Chat,
        schema: Mapping[str, Any],
        sample: int,
        readable: Callable[[str], bool],
    ) -> Completion:
        kept = None if self._cache is None else self._cache.get(key)
        if kept is not None and readable(kept.text):
            if key in self._asked_before:
                # A second judge of the same settings would have had it cached.
                self._asked_before.remove(key)
                self.counts.requests += 1
                self.counts.spend(kept)
            else:
                self.counts.cached += 1
            return kept
        async with self._free:
            completion = await self._attempts(chat, schema, sample)
        if self._cache is not None and readable(completion.text):
            try:
                self._cache.put(key, completion)
            except OSError as error:
                # The verdict is there and paid for; only the next evaluation will ask again.
                LOG.warning("the judge's verdicts are no longer kept: %s", error)
                self._cache = None
        return completion

    async def _attempts(self, chat: Chat, schema: Mapping[str, Any], sample: int) -> Completion:
        self.counts.requests += 1
        wait = self._settings.backoff_s
        for left in range(self._settings.retries, -1, -1):
            begun = time.monotonic()
            try:
                completion = await self._model.complete(chat, schema, sample)
            except AttemptError as error:
                if not error.again or left == 0:
                    if error.refused and not self.counts.seconds:
                        raise JudgeRefusesError(
                            f"the judge {self._model.identity} answers nothing: {error}"
                        ) from error
                    self.counts.failures += 1
                    raise NoVerdictError(str(error)) from error
                self.counts.retries += 1
                await asyncio.sleep(min(LONGEST_WAIT_S, max(wait, error.after or 0)))
                wait *= 2
            else:
                self.counts.seconds.append(time.monotonic() - begun)
                self.counts.spend(completion)
                return completion
        raise AssertionError("the last attempt returns or raises")

    def usage(self, name: str) -> JudgeUsage:
        """What was spent so far."""
        counts = self.counts
        p50, p95 = np.quantile(counts.seconds or [0.0], [0.5, 0.95])
        spent = (
            counts.prompt_tokens * self._settings.prompt_price
            + counts.completion_tokens * self._settings.completion_price
        )
        return JudgeUsage(
            judge=name,
            model=self._model.identity,
            requests=counts.requests,
            cached=counts.cached,
            retries=counts.retries,
            failures=counts.failures,
            unreadable=counts.unreadable,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            cost=spent / 1_000_000,
            latency_p50=float(p50),
            latency_p95=float(p95),
        )
