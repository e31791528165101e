"""Rows become examples: formats, the mask, the split, and clear words about bad rows."""

import json
from collections import Counter

import numpy as np
import pytest

from manylora_trainer.data_settings import ChatFormat, PromptCompletionFormat, Split, TemplateFormat
from manylora_trainer.dataset import load_task, part_of
from manylora_trainer.errors import NoExamplesError, RowError, UnsupportedBaseError
from manylora_trainer.formats import Message, Rendered, render
from manylora_trainer.recipe import Task
from manylora_trainer.sampling import Cursor, Sampler
from manylora_trainer.sources import Row
from manylora_trainer.tokenization import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return ChatTokenizer(tiny_base)


def template(**changes):
    return TemplateFormat(
        **{"kind": "template", "prompt": "Fix {wrong}", "completion": "{right}", **changes}
    )


# Formats


def test_template_fills_columns():
    row = Row(1, {"wrong": "teh", "right": "the", "n": 3})
    rendered = render(template(system="Use {n} words."), row)
    assert rendered == Rendered(
        (Message("system", "Use 3 words."), Message("user", "Fix teh")), "the"
    )


def test_columns_as_canonical_json():
    row = Row(1, {"wrong": "ua", "os": "Línux", "browser": "Fox", "version": None})
    rendered = render(template(completion=None, completion_json=["os", "browser", "version"]), row)
    assert rendered.completion == '{"browser":"Fox","os":"Línux","version":null}'


def test_prompt_completion():
    row = Row(1, {"prompt": "2+2?", "completion": "4"})
    rendered = render(PromptCompletionFormat(kind="prompt_completion"), row)
    assert rendered == Rendered((Message("user", "2+2?"),), "4")


def test_chat_learns_the_last_answer():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    rendered = render(ChatFormat(kind="chat", system="Be brief."), Row(1, {"messages": turns}))
    assert [message.role for message in rendered.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert rendered.completion == "4"


@pytest.mark.parametrize(
    ("settings", "columns", "field", "said"),
    [
        (template(), {"wrong": "a"}, "right", "missing"),
        (template(), {"wrong": ["a"], "right": "b"}, "wrong", "must be text or a number"),
        (template(), {"wrong": "a", "right": " "}, "completion", "renders to nothing"),
        (
            template(completion=None, completion_json=["x"]),
            {"wrong": "a", "x": float("nan")},
            "x",
            "is not JSON",
        ),
        (
            PromptCompletionFormat(kind="prompt_completion"),
            {"prompt": "a", "completion": ""},
            "completion",
            "empty",
        ),
        (
            PromptCompletionFormat(kind="prompt_completion"),
            {"prompt": 3, "completion": "a"},
            "prompt",
            "must be text, is int",
        ),
        (ChatFormat(kind="chat"), {"messages": "hi"}, "messages", "must be a list"),
        (
            ChatFormat(kind="chat"),
            {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]},
            "messages.1.role",
            "is 'bot'",
        ),
        (
            ChatFormat(kind="chat"),
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "messages",
            "must end with role assistant",
        ),
    ],
)
def test_a_malformed_row_names_its_field(settings, columns, field, said):
    with pytest.raises(RowError, match=said) as caught:
        render(settings, Row(12, columns, "rows.jsonl"))
    assert (caught.value.source, caught.value.row, caught.value.field) == ("rows.jsonl", 12, field)
    assert str(caught.value).startswith(f"rows.jsonl, row 12, field {field!r}: ")


# Tokens


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_is_what_a_server_renders_and_only_the_answer_trains(
    tokenizer, tiny_base, system
):
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "Fix teh"}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    server = AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    messages = tuple(Message(**turn) for turn in turns)
    (example,) = tokenizer.encode([Rendered(messages, "the")])
    assert example.tokens[: example.prompt_length].tolist() == server
    assert not example.trained[: example.prompt_length].any()
    assert example.trained[example.prompt_length :].all()
    assert tokenizer.decode(example.tokens[example.prompt_length :]) == "the<|im_end|>"


def test_the_example_is_the_whole_conversation_as_rendered(tokenizer, tiny_base):
    from transformers import AutoTokenizer

    (example,) = tokenizer.encode([Rendered((Message("user", "2+2?"),), "4")])
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    whole = AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(turns, tokenize=False)
    # The template goes on after the stop token; a server does not.
    assert tokenizer.decode(example.tokens) == whole.rstrip("\n")


def test_a_base_without_a_chat_template_is_refused(tiny_base, tmp_path):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(tiny_base, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedBaseError, match="no chat template"):
        ChatTokenizer(plain)


# Split and sample


class Rows:
    """A source of given rows."""

    name = "rows"

    def __init__(self, rows):
        self._rows = rows

    def rows(self, after=None):
        first = 0 if after is None else after["row"]
        for number, row in enumerate(self._rows[first:], start=first + 1):
            yield Row(number, row, after={"row": number})


def task(**changes) -> Task:
    return Task(
        **{
            "name": "words",
            "source": {"kind": "jsonl", "path": "unused"},
            "format": {"kind": "template", "prompt": "Fix {wrong}", "completion": "{right}"},
            "split": {"validation": 0.2, "held_out": 0.2, "held_out_rows": 1000},
            "steps": 100,
            "batch_size": 10,
            **changes,
        }
    )


def prompts(examples, tokenizer):
    return {tokenizer.decode(e.tokens[: e.prompt_length]) for e in examples}


def test_no_input_is_on_two_sides_of_the_split(tokenizer):
    rows = [{"wrong": f"w{i % 150}", "right": f"r{i}"} for i in range(450)]
    data = load_task(
        task(split={"validation": 0.2, "held_out": 0.2}), tokenizer, 0, source=Rows(rows)
    )
    train, validation = prompts(data.train, tokenizer), prompts(data.validation, tokenizer)
    held_out = {tokenizer.render_prompt(row.rendered.messages) for row in data.held_out}
    assert min(len(train), len(validation), len(held_out)) > 5
    assert not train & validation
    assert not train & held_out
    assert not validation & held_out
    assert len(train) + len(validation) + len(held_out) == 150
    # Evaluations count each input once; training keeps its repetitions.
    assert len(data.validation) == len(validation)
    assert len(data.held_out) == len(held_out)
    assert len(data.train) == 3 * len(train)


def test_a_row_keeps_its_place_whatever_stands_around_it():
    split = Split(validation=0.3, held_out=0.3)
    entries = [Rendered((Message("user", f"w{i}"),), "x") for i in range(300)]
    counts = Counter(part_of(entry, split)[0] for entry in entries)
    assert all(60 < counts[part] < 140 for part in ("train", "validation", "held_out"))
    other = Rendered(entries[0].messages, "another answer")
    assert part_of(other, split) == part_of(entries[0], split)


def test_capped_parts_do_not_depend_on_the_order_of_rows(tokenizer):
    rows = [{"wrong": f"w{i}", "right": "r"} for i in range(300)]
    capped = task(
        split={"validation": 0.3, "held_out": 0.3, "validation_rows": 5, "held_out_rows": 9}
    )
    one = load_task(capped, tokenizer, 0, source=Rows(rows))
    two = load_task(capped, tokenizer, 0, source=Rows(rows[::-1]))
    assert [row.as_json() for row in one.held_out] == [row.as_json() for row in two.held_out]
    assert (len(one.held_out), len(one.validation)) == (9, 5)
    assert prompts(one.validation, tokenizer) == prompts(two.validation, tokenizer)


def test_held_out_rows_are_complete(tokenizer):
    rows = [{"wrong": f"w{i}", "right": "r", "extra": i} for i in range(30)]
    (first, *_) = load_task(task(), tokenizer, 0, source=Rows(rows)).held_out
    entry = json.loads(first.as_json())
    assert entry["messages"] == [{"role": "user", "content": f"Fix {entry['row']['wrong']}"}]
    assert entry["expected"] == "r"
    assert entry["row"]["extra"] == int(entry["row"]["wrong"][1:])


def test_a_long_source_is_sampled_evenly(tokenizer):
    rows = [{"wrong": f"w{i}", "right": f"{i}"} for i in range(3000)]
    data = load_task(task(steps=10, batch_size=30), tokenizer, 0, source=Rows(rows))
    numbers = [int(tokenizer.decode(e.tokens[e.prompt_length : -1])) for e in data.train]
    assert len(set(numbers)) == 300
    assert 1300 < np.mean(numbers) < 1700
    again = load_task(task(steps=10, batch_size=30), tokenizer, 0, source=Rows(rows))
    assert again.data_fingerprint == data.data_fingerprint
    other_seed = load_task(task(steps=10, batch_size=30), tokenizer, 1, source=Rows(rows))
    assert other_seed.data_fingerprint != data.data_fingerprint


@pytest.mark.parametrize(
    ("policy", "dropped", "truncated"), [("drop", 20, 0), ("truncate", 10, 10)]
)
def test_overlong_examples_are_counted(tokenizer, policy, dropped, truncated):
    fine = [{"wrong": f"w{i}", "right": "r"} for i in range(10)]
    long_answer = [{"wrong": f"a{i}", "right": "r" * 300} for i in range(10)]
    long_prompt = [{"wrong": f"p{i}" + "w" * 300, "right": "r"} for i in range(10)]
    settings = task(overlong=policy, max_length=200, split={"validation": 0, "held_out": 0})
    data = load_task(settings, tokenizer, 0, source=Rows([*fine, *long_answer, *long_prompt]))
    assert (data.overlong_dropped, data.overlong_truncated) == (dropped, truncated)
    assert len(data.train) == 30 - dropped
    assert max(len(example) for example in data.train) <= 200
    assert all(example.trained.any() for example in data.train)


def test_an_empty_source_is_told(tokenizer):
    with pytest.raises(NoExamplesError, match="rows has no rows"):
        load_task(task(), tokenizer, 0, source=Rows([]))


def test_nothing_left_to_train_on_is_told(tokenizer):
    with pytest.raises(NoExamplesError, match="1 longer than max_length 8"):
        load_task(
            task(max_length=8, split={"validation": 0, "held_out": 0}),
            tokenizer,
            0,
            source=Rows([{"wrong": "w", "right": "r"}]),
        )


# Batches


def test_epochs_take_every_example_once_and_a_cursor_resumes_exactly():
    def sampler():
        return Sampler(10, 4, seed=1, task="t")

    whole = sampler()
    batches = [whole.next_batch() for _ in range(10)]
    taken = [index for batch in batches for index in batch]
    for epoch in range(4):
        assert sorted(taken[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert taken[:10] != taken[10:20]
    stopped = sampler()
    for _ in range(3):
        stopped.next_batch()
    assert stopped.cursor == Cursor(epoch=1, position=2)
    resumed = sampler()
    resumed.move_to(stopped.cursor)
    assert [resumed.next_batch() for _ in range(7)] == batches[3:]
