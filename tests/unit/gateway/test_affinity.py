"""Where a request goes."""

from collections import Counter

import pytest

from manylora_gateway.affinity import BOUND, ranked


@pytest.mark.parametrize("replicas", [2, 5, 16])
def test_adapters_stay_home_and_spread_evenly(replicas: int) -> None:
    loads = {f"replica-{index}": 0 for index in range(replicas)}
    homes = {f"adapter-{index}": ranked(f"adapter-{index}", loads)[0] for index in range(1000)}
    counts = Counter(homes.values())
    assert len(counts) == replicas
    assert max(counts.values()) < 2 * 1000 / replicas
    # One that goes moves its own adapters and nobody else's.
    gone, *_ = loads
    del loads[gone]
    for adapter, home in homes.items():
        if home != gone:
            assert ranked(adapter, loads)[0] == home


def test_a_hot_adapter_spreads_within_the_bound() -> None:
    loads: dict[str, int] = dict.fromkeys("abcd", 0)
    for _ in range(100):
        loads[ranked("hot", loads)[0]] += 1
        assert max(loads.values()) <= BOUND * sum(loads.values()) / len(loads) + 1
    assert ranked("hot", loads) == ranked("hot", dict(loads))


def test_the_base_goes_to_the_least_busy() -> None:
    assert ranked(None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
