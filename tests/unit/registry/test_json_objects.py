"""Keys that stand twice in a JSON object are found, in one look at the object."""

import json
import time

import pytest

from manylora_registry.json_objects import RepeatedKeyError, distinct


def test_a_key_that_stands_once_is_taken_at_every_depth():
    assert json.loads('{"a": {"a": 1}, "b": [{"a": 2}]}', object_pairs_hook=distinct) == {
        "a": {"a": 1},
        "b": [{"a": 2}],
    }


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": 3}]}'])
def test_a_key_that_stands_twice_is_named(text):
    with pytest.raises(RepeatedKeyError, match=r"^the key 'a' stands in an object twice$"):
        json.loads(text, object_pairs_hook=distinct)


def test_however_many_others_there_are():
    pairs = [*((str(key), None) for key in range(300_000)), ("299999", None)]
    began = time.process_time()
    with pytest.raises(RepeatedKeyError, match="'299999'"):
        distinct(pairs)
    assert time.process_time() - began < 10
