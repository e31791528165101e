"""A script, killed before and after each of its effects and run again, ends as if it had not been.

One client asks production all the while, and nothing of it may fail.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.integration.deploy.conftest import World
from tests.integration.deploy.scripts import Ended

MOST_MOMENTS = 100


@pytest.fixture(autouse=True)
def quick_gates(world: World) -> Iterator[None]:
    """Two steps and no suite: each promotion is gone through dozens of times."""
    for gateway in world.gateways.values():
        gateway.engine.broken.clear()
    world.failures.clear()
    yield
    world.gates(canary={"steps": [10, 50, 100], "window_s": 0.05, "look_s": 0.02, "requests": 3})


def quick(world: World, versions: int = 2) -> str:
    """A new adapter, and gates that are quick."""
    name = world.adapter(versions)
    world.gates(
        suites=[],
        smoke=None,
        canary={"steps": [50, 100], "window_s": 0.01, "look_s": 0.01, "requests": 2},
    )
    return name


def killed_everywhere(
    world: World,
    prepare: Callable[[], str],
    arguments: Callable[[str], tuple[str, ...]],
    check: Callable[[str, Ended], None],
) -> int:
    """Kills a script at each moment, each time on a new adapter; how many there were."""
    for moment in range(MOST_MOMENTS):
        name = prepare()
        with world.client(name):
            first = world.scripts.run(*arguments(name), kill=moment)
            ended = world.scripts.run(*arguments(name)) if first.killed else first
        check(name, ended)
        assert not (world.stages / f"production/state/promotions/{name}.json").exists()
        if not first.killed:
            # It came to no such moment.
            return moment
    raise AssertionError("there is no end of moments")


def test_a_rollback(world: World) -> None:
    def prepare() -> str:
        name = quick(world)
        world.registry.set_alias(name, "production", 2)
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        assert [move.version for move in world.registry.history(name)] == [1, 2, 1]
        assert world.outcomes(name, "rollback") == [("alias", "done")]

    arguments = ("--stage", "production")
    assert killed_everywhere(world, prepare, lambda name: ("rollback", name, *arguments), check) > 8
