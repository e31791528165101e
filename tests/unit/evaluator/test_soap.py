"""The synthetic SOAP visits: repeatable, varied, labelled, and true to what is said."""

import json
import re
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from manylora_evaluator.scorer_settings import JsonFieldF1Settings, JsonSchemaSettings
from manylora_evaluator.scorers import make_scorer
from manylora_evaluator.suite import load_suite
from manylora_trainer.recipe import load_recipe
from tests.unit.evaluator.scorer_cases import row as plain_row

RECIPES = Path(__file__).parents[3] / "recipes/soap"
SECTIONS = ("subjective", "objective", "assessment", "plan")
VISITS = 400


@pytest.fixture(scope="module")
def soap() -> ModuleType:
    spec = spec_from_file_location("soap_dialogues", RECIPES / "dialogues.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def visits(soap: ModuleType) -> list[dict[str, Any]]:
    return list(islice(soap.dialogues(), VISITS))


def test_a_seed_makes_one_visit_and_another_another(soap: ModuleType) -> None:
    assert soap.visit(7) == soap.visit(7)
    assert len({soap.visit(seed)["dialogue"] for seed in range(200)}) == 200


def test_visits_are_varied_and_every_one_is_labelled_synthetic(
    visits: list[dict[str, Any]],
) -> None:
    assert all(visit["synthetic"].startswith("synthetic:") for visit in visits)
    assert len(Counter(visit["complaint"] for visit in visits)) == 10
    assert len(Counter(visit["noise"] for visit in visits)) == 5
    assert len({visit["assessment"]["diagnosis"] for visit in visits}) >= 20
    openings = Counter("\n".join(visit["dialogue"].split("\n")[:2]) for visit in visits)
    assert openings.most_common(1)[0][1] < VISITS / 20


def test_what_the_note_states_was_said(soap: ModuleType, visits: list[dict[str, Any]]) -> None:
    findings = {
        term: said
        for complaint in soap.COMPLAINTS
        for condition in complaint.conditions
        for term, said in condition.findings.items()
    }
    symptoms = {
        (complaint.name, term): words
        for complaint in soap.COMPLAINTS
        for term, words in complaint.symptoms.items()
    }
    for visit in visits:
        said = visit["dialogue"]
        subjective, objective, plan = visit["subjective"], visit["objective"], visit["plan"]
        literal = [
            subjective["duration"],
            subjective["severity"],
            *subjective["history"],
            *subjective["medications"],
            *subjective["allergies"],
            *(value for name, value in objective.items() if name != "findings"),
            *(findings[term] for term in objective["findings"]),
            *(
                symptoms[visit["complaint"], term]
                for term in subjective["symptoms"] + subjective["denied"]
            ),
            visit["assessment"]["diagnosis"],
            *plan["medications"],
            *plan["tests"],
            *plan["advice"],
            plan["follow_up"],
        ]
        assert [value for value in literal if str(value) not in said] == []


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
def test_what_was_said_is_in_the_note_and_as_it_was_said(soap: ModuleType, short: bool) -> None:
    terms = {
        (complaint.name, words): term
        for complaint in soap.COMPLAINTS
        for term, words in complaint.symptoms.items()
    }
    openings = {complaint.name: complaint.opening for complaint in soap.COMPLAINTS}
    yes = ("Yes, ", "I do, yes.", "A little, yes.")
    for seed in range(VISITS):
        visit = soap.visit(seed, short=short)
        note, said = visit["subjective"], visit["dialogue"].split("\n")
        fillers = "|".join(re.escape(filler) for filler in soap.FILLERS)
        answers = [re.sub(f"^Patient: (?:{fillers})?", "", line) for line in said]
        asked = {
            term: answers[index + 1].startswith(yes)
            for index, line in enumerate(said)
            for (complaint, words), term in terms.items()
            if complaint == visit["complaint"]
            if line.startswith("Doctor: ") and line.endswith(f" {words}?")
        }
        assert note["symptoms"] == sorted(term for term, has in asked.items() if has)
        if not short:
            assert note["denied"] == sorted(term for term, has in asked.items() if not has)
            bad = next(
                i for i, line in enumerate(said) if "zero to ten" in line or "of ten" in line
            )
            assert str(note["severity"]) in re.findall(r"\d+", said[bad + 1])
        told = next(answer for answer in answers if note["duration"] in answer)
        assert any(way.lower() in told.lower() for way in openings[visit["complaint"]])
        assert told.rindex(note["duration"]) >= max(m.start() for m in re.finditer(r"\d+", told))


@pytest.mark.parametrize("visits_of", ["dialogues", "short_dialogues"])
def test_hardly_a_dialogue_comes_twice(visits_of: str, soap: ModuleType) -> None:
    said = [visit["dialogue"] for visit in getattr(soap, visits_of)()]

    assert len(set(said)) > 0.99 * len(said)


@pytest.mark.parametrize("suite", ["suite.yaml", "cpu-suite.yaml"])
def test_the_suites_accept_the_truth(
    suite: str, soap: ModuleType, visits: list[dict[str, Any]]
) -> None:
    (task,) = load_suite(RECIPES / suite).tasks
    source = visits if suite == "suite.yaml" else list(islice(soap.short_dialogues(), VISITS))
    scorers = [
        made
        for settings in task.scorers
        if isinstance(settings, JsonFieldF1Settings | JsonSchemaSettings)
        if (made := make_scorer(settings, [])) is not None
    ]

    assert len(scorers) == 2
    for visit in source:
        note = plain_row(json.dumps({section: visit[section] for section in SECTIONS}))
        for scorer in scorers:
            shares = scorer.score(note.expected, note)
            assert all(s.hits == s.of for tallies in shares.values() for s in tallies), shares


@pytest.mark.parametrize("recipe", ["recipe.yaml", "cpu.yaml"])
def test_the_recipes_read_well(recipe: str) -> None:
    (task,) = load_recipe(RECIPES / recipe).tasks

    assert task.format.model_dump()["completion_json"] == SECTIONS
