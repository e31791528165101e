"""Sequences of everything a registry does, against a model in a few dictionaries."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from manylora_registry import Registry
from manylora_registry.errors import (
    DeletedError,
    NotFoundError,
    VersionInUseError,
    YankedError,
)
from tests.integration.registry.conftest import BASE, write_adapter

SEEDS = st.integers(0, 3)
NUMBERS = st.integers(1, 4)
ALIASES = st.sampled_from(["production", "staging"])
NOW = timedelta(0)


class RegistryModel(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self._directory = tempfile.TemporaryDirectory()
        self.place = Path(self._directory.name)
        self.registry = Registry.open(self.place / "registry")
        self.adapters = {seed: write_adapter(self.place / f"a{seed}", seed) for seed in range(4)}
        self.seeds: list[int] = []
        self.aliases: dict[str, tuple[int, int]] = {}
        self.ways: dict[str, list[int]] = {}
        """Where each alias came by."""
        self.went_back: set[str] = set()
        self.moves = 0
        self.parents: dict[int, int] = {}
        self.yanked: set[int] = set()
        self.deleted: set[int] = set()
        self.collected: set[int] = set()
        self.leases: dict[int, list] = {}

    def teardown(self):
        if hasattr(self, "registry"):
            self.registry.close()
            self._directory.cleanup()

    @rule(seed=SEEDS, parent=st.none() | NUMBERS)
    def publish(self, seed, parent):
        known = seed in self.seeds
        reference = None if parent is None else f"a@{parent}"

        def publish():
            return self.registry.publish("a", self.adapters[seed], base=BASE, parent=reference)

        if parent is not None and parent > len(self.seeds):
            with pytest.raises(NotFoundError):
                publish()
            return
        number = publish().number
        if known:
            assert number == self.seeds.index(seed) + 1
            self.deleted.discard(number)
            self.collected.discard(number)
        else:
            self.seeds.append(seed)
            assert number == len(self.seeds)
            if parent is not None:
                self.parents[number] = parent

    @rule(alias=ALIASES, number=NUMBERS)
    def move(self, alias, number):
        generation = self.aliases.get(alias, (0, 0))[1]

        def move():
            return self.registry.set_alias("a", alias, number, expect=generation)

        if number > len(self.seeds):
            with pytest.raises(NotFoundError):
                move()
        elif number in self.deleted | self.yanked:
            with pytest.raises(YankedError):
                move()
        else:
            assert move().generation == generation + 1
            self.aliases[alias] = (number, generation + 1)
            self.moves += 1
            way = self.ways.setdefault(alias, [])
            if number not in way:
                way.append(number)
                self.went_back.discard(alias)
            elif way[-1] != number:
                del way[way.index(number) + 1 :]
                self.went_back.add(alias)

    @rule(alias=ALIASES)
    def rollback(self, alias):
        before = self.before(alias)
        if before is None:
            with pytest.raises(NotFoundError):
                self.registry.rollback("a", alias)
        else:
            assert self.registry.rollback("a", alias).version == before
            self.aliases[alias] = (before, self.aliases[alias][1] + 1)
            self.moves += 1
            way = self.ways[alias]
            del way[way.index(before) + 1 :]
            self.went_back.add(alias)

    def before(self, alias):
        """Where a rollback goes."""
        *earlier, present = self.ways.get(alias, [None])
        gone = self.yanked | self.deleted
        if alias in self.went_back and present not in gone:
            return None
        return next((number for number in reversed(earlier) if number not in gone), None)

    @rule(number=NUMBERS)
    def yank(self, number):
        if number <= len(self.seeds):
            self.registry.yank(f"a@{number}")
            self.yanked.add(number)

    @rule(number=NUMBERS)
    def delete(self, number):
        if number > len(self.seeds):
            return
        back = {self.before(alias) for alias in self.aliases}
        if number in {at for at, _ in self.aliases.values()} | back:
            with pytest.raises(VersionInUseError):
                self.registry.delete(f"a@{number}")
        else:
            self.registry.delete(f"a@{number}")
            self.deleted.add(number)

    @rule(number=NUMBERS)
    def lease(self, number):
        if number > len(self.seeds):
            return
        if number in self.collected:
            with pytest.raises(DeletedError):
                self.registry.lease(f"a@{number}")
        else:
            self.leases.setdefault(number, []).append(self.registry.lease(f"a@{number}"))

    @rule(number=NUMBERS)
    def release(self, number):
        for lease in self.leases.pop(number, []):
            lease.release()

    @rule()
    def collect(self):
        report = self.registry.collect_garbage(grace=NOW)
        now = set()
        for number in sorted(self.deleted - self.collected, reverse=True):
            children = {child for child, parent in self.parents.items() if parent == number}
            if number not in self.leases and children <= self.collected | now:
                now.add(number)
        self.collected |= now
        assert set(report.collected) == {f"a@{number}" for number in now}
        assert self.registry.verify().unreferenced == ()

    @rule()
    def open_again(self):
        self.registry.close()
        self.registry = Registry.open(self.place / "registry")
        for number in self.leases:
            self.leases[number] = [self.registry.lease(f"a@{number}")]

    @invariant()
    def agrees(self):
        if not self.seeds:
            return
        assert self.registry.verify().problems == ()
        versions = self.registry.versions("a")
        assert [
            (version.number, version.yanked, version.deleted, version.collected)
            for version in versions
        ] == [
            (number, number in self.yanked, number in self.deleted, number in self.collected)
            for number in range(1, len(self.seeds) + 1)
        ]
        assert {
            alias: (at.version, at.generation) for alias, at in self.registry.aliases("a").items()
        } == self.aliases
        assert len(self.registry.history("a")) == self.moves
        for version in versions:
            if not version.collected:
                self.registry.materialize(version, self.place / "cache")


TestRegistryModel = RegistryModel.TestCase
TestRegistryModel.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
