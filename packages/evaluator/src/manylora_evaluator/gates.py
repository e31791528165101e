"""Decides between two versions, and whether one may go on.

    from manylora_evaluator import EvaluationResult, compare, gate

    result = EvaluationResult.from_json(Path("report/results.json").read_text())
    compare(result, "spelling@2", "spelling@1").verdict     # better, worse, not_distinguishable,
                                                            # too_few_rows
    gate(result, "spelling@2", "spelling@1").passed

Pure functions of results: nothing is asked and nothing is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from manylora_evaluator.bootstrap import by_prompt
from manylora_evaluator.errors import ResultsError
from manylora_evaluator.paired import holm, needed_rows, paired_test
from manylora_evaluator.results import Column, EvaluationResult, RowResult, TaskResult
from manylora_evaluator.suite import Decision
from manylora_evaluator.verdicts import (
    Comparison,
    Gate,
    PairedTest,
    RowDifference,
    ScoreComparison,
    Verdict,
)


@dataclass(frozen=True)
class _Answers:
    """One column of one task of one evaluation."""

    task: TaskResult
    index: int
    """Of the column."""

    @property
    def column(self) -> Column:
        """The column itself."""
        return self.task.columns[self.index]

    @cached_property
    def rows(self) -> Mapping[str, RowResult]:
        """By id."""
        return {row.id: row for row in self.task.rows}


def compare(
    results: EvaluationResult | Sequence[EvaluationResult],
    candidate: str,
    baseline: str,
    *,
    decision: Decision | None = None,
) -> Comparison:
    """Compares two versions on the rows both were asked, by each task's `compare` scores.

    Rows that ask the same are one in the tests, whatever they expect. Where the two were asked
    for answers of other lengths, the reason of each score says so.

    A score whose paired test is significant at `decision.alpha` (Holm's correction over all
    scores compared) is better or worse. One that is not is only called not distinguishable when
    the rows were enough to notice a difference of `decision.difference`; and nothing is decided
    on fewer than `decision.rows`.

    Args:
        results: one evaluation of both; or several, when each was evaluated by itself.
        candidate: reference as asked for, `NAME@NUMBER`, or the digest; empty: the bare base.
        baseline: the same.
        decision: bounds; None: those of the suite.

    Raises:
        ResultsError: no task has answers of both to the same row.
    """
    results = [results] if isinstance(results, EvaluationResult) else list(results)
    decision = decision or results[0].decision
    seed = results[0].seed
    new, old = _columns(results, candidate), _columns(results, baseline)
    tested = [
        (task, score, shared, _test(new[task], old[task], shared, score, seed))
        for task in new
        if task in old and (shared := _shared(new[task], old[task]))
        for score in new[task].task.compare
    ]
    if not tested:
        raise ResultsError(
            f"no task has answers of both {candidate or 'the bare base'} and "
            f"{baseline or 'the bare base'} to the same rows"
        )
    adjusted = holm([test.p_value for *_, test in tested])
    scores: list[ScoreComparison] = []
    for (task, score, shared, test), p_value in zip(tested, adjusted, strict=True):
        needed = needed_rows(test.deviation, decision, len(tested))
        verdict = _verdict(test, p_value, needed, decision)
        scores.append(
            ScoreComparison(
                task=task,
                score=score,
                verdict=verdict,
                reason=_reason(task, score, verdict, test, p_value, needed)
                + _asked_otherwise(new[task].task, old[task].task),
                test=test,
                adjusted_p=p_value,
                needed_rows=needed,
                regressions=_regressions(new[task], old[task], shared, score),
            )
        )
    return Comparison(candidate, baseline, _overall(scores), tuple(scores))


def gate(
    results: EvaluationResult | Sequence[EvaluationResult],
    candidate: str,
    baseline: str | None = None,
    *,
    decision: Decision | None = None,
) -> Gate:
    """Whether `candidate` met every threshold and is not worse, by answers that were all there.

    A failed request of either version closes the gate, as it counts as a wrong answer: a
    baseline that was not heard would be easy to beat. So does a judge of whose answers more
    held no verdict than `decision.difference`, which is what two versions may not differ by.

    Args:
        results: as for `compare`.
        candidate: as for `compare`.
        baseline: the version it must not be worse than; None: thresholds alone decide.
        decision: as for `compare`.

    Raises:
        ResultsError: `candidate` was not evaluated, or shares no row with `baseline`.
    """
    results = [results] if isinstance(results, EvaluationResult) else list(results)
    columns = _columns(results, candidate)
    if not columns:
        raise ResultsError(f"{candidate or 'the bare base'} was not evaluated")
    reasons = [*_failed(columns, "")]
    if baseline is not None:
        reasons += _failed(_columns(results, baseline), " of the baseline")
    reasons += _unheard(results, decision or results[0].decision)
    reasons += [
        f"{task}: {check.reason}"
        for task, answers in columns.items()
        for check in answers.column.thresholds
        if not check.passed
    ]
    comparison = None
    if baseline is not None:
        comparison = compare(results, candidate, baseline, decision=decision)
        if not comparison.not_worse:
            reasons += [
                entry.reason
                for entry in comparison.scores
                if entry.verdict in ("worse", "too_few_rows")
            ]
    return Gate(candidate, not reasons, tuple(reasons), comparison)


def _failed(columns: Mapping[str, _Answers], whose: str) -> Iterator[str]:
    for task, answers in columns.items():
        column = answers.column
        if column.failures:
            yield f"{task}: {column.failures} of {column.requests} requests{whose} failed"


def _unheard(results: Sequence[EvaluationResult], decision: Decision) -> Iterator[str]:
    unanswered = sum(result.judge_failures for result in results)
    if unanswered:
        yield f"the judge did not answer {unanswered} questions"
    for judge in (judge for result in results for judge in result.judges):
        asked, lost = judge.requests + judge.cached, judge.unreadable
        if lost > decision.difference * asked:
            yield f"{lost} of {asked} answers of the judge {judge.judge} held no verdict"


def _columns(results: Sequence[EvaluationResult], reference: str) -> dict[str, _Answers]:
    """The column of `reference` in each task that has one; of several evaluations the last."""
    return {
        task.task: _Answers(task, index)
        for result in results
        for task in result.tasks
        for index, column in enumerate(task.columns)
        if _is(column, reference)
    }


def _is(column: Column, reference: str) -> bool:
    if column.adapter == reference:
        return True
    version = column.version
    return version is not None and reference in (
        version.digest,
        f"{version.name}@{version.number}",
        f"{version.name}@{version.digest}",
    )


def _shared(new: _Answers, old: _Answers) -> list[str]:
    return [row for row in old.rows if row in new.rows]


def _test(new: _Answers, old: _Answers, shared: Sequence[str], score: str, seed: int) -> PairedTest:
    columns = [
        [answers.rows[row].outputs[answers.index].tallies for row in shared]
        for answers in (old, new)
    ]
    if not all(score in tallies for column in columns for tallies in column):
        raise ResultsError(f"task {new.task.task!r} was not scored by {score!r} in both")
    prompts = [new.rows[row].messages for row in shared]
    before, after = (
        by_prompt(prompts, [tallies[score] for tallies in column]) for column in columns
    )
    return paired_test(before, after, seed)


def _verdict(test: PairedTest, p_value: float, needed: int, decision: Decision) -> Verdict:
    if test.rows < decision.rows:
        return "too_few_rows"
    if p_value < decision.alpha:
        return "better" if test.difference > 0 else "worse"
    return "too_few_rows" if test.rows < needed else "not_distinguishable"


def _reason(
    task: str, score: str, verdict: Verdict, test: PairedTest, p_value: float, needed: int
) -> str:
    moved = (
        f"{test.baseline:.3f} -> {test.candidate:.3f} ({test.difference:+.3f}, 95 % "
        f"{test.low:+.3f} to {test.high:+.3f}, p {p_value:.3g}, {test.rows} rows)"
    )
    said = {
        "better": "is better",
        "worse": "is worse",
        "not_distinguishable": "cannot be told apart",
        "too_few_rows": f"cannot be decided: not enough rows, {needed} are needed",
    }
    return f"{task}: {score} {said[verdict]}: {moved}"


def _asked_otherwise(new: TaskResult, old: TaskResult) -> str:
    """What beside the version made answers differ, of two evaluations."""
    limits = new.max_tokens, old.max_tokens
    if None in limits or limits[0] == limits[1]:
        return ""
    return (
        f"; but they were not asked alike: at most {limits[0]} tokens an answer, and the baseline "
        f"{limits[1]}"
    )


def _overall(scores: Sequence[ScoreComparison]) -> Verdict:
    found = {entry.verdict for entry in scores}
    order: tuple[Verdict, ...] = ("worse", "too_few_rows", "better", "not_distinguishable")
    return next(verdict for verdict in order if verdict in found)


def _regressions(
    new: _Answers, old: _Answers, shared: Sequence[str], score: str
) -> tuple[RowDifference, ...]:
    lost: list[RowDifference] = []
    after, before = new.rows, old.rows
    for row in shared:
        one, other = before[row].outputs[old.index], after[row].outputs[new.index]
        was, became = one.scores[score] or 0.0, other.scores[score] or 0.0
        if became < was:
            prompt = after[row].messages[-1].content
            lost.append(
                RowDifference(row, prompt, after[row].expected, one.text, other.text, was, became)
            )
    return tuple(sorted(lost, key=lambda entry: entry.candidate_score - entry.baseline_score))
