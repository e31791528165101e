"""Packs made a step ahead are those made when they are asked for, whatever comes between."""

import threading
from contextlib import nullcontext

import pytest

from manylora_trainer.errors import SourceError
from manylora_trainer.packer import Packer
from manylora_trainer.packing import Batch, Pack
from manylora_trainer.tokenization import ChatTokenizer
from tests.unit.trainer.test_data_stream import Rows, stream_of, words

LEAVES_BEFORE = 3
"""The step that adapter 1 takes no part in any more, though it was prepared with it."""

SCANS_FIFTEEN = {"validation": 0, "held_out": 0, "scan_rows": 15}


class FailingRows(Rows):
    """Rows behind which the source fails, every time."""

    def rows(self, after=None):
        yield from super().rows(after)
        raise SourceError("the disk is gone")


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return ChatTokenizer(tiny_base)


def streams_of(tokenizer):
    return [
        stream_of(tokenizer, words(30), seed, batch_size=5, shuffle_buffer=7)[0]
        for seed in range(3)
    ]


def content(pack: Pack) -> list:
    arrays = (pack.tokens, pack.positions, pack.token_sequences, pack.predicting, pack.targets)
    keys = [bucket.keys.tolist() for bucket in pack.buckets]
    return [pack.ranges, pack.spans, keys, *(array.tolist() for array in arrays)]


def test_packs_prepared_ahead_are_those_packed_when_asked_for(tokenizer):
    runs: list[list] = []
    for ahead in (True, False):
        streams = streams_of(tokenizer)
        packer = Packer(streams, 256, 2)
        packs: list = []
        with packer.prepared_ahead() if ahead else nullcontext():
            for step in range(6):
                taking_part = [0, 1, 2] if step < LEAVES_BEFORE else [0, 2]
                batches = [Batch.of(index, streams[index].next_batch()) for index in taking_part]
                packs.append([content(pack) for pack in packer.packs(batches)])
                packer.prepare(taking_part)
        runs.append(packs)
    assert runs[0] == runs[1]


def test_a_source_that_fails_in_the_background_is_told_where_its_batch_is_asked_for(tokenizer):
    sound, _ = stream_of(tokenizer, words(30), batch_size=5)
    failing, _ = stream_of(
        tokenizer, FailingRows(words(20)), batch_size=5, shuffle_buffer=5, split=SCANS_FIFTEEN
    )
    streams = [sound, failing]
    packer = Packer(streams, 256, 1)
    before = set(threading.enumerate())
    with packer.prepared_ahead():
        for _ in range(4):
            packer.packs([Batch.of(n, stream.next_batch()) for n, stream in enumerate(streams)])
            packer.prepare([0, 1])
        at = failing.cursor
        with pytest.raises(SourceError, match="the disk is gone"):
            failing.next_batch()
        assert failing.cursor == at
        # Who knows no more of the failing one goes on.
        batch = Batch.of(0, sound.next_batch())
        assert [pack.ranges[0].adapter for pack in packer.packs([batch])] == [0]
    assert set(threading.enumerate()) <= before


def test_what_is_prepared_when_a_run_breaks_off_is_given_up(tokenizer):
    streams = streams_of(tokenizer)
    packer = Packer(streams, 256, 1)
    before = set(threading.enumerate())

    def break_off() -> None:
        with packer.prepared_ahead():
            packer.prepare([0, 1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert set(threading.enumerate()) <= before
