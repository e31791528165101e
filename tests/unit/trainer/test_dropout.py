"""Dropout follows from seed, task, step, layer and place alone, and looks like chance."""

import numpy as np
import pytest
import torch

from manylora_trainer.dropout import keep_mask, layer_key, step_key, token_keys

PLACES = (np.repeat(np.arange(16), 64), np.tile(np.arange(64), 16))


KEY = step_key(0, "task", 3)


def mask(key=KEY, layer="layer", dropout=0.25, places=PLACES):
    keys = torch.from_numpy(token_keys(key, *places).view(np.int32))
    return keep_mask(keys, layer_key(layer), 512, dropout)


@pytest.mark.parametrize("dropout", [0.05, 0.25, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_one_asked_for(dropout):
    # Half a million draws: five standard deviations are far below 0.005.
    assert 1 - float(mask(dropout=dropout).float().mean()) == pytest.approx(dropout, abs=0.005)


def test_a_tokens_dropout_does_not_depend_on_what_stands_beside_it():
    whole = mask()
    some = np.array([700, 3, 64])
    assert torch.equal(mask(places=(PLACES[0][some], PLACES[1][some])), whole[some])


@pytest.mark.parametrize(
    "other",
    [
        {"key": step_key(1, "task", 3)},
        {"key": step_key(0, "other", 3)},
        {"key": step_key(0, "task", 4)},
        {"layer": "other"},
        {"places": (PLACES[0] + 1, PLACES[1])},
        {"places": (PLACES[0], PLACES[1] + 1)},
    ],
)
def test_any_other_place_is_independent(other):
    both = torch.stack([mask(dropout=0.5).flatten(), mask(dropout=0.5, **other).flatten()])
    assert abs(float(torch.corrcoef(both.float())[0, 1])) < 0.01


def test_neighbouring_tokens_and_features_are_independent():
    drawn = mask(dropout=0.5).float()
    for distance in (1, 2, 16, 64):
        assert float((drawn[distance:] == drawn[:-distance]).float().mean()) == pytest.approx(
            0.5, abs=0.005
        )
        assert float((drawn[:, distance:] == drawn[:, :-distance]).float().mean()) == (
            pytest.approx(0.5, abs=0.005)
        )
