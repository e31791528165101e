"""The stream of one task: who trains, in what order, how much of it, and exact to resume."""

import json
import sqlite3
from collections import Counter
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest

import manylora_trainer
from manylora_trainer.data_settings import Split
from manylora_trainer.dataset import load_task, part_of
from manylora_trainer.errors import NoExamplesError, RowError, SourceError, UnfitTaskError
from manylora_trainer.formats import Message, Rendered
from manylora_trainer.recipe import Task
from manylora_trainer.sampling import Cursor, ExampleStream, prepared_ahead
from manylora_trainer.sources import Row
from manylora_trainer.tokenization import ChatTokenizer

ALL = {"validation": 0, "held_out": 0}
"""A split that keeps everything for training."""


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return ChatTokenizer(tiny_base)


class Rows:
    """A source of given rows that counts what is read."""

    name = "rows"

    def __init__(self, rows):
        self._rows = rows
        self.read = 0

    def rows(self, after=None):
        first = 0 if after is None else after["row"]
        for number in count(first + 1):
            # As they are by now: a test may change them.
            if number > len(self._rows):
                return
            row = self._rows[number - 1]
            self.read += 1
            if isinstance(row, RowError):
                yield Row(number, {}, after={"row": number}, error=row)
            else:
                yield Row(number, row, after={"row": number})


def words(count):
    return [{"wrong": f"w{i}", "right": f"{i}"} for i in range(count)]


def task(**changes) -> Task:
    return Task(
        **{
            "name": "words",
            "source": {"kind": "jsonl", "path": "unused"},
            "format": {"kind": "template", "prompt": "Fix {wrong}", "completion": "{right}"},
            "split": ALL,
            **({} if "epochs" in changes else {"steps": 100}),
            **changes,
        }
    )


def stream_of(tokenizer, rows, seed=0, **changes):
    settings = task(**changes)
    source = rows if isinstance(rows, Rows) else Rows(rows)
    data = load_task(settings, tokenizer, seed, source=source)
    return ExampleStream(settings, data, seed=seed), data


def answers(batch, tokenizer):
    """The numbers that `words` gives as answers."""
    return [int(tokenizer.decode(e.tokens[e.prompt_length : -1])) for e in batch]


def prompts(examples, tokenizer):
    return {tokenizer.decode(e.tokens[: e.prompt_length]) for e in examples}


def messages(row):
    return [Message(**message) for message in json.loads(row.as_json())["messages"]]


# Split


def test_no_input_is_on_two_sides_of_the_split(tokenizer):
    rows = [{"wrong": f"w{i % 150}", "right": f"{i}"} for i in range(450)]
    stream, data = stream_of(
        tokenizer, rows, split={"validation": 0.2, "held_out": 0.2}, epochs=1, batch_size=1000
    )
    train = stream.next_batch()
    trained, validation = prompts(train, tokenizer), prompts(data.validation, tokenizer)
    held_out = {tokenizer.render_prompt(messages(row)) for row in data.held_out}
    assert min(len(trained), len(validation), len(held_out)) > 5
    assert not trained & validation
    assert not trained & held_out
    assert not validation & held_out
    assert len(trained) + len(validation) + len(held_out) == 150
    # Evaluations count each input once; training keeps its repetitions.
    assert len(data.validation) == len(validation)
    assert len(data.held_out) == len(held_out)
    assert len(train) == data.train_rows == 3 * len(trained)


def test_a_row_keeps_its_place_whatever_stands_around_it():
    split = Split(validation=0.3, held_out=0.3)
    entries = [Rendered((Message("user", f"w{i}"),), "x") for i in range(300)]
    counts = Counter(part_of(entry, split)[0] for entry in entries)
    assert all(60 < counts[part] < 140 for part in ("train", "validation", "held_out"))
    other = Rendered(entries[0].messages, "another answer")
    assert part_of(other, split) == part_of(entries[0], split)


def test_capped_parts_do_not_depend_on_the_order_of_rows(tokenizer):
    capped = task(
        split={"validation": 0.3, "held_out": 0.3, "validation_rows": 5, "held_out_rows": 9}
    )
    # Each twice: an input takes one place, however often it comes.
    rows = [row for row in words(300) for _ in range(2)]
    one = load_task(capped, tokenizer, 0, source=Rows(rows))
    two = load_task(capped, tokenizer, 0, source=Rows(rows[::-1]))
    assert [row.as_json() for row in one.held_out] == [row.as_json() for row in two.held_out]
    assert (len(one.held_out), len(one.validation)) == (9, 5)
    assert prompts(one.validation, tokenizer) == prompts(two.validation, tokenizer)


def test_held_out_rows_are_complete(tokenizer):
    rows = [{"wrong": f"w{i}", "right": "r", "extra": i} for i in range(30)]
    settings = task(split={"held_out": 0.3})
    (first, *_) = load_task(settings, tokenizer, 0, source=Rows(rows)).held_out
    entry = json.loads(first.as_json())
    assert entry["messages"] == [{"role": "user", "content": f"Fix {entry['row']['wrong']}"}]
    assert entry["expected"] == "r"
    assert entry["row"]["extra"] == int(entry["row"]["wrong"][1:])


def test_held_out_rows_are_json_whatever_columns_no_format_reads_hold(tokenizer):
    holds_itself: list[object] = [1]
    holds_itself.append(holds_itself)
    unread = {"share": float("nan"), "most": [{"of": float("-inf")}], "days": {1.5: 2}}
    for columns in (unread, {**unread, "loop": holds_itself}):
        rows = [{"wrong": f"w{i}", "right": "r", **columns} for i in range(30)]
        (first, *_) = load_task(
            task(split={"held_out": 0.3}), tokenizer, 0, source=Rows(rows)
        ).held_out
        row = json.loads(first.as_json(), parse_constant=pytest.fail)["row"]
        assert row["wrong"].startswith("w")
        if columns is unread:
            assert row["share"] is row["most"][0]["of"] is None
            assert row["days"] == {"1.5": 2}
        else:
            assert row["loop"] == "[1, [...]]"


def test_a_run_in_steps_looks_through_no_more_than_it_is_told(tokenizer):
    source = Rows(words(500))
    settings = {"split": {"validation": 0.2, "held_out": 0.2, "scan_rows": 100}, "batch_size": 500}
    stream, data = stream_of(tokenizer, source, **settings)
    assert source.read == 101  # One more row is asked for before it is seen to be too many.
    assert data.rows_read == 100
    # Rows behind that are still kept from training by where their hash puts them.
    trained = {answer for _ in range(3) for answer in answers(stream.next_batch(), tokenizer)}
    split = settings["split"]
    share = Split(**split)
    for number in range(500):
        rendered = Rendered((Message("user", f"Fix w{number}"),), "")
        assert (number in trained) == (part_of(rendered, share)[0] == "train")


def test_the_fingerprint_is_of_the_rows(tokenizer):
    one, two = (load_task(task(), tokenizer, seed, source=Rows(words(50))) for seed in (0, 1))
    assert one.data_fingerprint == two.data_fingerprint
    changed = [*words(49), {"wrong": "w49", "right": "another"}]
    other = load_task(task(), tokenizer, 0, source=Rows(changed))
    assert other.data_fingerprint != one.data_fingerprint


# Order


@pytest.mark.parametrize("buffer", [1, 3, 10, 1000])
def test_every_epoch_takes_every_example_once_in_another_order(tokenizer, buffer):
    stream, data = stream_of(tokenizer, words(10), batch_size=4, epochs=4, shuffle_buffer=buffer)
    assert (data.steps, data.examples) == (10, 40)
    batches = [answers(stream.next_batch(), tokenizer) for _ in range(10)]
    taken = [answer for batch in batches for answer in batch]
    epochs = [taken[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == (1 if buffer == 1 else 4)


def test_the_last_batch_of_the_last_epoch_holds_what_is_left(tokenizer):
    stream, data = stream_of(tokenizer, words(10), batch_size=4, epochs=1)
    assert [len(stream.next_batch()) for _ in range(data.steps)] == [4, 4, 2]
    stream, data = stream_of(tokenizer, words(10), batch_size=4, epochs=0.45)
    assert [len(stream.next_batch()) for _ in range(data.steps)] == [4, 1]


def test_a_source_that_fits_in_the_buffer_is_read_once(tokenizer):
    source = Rows(words(20))
    stream, _ = stream_of(tokenizer, source, batch_size=7)
    looked_through = source.read
    for _ in range(12):
        stream.next_batch()
    assert source.read == looked_through + 20


def test_a_large_source_is_mixed_over_the_buffer_and_no_more_is_read(tokenizer):
    source = Rows(words(1000))
    stream, _ = stream_of(tokenizer, source, batch_size=50, shuffle_buffer=200)
    source.read = 0
    first = answers(stream.next_batch(), tokenizer)
    assert source.read == 200
    assert max(first) - min(first) > 150
    assert first != sorted(first)


def test_the_order_depends_on_seed_and_task_alone(tokenizer):
    def first_batch(seed=0, name="words"):
        stream, _ = stream_of(tokenizer, words(100), seed, name=name)
        return answers(stream.next_batch(), tokenizer)

    assert first_batch() == first_batch()
    assert first_batch() != first_batch(seed=1)
    assert first_batch() != first_batch(name="other")


# Batches of tokens


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_batches_of_tokens_hold_that_many_on_average_and_end_with_the_epochs(tokenizer, epochs):
    rows = [{"wrong": f"w{i}", "right": "x" * (i * 7919 % 60) + "."} for i in range(200)]
    stream, data = stream_of(
        tokenizer, rows, epochs=epochs, batch_tokens=512, max_length=200, shuffle_buffer=64
    )
    sizes = [sum(map(len, stream.next_batch())) for _ in range(data.steps)]
    longest = 200
    assert all(0 < size <= 512 + longest for size in sizes)
    assert sum(sizes[:-1]) / len(sizes[:-1]) == pytest.approx(512, abs=longest / len(sizes) + 1)
    if epochs == 1:
        assert stream.cursor.examples == 200
    assert stream.cursor.examples == pytest.approx(200 * epochs, abs=6)


def test_an_example_that_ends_with_its_batchs_share_of_tokens_is_in_it(tokenizer):
    rows = [{"wrong": f"w{i}", "right": str(i)} for i in range(6)]
    length = len(stream_of(tokenizer, rows, batch_size=1)[0].next_batch()[0])
    stream, data = stream_of(
        tokenizer, rows, epochs=1, batch_tokens=2 * length, max_length=2 * length
    )
    assert [len(stream.next_batch()) for _ in range(data.steps)] == [2, 2, 2]


def test_batches_of_tokens_must_hold_the_longest_example():
    with pytest.raises(ValueError, match="must not be less than max_length"):
        task(batch_tokens=256, max_length=512)
    with pytest.raises(ValueError, match="either batch_size or batch_tokens"):
        task(batch_tokens=512, batch_size=4)
    with pytest.raises(ValueError, match="either steps or epochs"):
        task(steps=3, epochs=1)


def test_epochs_that_end_before_the_warmup_are_told(tokenizer):
    settings = {"epochs": 1, "batch_size": 5, "optimizer": {"warmup_steps": 3}}
    with pytest.raises(UnfitTaskError, match=r"10 examples are 2 steps.*warmup_steps \(3\)"):
        stream_of(tokenizer, words(10), **settings)


# Exact to resume


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle_buffer": 7},
        {"batch_size": 25, "shuffle_buffer": 3},
        {"batch_tokens": 256, "max_length": 200, "shuffle_buffer": 7},
        {"batch_size": 5, "shuffle_buffer": 4, "overlong": "drop", "max_length": 95},
        {"batch_size": 3, "epochs": 3, "shuffle_buffer": 11},
    ],
)
def test_a_stream_goes_on_exactly_from_any_cursor(tokenizer, settings):
    rows = [{"wrong": f"w{i}", "right": "x" * (i % 20) + f"{i}"} for i in range(23)]
    whole, data = stream_of(tokenizer, rows, split={"validation": 0.1}, **settings)
    steps = min(data.steps, 14)
    batches, cursors = [], []
    for _ in range(steps):
        batches.append([e.tokens.tolist() for e in whole.next_batch()])
        cursors.append(json.loads(json.dumps(asdict(whole.cursor))))
    for step, cursor in enumerate(cursors):
        resumed, _ = stream_of(tokenizer, rows, split={"validation": 0.1}, **settings)
        resumed.move_to(Cursor(**cursor))
        rest = [[e.tokens.tolist() for e in resumed.next_batch()] for _ in range(step + 1, steps)]
        assert rest == batches[step + 1 :]
        assert asdict(resumed.cursor) == cursors[-1]


# Rows that change meanwhile


@pytest.mark.parametrize("instead", [[], [{"wrong": "w20", "right": "another"}]])
def test_other_rows_than_were_looked_through_are_refused(tokenizer, instead):
    rows = words(35)
    stream, data = stream_of(tokenizer, rows, batch_size=15, shuffle_buffer=10, epochs=2)
    stream.next_batch()
    there, rows[20:21] = rows[20:21], instead
    with pytest.raises(SourceError, match="task words: rows gives other rows than when this run"):
        stream.next_batch()
    rows[20 : 20 + len(instead)] = there
    while stream.cursor.batches < data.steps:
        stream.next_batch()
    assert stream.cursor.examples == 70


@pytest.mark.parametrize("there", [35, 40])
def test_rows_added_behind_those_looked_through_train_in_another_run(tokenizer, there):
    rows = words(there)
    stream, data = stream_of(tokenizer, rows, batch_size=15, shuffle_buffer=10, epochs=2)
    taken = answers(stream.next_batch(), tokenizer)
    rows += words(100)[there:]
    while stream.cursor.batches < data.steps:
        taken += answers(stream.next_batch(), tokenizer)
    assert sorted(taken) == sorted([*range(there), *range(there)])


def test_rows_behind_those_looked_through_may_be_mended(tokenizer):
    rows = words(35)
    stream, _ = stream_of(
        tokenizer, rows, batch_size=20, shuffle_buffer=10, split={**ALL, "scan_rows": 25}
    )
    stream.next_batch()
    rows[24]["right"] = "900"
    assert 900 in answers(stream.next_batch(), tokenizer)


def test_a_cursor_stays_small(tokenizer):
    stream, _ = stream_of(tokenizer, words(3000), batch_size=100, shuffle_buffer=500)
    for _ in range(40):
        stream.next_batch()
    assert len(json.dumps(asdict(stream.cursor))) < 300


def test_batches_prepared_ahead_are_the_same(tokenizer):
    settings = {"batch_size": 4, "shuffle_buffer": 7}
    plain, _ = stream_of(tokenizer, words(23), **settings)
    ahead = [stream_of(tokenizer, words(23), **settings)[0] for _ in range(3)]
    with prepared_ahead(ahead):
        for _ in range(20):
            assert all(stream.prepare() is not None for stream in ahead)
            expected = answers(plain.next_batch(), tokenizer)
            assert [answers(s.next_batch(), tokenizer) for s in ahead] == [expected] * 3
            assert {json.dumps(asdict(s.cursor)) for s in ahead} == {
                json.dumps(asdict(plain.cursor))
            }


# Overlong


@pytest.mark.parametrize(
    ("policy", "dropped", "truncated"), [("drop", 20, 0), ("truncate", 10, 10)]
)
def test_overlong_examples_are_counted(tokenizer, policy, dropped, truncated):
    fine = [{"wrong": f"w{i}", "right": "r"} for i in range(10)]
    long_answer = [{"wrong": f"a{i}", "right": "r" * 300} for i in range(10)]
    long_prompt = [{"wrong": f"p{i}" + "w" * 300, "right": "r"} for i in range(10)]
    stream, data = stream_of(
        tokenizer,
        [*fine, *long_answer, *long_prompt],
        overlong=policy,
        max_length=200,
        epochs=1,
        batch_size=7,
    )
    taken = [example for _ in range(data.steps) for example in stream.next_batch()]
    assert (data.overlong_dropped, data.overlong_truncated) == (dropped, truncated)
    assert len(taken) == data.examples == 30 - dropped
    assert stream.cursor.overlong_truncated == truncated
    assert max(len(example) for example in taken) <= 200
    assert all(example.trained.any() for example in taken)


def test_rows_that_went_behind_those_looked_through_end_their_window(tokenizer):
    settings = {"split": {**ALL, "scan_rows": 4}, "shuffle_buffer": 4, "batch_size": 3}
    stream, _ = stream_of(tokenizer, words(20), **settings)
    for _ in range(2):
        stream.next_batch()
    assert (stream.cursor.window, stream.cursor.position) == (1, 2)
    resumed, _ = stream_of(tokenizer, words(5), **settings)
    resumed.move_to(stream.cursor)
    # The one row left of the window was drawn before: the next epoch begins.
    assert set(answers(resumed.next_batch(), tokenizer)) < {0, 1, 2, 3}
    assert resumed.cursor.epoch == 1


def test_an_empty_source_is_told(tokenizer):
    with pytest.raises(NoExamplesError, match="rows has no rows"):
        load_task(task(), tokenizer, 0, source=Rows([]))


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 1}])
def test_nothing_left_to_train_on_is_told(tokenizer, length):
    with pytest.raises(NoExamplesError, match="longer than max_length 8"):
        stream_of(tokenizer, words(2), max_length=8, **length)[0].next_batch()


# Malformed rows


def bad(number):
    return RowError("rows", number, None, "not JSON")


def test_a_malformed_row_that_a_mix_gives_again_counts_once(tokenizer):
    class Again(Rows):
        def rows(self, after=None):
            for row in super().rows(after):
                yield replace(row, again=row.number in (3, 4, 7))

    rows = [*words(1), bad(2), bad(3), bad(4), *words(1), bad(6), bad(7), *words(1)]
    stream, _ = stream_of(
        tokenizer, Again(rows), steps=1, batch_size=3, on_bad_row="skip", max_bad_rows=2
    )
    assert len(stream.next_batch()) == 3


def test_a_malformed_row_ends_a_run_unless_it_may_be_skipped(tokenizer):
    rows = [*words(5), bad(6), {"wrong": "w", "right": ""}, *words(4)]
    with pytest.raises(RowError, match="row 6: not JSON"):
        stream_of(tokenizer, rows)
    skipping = {"on_bad_row": "skip", "epochs": 1, "batch_size": 100}
    stream, data = stream_of(tokenizer, rows, **skipping)
    assert (data.rows_read, data.rows_skipped, data.train_rows) == (11, 2, 9)
    assert len(stream.next_batch()) == 9
    with pytest.raises(RowError, match=r"row 7.*renders to nothing \(and 1 malformed rows before"):
        stream_of(tokenizer, rows, max_bad_rows=1, **skipping)


def test_the_first_row_that_is_passed_over_is_told_with_why(tokenizer):
    heard = []
    rows = Rows([*words(5), bad(6), *words(4), bad(11)])
    load_task(task(on_bad_row="skip"), tokenizer, 0, source=rows, say=heard.append)
    assert [text for text in heard if "passed over" in text] == [
        f"{task().name}: malformed rows are passed over; the first: rows, row 6: not JSON"
    ]
    with pytest.raises(NoExamplesError, match=r"2 malformed.*first malformed one: rows, row 1:"):
        stream_of(tokenizer, [bad(1), bad(2)], on_bad_row="skip")


def until_it_fails(stream):
    """The cursors on the way to a failure."""
    try:
        while True:
            yield stream.cursor
            stream.next_batch()
    except RowError as error:
        assert "25 malformed rows before it" in str(error)  # noqa: PT017 (a generator)


def test_the_cap_of_skipped_rows_holds_over_all_windows_and_from_any_cursor(tokenizer):
    rows = [row for i, word in enumerate(words(40)) for row in (word, bad(2 * i + 2))]
    settings = {
        "on_bad_row": "skip",
        "max_bad_rows": 25,
        "split": {**ALL, "scan_rows": 10},
        "batch_size": 4,
        "shuffle_buffer": 4,
    }
    stream, _ = stream_of(tokenizer, rows, **settings)
    cursors = list(until_it_fails(stream))
    assert len(cursors) == 7
    resumed, _ = stream_of(tokenizer, rows, **settings)
    resumed.move_to(cursors[3])
    assert list(until_it_fails(resumed)) == cursors[3:]
    # Each reading counts anew: twenty of them are never too many, in whatever epoch.
    fewer, _ = stream_of(tokenizer, rows[:40], **settings)
    while fewer.cursor.epoch < 2:
        fewer.next_batch()


# Whole runs


def losses(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["task"], line["loss"]) for line in lines if "loss" in line]


def test_a_source_that_fails_midway_keeps_what_was_trained(make_task, write_recipe, tmp_path):
    """Once the source works again the run goes on to the same adapter."""
    done, going = make_task("done", steps=2), make_task("going", steps=12)
    (tmp_path / "rows.py").write_text(
        "import pathlib\n"
        "def rows():\n"
        "    for i in range(60):\n"
        "        if i == 40 and pathlib.Path(__file__).with_name('down').exists():\n"
        "            raise ConnectionError('the database went away')\n"
        "        yield {'wrong': f'w{i}', 'right': f'r{i}'}\n"
    )
    failing = {
        **make_task("failing", steps=12),
        "source": {"kind": "python", "file": str(tmp_path / "rows.py"), "function": "rows"},
        "split": {**ALL, "scan_rows": 30},
        "shuffle_buffer": 5,
    }
    # A batch of the task that is going is drawn before the other one fails.
    recipe = write_recipe(done, going, failing, checkpoint_every=100)
    manylora_trainer.train(recipe, tmp_path / "whole")
    (tmp_path / "down").touch()
    with pytest.raises(SourceError, match="failed after 40 rows: ConnectionError: the database"):
        manylora_trainer.train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "adapters" / "done" / "adapter_model.safetensors").exists()
    (tmp_path / "down").unlink()
    manylora_trainer.train(recipe, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("done", "going", "failing"):
        weights = Path("adapters") / name / "adapter_model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (
            tmp_path / "whole" / weights
        ).read_bytes()


def test_what_the_environment_holds_stays_out_of_the_run_directory(
    make_task, write_recipe, tmp_path, monkeypatch
):
    with sqlite3.connect(tmp_path / "hunter2.db") as connection:
        connection.execute("create table words (id integer primary key, wrong text, right text)")
        connection.executemany(
            "insert into words values (?, ?, ?)", [(i, f"w{i}", f"r{i}") for i in range(40)]
        )
    monkeypatch.setenv("WORDS", str(tmp_path / "hunter2.db"))
    source = {"kind": "sql", "url": "sqlite:///${WORDS}", "table": "words", "key": "id"}
    recipe = write_recipe({**make_task("a"), "source": source})
    manylora_trainer.train(recipe, tmp_path / "run")
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8
    assert not [file for file in files if b"hunter2" in file.read_bytes()]


def test_epochs_and_overlong_examples_are_in_the_result(make_task, write_recipe, tmp_path):
    rows = [*words(20), *({"wrong": f"long{i}", "right": "x" * 300} for i in range(5))]
    settings = make_task("a", rows=rows, epochs=2, split=ALL, batch_size=8)
    del settings["steps"]
    result = manylora_trainer.train(write_recipe(settings), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]["a"]
    assert (told["steps"], told["examples"]) == (5, 40)
    assert (told["overlong_dropped"], told["rows_read"], told["train_rows"]) == (10, 25, 25)
    assert result.tasks["a"].overlong_dropped == 10
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["overlong_dropped"] == 10
