"""Rows become examples: formats, the mask, and clear words about bad rows."""

import json
import shutil
from datetime import UTC, date, datetime, time
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest

from manylora_trainer.data_settings import (
    ChatFormat,
    PreferenceFormat,
    PromptCompletionFormat,
    TemplateFormat,
)
from manylora_trainer.errors import DataError, RowError, UnsupportedBaseError
from manylora_trainer.formats import Message, Rendered, render
from manylora_trainer.sources import Row
from manylora_trainer.tokenization import ChatPreparation, ChatTokenizer


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


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "train": True},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def test_columns_as_a_json_prompt():
    rendered = render(
        template(prompt=None, prompt_json=["b", "a"]), Row(1, {"b": 1, "a": "x", "right": "r"})
    )
    assert rendered.messages == (Message("user", '{"a":"x","b":1}'),)


@pytest.mark.parametrize(
    ("train", "given", "learned"),
    [
        ("last", ["Be brief.", "hi", "hello", "2+2?"], ["4"]),
        ("all", ["Be brief.", "hi"], ["hello", "4"]),
        ("flagged", ["Be brief.", "hi"], ["hello"]),
    ],
)
def test_which_messages_train(tokenizer, train, given, learned):
    settings = ChatFormat(kind="chat", system="Be brief.", train=train)
    rendered = render(settings, Row(1, {"messages": TALK}))
    assert [m.content for m in rendered.messages][: len(given)] == given
    (example,) = tokenizer.encode([rendered])
    text = tokenizer.decode(example.tokens[example.trained])
    assert text == "".join(f"{answer}<|im_end|>" for answer in learned)


def test_every_learned_turn_follows_what_a_server_would_have_given(tokenizer, tiny_base):
    from transformers import AutoTokenizer

    rendered = render(ChatFormat(kind="chat", train="all"), Row(1, {"messages": TALK}))
    (example,) = tokenizer.encode([rendered])
    server = AutoTokenizer.from_pretrained(tiny_base)
    starts = np.flatnonzero(example.trained & ~np.roll(example.trained, 1))
    for start, turn in zip(starts, (1, 3), strict=True):
        turns = [{"role": m["role"], "content": m["content"]} for m in TALK[:turn]]
        prompt = server.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert example.tokens[:start].tolist() == prompt


def test_a_template_that_changes_earlier_answers_cannot_learn_them(tiny_base, tmp_path):
    base = tmp_path / "forgetful"
    shutil.copytree(tiny_base, base)
    file = base / "chat_template.jinja"
    file.write_text(
        file.read_text().replace(
            "{{ message['content'] }}", "{{ message['content'] if loop.last else '...' }}"
        )
    )
    rendered = render(ChatFormat(kind="chat", train="all"), Row(1, {"messages": TALK}))
    with pytest.raises(UnsupportedBaseError, match=r"changes earlier answers.*format.train: last"):
        ChatTokenizer(base).encode([rendered])


def test_what_databases_hold_is_written_alike_in_text_and_in_json():
    columns = {
        "price": Decimal("1.50"),
        "none": Decimal("0E-8"),
        "many": Decimal("1E+3"),
        "at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        "day": date(2026, 1, 2),
        "opens": time(8, 30),
        "id": UUID(int=1),
    }
    expected = {
        "price": "1.50",
        "none": "0.00000000",
        "many": "1000",
        "at": "2026-01-02 03:04:00+00:00",
        "day": "2026-01-02",
        "opens": "08:30:00",
        "id": "00000000-0000-0000-0000-000000000001",
    }
    for column, text in expected.items():
        settings = template(prompt=f"{{{column}}}", completion=None, completion_json=[column])
        rendered = render(settings, Row(1, columns))
        assert rendered.messages[-1].content == text
        assert json.loads(rendered.completion) == {column: text}


def test_an_integer_greater_than_any_float_is_text_too():
    assert render(template(), Row(1, {"wrong": 10**400, "right": "b"})).completion == "b"


def test_a_system_message_is_put_before_conversations_that_have_none_anywhere():
    settings = ChatFormat(kind="chat", system="Be brief.")
    late = [TALK[0], {"role": "system", "content": "Be kind."}, TALK[1]]
    nulls = [{**turn, "tool_calls": None} for turn in (TALK[0], TALK[1])]

    roles = [
        [message.role for message in render(settings, Row(1, {"messages": turns})).messages]
        for turns in (late, nulls)
    ]

    assert roles == [["user", "system"], ["system", "user"]]


@pytest.mark.parametrize(
    ("settings", "columns", "field", "said"),
    [
        (
            ChatFormat(kind="chat", train="flagged"),
            {"messages": [{"role": "user", "content": "a", "train": True}, TALK[1]]},
            "messages.0.train",
            "only assistant messages train",
        ),
        (
            ChatFormat(kind="chat", train="flagged"),
            {"messages": [TALK[0], {**TALK[3], "train": "yes"}]},
            "messages.1.train",
            "must be true or false",
        ),
        (
            ChatFormat(kind="chat", train="flagged"),
            {"messages": [TALK[0], TALK[3]]},
            "messages",
            "no message has train: true",
        ),
        (ChatFormat(kind="chat", train="all"), {"messages": TALK[1:]}, "messages", "begin with"),
        (template(), {"wrong": "\ud800", "right": "b"}, "wrong", "half a surrogate pair"),
        (template(), {"wrong": "a"}, "right", "missing"),
        (template(), {"wrong": ["a"], "right": "b"}, "wrong", "must be text or a number"),
        (template(), {"wrong": "a", "right": None}, "right", "must be text or a number, is null"),
        (template(), {"wrong": "a", "right": " "}, "completion", "renders to nothing"),
        (template(), {"wrong": "a", "right": float("nan")}, "right", "is nan, not a number"),
        (template(), {"wrong": "a", "right": Decimal("NaN")}, "right", "is NaN, not a number"),
        (template(prompt="{wrong}"), {"wrong": " ", "right": "a"}, "prompt", "renders to nothing"),
        (
            template(completion=None, completion_json=["x"]),
            {"wrong": "a", "x": Decimal("Infinity")},
            "x",
            "is not JSON: Infinity is not a number",
        ),
        (
            template(completion=None, completion_json=["x"]),
            {"wrong": "a", "x": [b"a"]},
            "x",
            "bytes has no form in it",
        ),
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
            "must be text, is int; `kind: template` makes text of it",
        ),
        (
            PromptCompletionFormat(kind="prompt_completion"),
            {"prompt": True, "completion": "a"},
            "prompt",
            "must be text, is bool$",
        ),
        (
            PreferenceFormat(kind="preference"),
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "prompt",
            "must be text, is int$",
        ),
        (
            ChatFormat(kind="chat"),
            {"messages": [TALK[0], {**TALK[1], "tool_calls": [{"id": "a"}]}]},
            "messages.1.tool_calls",
            "would be lost: role and content alone are learned",
        ),
        (
            ChatFormat(kind="chat"),
            {"messages": [TALK[0], {**TALK[1], "content": None, "tool_calls": [{"id": "a"}]}]},
            "messages.1.tool_calls",
            "would be lost: role and content alone are learned",
        ),
        (
            ChatFormat(kind="chat"),
            {"messages": [{**TALK[0], "content": [{"type": "text", "text": "a"}]}, TALK[1]]},
            "messages.0.content",
            "must be text, is list",
        ),
        (
            ChatFormat(kind="chat"),
            {"messages": [TALK[0], {**TALK[1], "weight": 0}]},
            "messages.1.weight",
            "would be lost: say by train: true what trains",
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


def test_a_conversation_the_template_refuses_is_told(tiny_base, tmp_path):
    base = tmp_path / "strict"
    shutil.copytree(tiny_base, base)
    file = base / "chat_template.jinja"
    refusal = "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    file.write_text(refusal + file.read_text())
    rendered = render(ChatFormat(kind="chat"), Row(1, {"messages": [*TALK[:2], *TALK]}))
    with pytest.raises(DataError, match=r"refuses a conversation of user.*'hi': too long"):
        ChatTokenizer(base).encode([rendered])


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (
            "{% if messages[2:] and messages[1].role == 'user' %}{{ raise_exception('twice') }}"
            "{% endif %}",
            [TALK[0], *TALK],
            "refuses a conversation of user, user.*: twice",
        ),
        ("", [TALK[0], {**TALK[1], "content": "hello \n"}, *TALK[2:]], r"answers \('hello \\n'\)"),
    ],
    ids=["roles", "white space"],
)
def test_a_row_the_template_does_not_take_is_malformed(tiny_base, tmp_path, template, turns, said):
    base = tmp_path / "strict"
    shutil.copytree(tiny_base, base)
    file = base / "chat_template.jinja"
    file.write_text(template + file.read_text().replace("['content'] }", "['content'] | trim }"))
    chat = ChatFormat(kind="chat", train="all")
    preparation = ChatPreparation(chat, ChatTokenizer(base))
    preparation.encode([preparation.render(Row(1, {"messages": TALK}))])
    with pytest.raises(RowError, match=f"rows, row 7, field 'messages': .*{said}"):
        preparation.render(Row(7, {"messages": turns}))


def test_a_row_whose_content_the_template_refuses_is_malformed(tiny_base, tmp_path):
    base = tmp_path / "strict"
    shutil.copytree(tiny_base, base)
    file = base / "chat_template.jinja"
    refusal = "{% if 'secret' in messages[0].content %}{{ raise_exception('hush') }}{% endif %}"
    file.write_text(refusal + file.read_text())
    preparation = ChatPreparation(
        PromptCompletionFormat(kind="prompt_completion"), ChatTokenizer(base)
    )
    preparation.render(Row(6, {"prompt": "a question", "completion": "an answer"}, "a.jsonl"))
    with pytest.raises(
        RowError, match=r"a\.jsonl, row 7: .* refuses a conversation of user .*: hush"
    ):
        preparation.render(Row(7, {"prompt": "a secret", "completion": "an answer"}, "a.jsonl"))


def test_a_base_without_a_chat_template_is_refused(tiny_base, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(tiny_base, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedBaseError, match="no chat template"):
        ChatTokenizer(plain)
