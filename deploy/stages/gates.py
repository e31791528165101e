"""The gates of a stage, asked through the gateway a version comes from."""

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deploy.stages.checks import servable
from deploy.stages.errors import SettingsError
from deploy.stages.gate_settings import SuiteGate
from deploy.stages.hosting import Running
from deploy.stages.journal import Promotion
from deploy.stages.load import Prompts, send
from deploy.stages.settings import GATES_FILE, Stage
from deploy.stages.work import Work
from manylora_evaluator import EvaluationFailedError, EvaluationResult, Gate, evaluate, gate
from manylora_evaluator.errors import ResultsError
from manylora_evaluator.records import record, record_name
from manylora_evaluator.scorer_settings import JudgeSettings, SqlSettings
from manylora_evaluator.scoring import check, prepare
from manylora_evaluator.suite import Suite, load_suite
from manylora_registry import Registry, Version
from manylora_registry.blobs import hash_file
from manylora_registry.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What is to enter where, and through which gateway it is asked."""

    registry: Registry
    source: Stage
    target: Stage
    through: Running
    """The source's gateway."""
    version: Version
    present: Version | None
    """The target's version now."""
    reports: Path
    """Directory for what the suites found."""


def closed(asked: Asked, work: Work) -> list[str]:
    """Why the gates of the target are closed to the version; empty: they are open.

    Every suite and the smoke load are asked, whatever those before them said. What a suite found
    is kept on the version.

    Raises:
        EvaluatorError: rows cannot be read, or a threshold names no score; nothing is asked.
        CheckError: it does not fit the target, or is not signed; nothing is asked.
        StatusError: the gateway it comes from is away.
    """
    version, gates = asked.version, asked.target.gates
    what = f"{version.name}@{version.number}"
    servable(asked.registry, asked.target, what)
    reasons: list[str] = []
    tasks = [
        (entry, suite)
        for entry in gates.suites
        if tasks_of(suite := load_suite(entry.path), version.name)
    ]
    for entry, suite in tasks:
        _prepare(entry, suite, version.name)
    if gates.smoke is not None or gates.prompts is not None:
        Prompts(asked.target, version.name)
    if gates.suites and not tasks:
        reasons.append(f"no suite of {asked.target.name} has a task for {version.name}")
    for entry, suite in tasks:
        work.say(f"asking {suite.name} of {what}{_beside(asked)} through {asked.source.name}")
        reasons += _suite(asked, entry, suite)
    if gates.smoke is not None:
        work.say(f"sending {gates.smoke.requests} requests to {what} on {asked.source.name}")
        reasons += _smoke(asked)
    return reasons


def check_files(target: Stage) -> None:
    """Looks at what gates.yaml names, as far as can be told without reading rows.

    Only when a version is to enter: a rollback needs none of it.

    Raises:
        SettingsError: with every mistake.
    """
    gates, file = target.gates, target.directory / GATES_FILE
    problems = [
        f"{file}: {field}: {path} is no file"
        for field, path in (
            *((f"signatures.{place}", key) for place, key in enumerate(gates.signatures)),
            *(() if gates.prompts is None else (("prompts", gates.prompts),)),
        )
        if not path.is_file()
    ]
    recorded: dict[tuple[str, str], Path] = {}
    for place, entry in enumerate(gates.suites):
        try:
            suite = load_suite(entry.path)
            name = record_name(suite.name)
        except (ConfigError, ResultsError) as error:
            problems.append(str(error))
            continue
        # The later record of a version would be the one that counts, with the later report.
        for adapter in sorted({task.adapter.partition("@")[0] for task in suite.tasks}):
            other = recorded.setdefault((adapter, name), entry.path)
            if other is not entry.path:
                problems.append(
                    f"{file}: suites.{place}.path: {entry.path} records {adapter} as {name!r}, "
                    f"as {other} does: give one of them another name"
                )
        known = [task.name for task in suite.tasks]
        problems += [
            f"{file}: suites.{place}.thresholds: {entry.path} has no task {name!r}; it has "
            + ", ".join(known)
            for name in entry.thresholds
            if name not in known
        ]
    if problems:
        raise SettingsError(problems)


def _prepare(entry: SuiteGate, suite: Suite, name: str) -> None:
    """Reads the rows, and sees that every threshold names a score."""
    names = tasks_of(suite, name)
    for task in suite.tasks:
        if task.name in names:
            more = (*task.thresholds, *entry.thresholds.get(task.name, ()))
            prepare(task.model_copy(update={"thresholds": more}), entry.limit)


def planned(asked: Asked) -> Iterator[str]:
    """What `closed` would ask."""
    gates, name = asked.target.gates, asked.version.name
    check_files(asked.target)
    for entry in gates.suites:
        suite = load_suite(entry.path)
        for task in tasks_of(suite, name):
            yield f"ask {suite.name}/{task}{_beside(asked)} through {asked.source.name}"
    if gates.smoke is not None:
        yield f"send {gates.smoke.requests} requests through {asked.source.name}"


def still_open(promotion: Promotion, target: Stage, name: str) -> bool:
    """Whether gates that were passed count on: the same ones, and not too long ago.

    Raises:
        SettingsError: files that gates.yaml names are not there or have mistakes.
    """
    age_h = (time.time() - promotion.passed_at) / 3600
    # A moment to come is one of a clock that was wrong, and says nothing.
    if not promotion.gates or not 0 <= age_h <= target.gates.evidence_hours:
        return False
    return promotion.gates == fingerprint(target, name)


def fingerprint(target: Stage, name: str) -> str:
    """Of the gates as they are now, with every file that their answer about an adapter depends on.

    Raises:
        SettingsError: files that gates.yaml names are not there or have mistakes.
    """
    check_files(target)
    gates = target.gates
    content = gates.model_dump_json(exclude={"canary", "approval", "evidence_hours"})
    found = hashlib.sha256(content.encode())
    for file in _files(target, name):
        # What is not there is told when the gates are asked.
        found.update(hash_file(file).encode() if file.is_file() else b"-")
    return found.hexdigest()


def _files(target: Stage, name: str) -> Iterator[Path]:
    """Every file that the answer of the gates depends on."""
    yield from target.gates.signatures
    if target.gates.prompts is not None:
        yield target.gates.prompts
    for entry in target.gates.suites:
        yield entry.path
        suite = load_suite(entry.path)
        for task in suite.tasks:
            if task.name in tasks_of(suite, name):
                yield task.rows.file
                for scorer in task.scorers:
                    if isinstance(scorer, SqlSettings):
                        yield scorer.fixture
                    elif isinstance(scorer, JudgeSettings) and scorer.labels is not None:
                        yield scorer.labels


def tasks_of(suite: Suite, name: str) -> list[str]:
    """The tasks of a suite that are about an adapter."""
    return [task.name for task in suite.tasks if task.adapter.partition("@")[0] == name]


def _beside(asked: Asked) -> str:
    here = asked.present is not None and asked.target.gates.not_worse
    return f" beside version {asked.present.number}" if here and asked.present else ""


def _suite(asked: Asked, entry: SuiteGate, suite: Suite) -> list[str]:
    version, gates = asked.version, asked.target.gates
    candidate = f"{version.name}@{version.number}"
    baseline = None
    if asked.present is not None and gates.not_worse:
        baseline = f"{version.name}@{asked.present.number}"
    out = asked.reports / record_name(suite.name)
    try:
        result = evaluate(
            entry.path,
            asked.through.inference,
            [candidate],
            out,
            tasks=tasks_of(suite, version.name),
            limit=entry.limit,
            baseline=baseline,
            only=True,
            token=asked.source.token,
            console=Console(stderr=True, quiet=not sys.stderr.isatty()),
        )
    except EvaluationFailedError as error:
        result = error.result
    decided = _decide(result, candidate, baseline, entry, asked.target)
    record(replace(result, gates=(decided,)), asked.registry)
    return [f"{suite.name}: {reason} (report: {out / 'report.html'})" for reason in decided.reasons]


def _decide(
    result: EvaluationResult, candidate: str, baseline: str | None, entry: SuiteGate, target: Stage
) -> Gate:
    decided = gate(result, candidate, baseline, decision=target.gates.decision)
    more = [
        f"{task.task}: {checked.reason}"
        for task in result.tasks
        for threshold in entry.thresholds.get(task.task, ())
        if not (
            checked := check(threshold, result.score(task.task, candidate, threshold.score))
        ).passed
    ]
    reasons = (*decided.reasons, *more)
    return replace(decided, passed=not reasons, reasons=reasons)


def _smoke(asked: Asked) -> list[str]:
    smoke, gates = asked.target.gates.smoke, asked.target.gates
    assert smoke is not None
    reference = f"{asked.version.name}@{asked.version.number}"
    prompts = Prompts(asked.target, asked.version.name).take(smoke.requests)
    load = send(
        asked.through,
        asked.source.token,
        [(reference, prompt) for prompt in prompts],
        concurrency=smoke.concurrency,
        timeout_s=smoke.timeout_s,
        max_tokens=gates.max_tokens,
    )
    return load.broken(smoke)
