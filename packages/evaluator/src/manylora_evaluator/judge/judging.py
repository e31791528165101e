"""Judges every answer of a task."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from manylora_evaluator.asking import Replies, in_parallel
from manylora_evaluator.errors import NoVerdictError
from manylora_evaluator.judge import verdict
from manylora_evaluator.judge.agreement import agreement
from manylora_evaluator.judge.caller import Caller
from manylora_evaluator.judge.labels import LabelledAnswer
from manylora_evaluator.judge.verdict import majority
from manylora_evaluator.judgements import Agreement, Judgement
from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import JudgeSettings, PairwiseSettings
from manylora_evaluator.scorers.json_answers import parse
from manylora_evaluator.scorers.tally import Tallies, Tally

Judgements: TypeAlias = Mapping[str, Judgement]
"""Of one answer, by the score's name."""

Item = TypeVar("Item")

EXPECTED = "expected"


@dataclass(frozen=True)
class Judge:
    """One judge scorer of a task, with whom it asks."""

    settings: JudgeSettings | PairwiseSettings
    caller: Caller
    advance: Callable[[], None]
    """Called after each answer."""

    async def column(
        self, rows: Sequence[Row], columns: Sequence[Replies], index: int
    ) -> list[Judgements]:
        """The judgements on every answer of one column."""
        settings = self.settings
        if isinstance(settings, PairwiseSettings):
            return await self._each(_pairs(settings, rows, columns, index), self._prefer)
        answers = [
            (row, None if reply.error else reply.text)
            for row, reply in zip(rows, columns[index].replies, strict=True)
        ]
        return await self._each(answers, self._pass)

    async def labelled(self, answers: Sequence[LabelledAnswer], seed: int) -> list[Agreement]:
        """How far the judge agrees with the labels, by criterion."""
        if not isinstance(self.settings, JudgeSettings) or not answers:
            return []
        judged = await self._each([(entry.row, entry.answer) for entry in answers], self._pass)
        found: list[Agreement] = []
        for name in self.settings.criteria:
            score = f"{self.settings.name}.{name}"
            pairs = [
                (judgements[score].share == 1, entry.labels[name])
                for entry, judgements in zip(answers, judged, strict=True)
                if name in entry.labels and judgements[score].error is None
            ]
            if pairs:
                found.append(agreement(score, "labels", pairs, seed))
        return found

    async def _each(
        self, items: Sequence[Item], judge: Callable[[Item], Awaitable[Judgements]]
    ) -> list[Judgements]:
        async def judged(item: Item) -> Judgements:
            try:
                return await judge(item)
            finally:
                self.advance()

        # The caller bounds the requests; more workers would only wait there.
        return await in_parallel(items, judged, self.caller.concurrency)

    async def _pass(self, item: tuple[Row, str | None]) -> Judgements:
        """Passes or fails one answer on every criterion."""
        settings = cast("JudgeSettings", self.settings)
        row, answer = item
        expected = row.expected if settings.reference and row.expected else None
        if answer is not None and settings.section is not None:
            answer = section_of(answer, settings.section)
            expected = None if expected is None else section_of(expected, settings.section)
        if answer is None:
            missing = "there is no answer" if settings.section is None else "has no such section"
            return _named(
                settings, dict.fromkeys(settings.criteria, Judgement(0, missing, 0, 0, 0))
            )
        chat = verdict.criteria_chat(row, answer, expected, settings.criteria)
        schema = verdict.criteria_schema(settings.criteria)

        def readable(reply: str) -> bool:
            opinions = verdict.read_criteria(reply, settings.criteria)
            return all(opinion.readable for opinion in opinions.values())

        try:
            replies = await asyncio.gather(
                *(
                    self.caller.ask(chat, schema, sample, readable)
                    for sample in range(settings.samples)
                )
            )
        except NoVerdictError as error:
            unheard = Judgement(0, "", 0, 0, 0, str(error))
            return _named(settings, dict.fromkeys(settings.criteria, unheard))
        read = [verdict.read_criteria(reply, settings.criteria) for reply in replies]
        self.caller.counts.unreadable += sum(not readable(reply) for reply in replies)
        return _named(
            settings, {name: _decided([one[name] for one in read]) for name in settings.criteria}
        )

    async def _prefer(self, item: tuple[Row, str | None, str | None]) -> Judgements:
        """Sets one answer against another, in both orders; a change of mind is a tie."""
        settings = cast("PairwiseSettings", self.settings)
        row, answer, other = item
        if answer is None or other is None or answer == other:
            # Nobody wins by a request of the other's that failed.
            share = 0.5 if answer == other else 0.0
            return {settings.name: Judgement(share, "not asked", 0, 0, 0)}
        reference = row.expected if settings.reference and row.expected else None
        orders = (
            verdict.pair_chat(row, answer, other, reference, settings.question),
            verdict.pair_chat(row, other, answer, reference, settings.question),
        )
        try:
            replies = await asyncio.gather(
                *(
                    self.caller.ask(chat, verdict.PAIR_SCHEMA, sample, _has_winner)
                    for sample in range(settings.samples)
                    for chat in orders
                )
            )
        except NoVerdictError as error:
            return {settings.name: Judgement(0, "", 0, 0, 0, str(error))}
        read = [verdict.read_pair(reply) for reply in replies]
        unreadable = sum(preference is None for preference, _ in read)
        self.caller.counts.unreadable += unreadable
        shares = [
            _swapped(first, second)
            for (first, _), (second, _) in zip(read[::2], read[1::2], strict=True)
        ]
        share = 1.0 if majority([s == 1 for s in shares]) else 0.5
        share = 0.0 if majority([s == 0 for s in shares]) else share
        reason = next(
            (reason for s, (_, reason) in zip(shares, read[::2], strict=True) if s == share),
            "the samples disagree",
        )
        return {
            settings.name: Judgement(share, reason, shares.count(1.0), settings.samples, unreadable)
        }


def _has_winner(reply: str) -> bool:
    return verdict.read_pair(reply)[0] is not None


def tallies_of(judgements: Judgements) -> Mapping[str, Tallies]:
    """The row's share of each score."""
    return {name: (Tally(judgement.share, 1),) for name, judgement in judgements.items()}


def section_of(text: str, section: str) -> str | None:
    """The top-level key `section` of the JSON object `text`, as JSON; None where it has none."""
    value = parse(text)
    if not isinstance(value, dict) or section not in value:
        return None
    return json.dumps(cast("dict[str, Any]", value)[section], ensure_ascii=False)


def _pairs(
    settings: PairwiseSettings, rows: Sequence[Row], columns: Sequence[Replies], index: int
) -> list[tuple[Row, str | None, str | None]]:
    """Each row with the column's answer and the one it is set against; None: no answer."""
    answers = [None if reply.error else reply.text for reply in columns[index].replies]
    if settings.against == EXPECTED:
        others: list[str | None] = [row.expected for row in rows]
    else:
        opponent = next(column for column in columns if column.reference == settings.against)
        others = [None if reply.error else reply.text for reply in opponent.replies]
    return list(zip(rows, answers, others, strict=True))


def _named(settings: JudgeSettings, by_criterion: Mapping[str, Judgement]) -> Judgements:
    """The judgements by score, the chief one first: it passes when all criteria do."""
    each = list(by_criterion.values())
    failed = [f"{name}: {one.reason}" for name, one in by_criterion.items() if one.share != 1]
    chief = Judgement(
        share=float(not failed),
        reason="; ".join(failed),
        votes=min(one.votes for one in each),
        samples=each[0].samples,
        unreadable=max(one.unreadable for one in each),
        error=each[0].error,
    )
    named = {f"{settings.name}.{name}": one for name, one in by_criterion.items()}
    return {settings.name: chief} | named


def _decided(opinions: Sequence[verdict.Opinion]) -> Judgement:
    passed = majority([opinion.passed for opinion in opinions])
    reasons = [opinion.reason for opinion in opinions if opinion.passed == passed]
    return Judgement(
        share=float(passed),
        reason=reasons[-1] if reasons else "",
        votes=sum(opinion.passed for opinion in opinions),
        samples=len(opinions),
        unreadable=sum(not opinion.readable for opinion in opinions),
    )


def _swapped(first: verdict.Preference | None, second: verdict.Preference | None) -> float:
    """The share of an answer that stood first in one question and second in the other."""
    if first is None or second is None:
        return 0.0
    wins = [first == "first", second == "second"]
    losses = [first == "second", second == "first"]
    return 1.0 if all(wins) else 0.0 if all(losses) else 0.5
