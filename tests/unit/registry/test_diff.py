import numpy as np
import pytest

from tests.unit.registry.conftest import plain_tensors

MODULES = ("model.layers.0.q_proj", "model.layers.0.up_proj")


def update(tensors, module, scaling):
    prefix = f"base_model.model.{module}"
    factors = [tensors[f"{prefix}.lora_{side}.weight"].astype(np.float64) for side in "BA"]
    return scaling * factors[0] @ factors[1]


@pytest.fixture
def publish(registry, base, make_adapter):
    def published(*args, **kwargs):
        description = {
            key: kwargs.pop(key) for key in ("metrics", "tags", "lineage") if key in kwargs
        }
        return registry.publish("spelling", make_adapter(*args, **kwargs), base=base, **description)

    return published


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_norms_are_those_of_the_whole_products(registry, publish, dtype):
    tensors = [
        {name: values.astype(dtype) for name, values in plain_tensors(seed).items()}
        for seed in (1, 2)
    ]
    one = publish(tensors=tensors[0])
    two = publish(
        tensors=tensors[1], config={"alpha_pattern": {"q_proj": 6}, "use_rslora": True, "r": 2}
    )

    found = registry.diff(one, two)

    assert [change.module for change in found.modules] == [*MODULES]
    scalings = {MODULES[0]: 6 / np.sqrt(2), MODULES[1]: 4 / np.sqrt(2)}
    for change in found.modules:
        before = update(tensors[0], change.module, 4 / 2)
        after = update(tensors[1], change.module, scalings[change.module])
        assert change.before == pytest.approx(np.linalg.norm(before), rel=1e-9)
        assert change.after == pytest.approx(np.linalg.norm(after), rel=1e-9)
        assert change.change == pytest.approx(np.linalg.norm(after - before), rel=1e-9)
        assert change.relative == pytest.approx(change.change / change.before)


def test_the_same_weights_did_not_move(registry, publish):
    one = publish(3)
    two = publish(3, card="# another card")

    assert {change.change for change in registry.diff(one, two).modules} == {0.0}


def test_the_same_product_of_other_factors_hardly_moved(registry, publish):
    tensors = plain_tensors(1)
    one = publish(tensors=tensors)
    two = publish(
        tensors={
            name: values * (4.0 if "lora_A" in name else 0.25) for name, values in tensors.items()
        }
    )

    for change in registry.diff(one, two).modules:
        assert change.change is not None
        assert change.change < 1e-6 * change.before


def test_ranks_may_differ(registry, publish):
    prefix = f"base_model.model.{MODULES[0]}"
    rng = np.random.default_rng(0)
    wide = {
        f"{prefix}.lora_A.weight": rng.normal(size=(4, 8)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.normal(size=(8, 4)).astype(np.float32),
    }
    one = publish(1)
    two = publish(1, config={"rank_pattern": {"q_proj": 4}}, tensors=wide)

    found = registry.diff(one, two)

    expected = update(wide, MODULES[0], 1.0) - update(plain_tensors(1), MODULES[0], 2.0)
    assert found.modules[0].change == pytest.approx(np.linalg.norm(expected))
    assert found.modules[1].change == 0
    assert found.identity == {"rank": (2, 4)}
    assert found.config == {"rank_pattern": (None, {"q_proj": 4})}


def test_what_was_said_of_them_is_compared(registry, publish):
    one = publish(1, metrics={"loss": 0.5, "f1": 0.8}, tags={"lang": "en"}, lineage={"run": "a"})
    two = publish(2, metrics={"loss": 0.4, "f1": 0.8}, tags={}, lineage={"run": "b"})

    found = registry.diff(one, two)

    assert found.metrics == {"loss": (0.5, 0.4)}
    assert found.tags == {"lang": ("en", None)}
    assert found.lineage == {"run": ("a", "b")}
    assert (found.identity, found.config) == ({}, {})
