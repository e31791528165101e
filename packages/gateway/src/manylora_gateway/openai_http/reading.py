"""From a body to what the core takes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manylora_gateway.engine import (
    ChatPrompt,
    Constraint,
    Grammar,
    JsonObject,
    JsonSchema,
    Message,
    OneOf,
    Prompt,
    Regex,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from manylora_gateway.errors import InvalidRequestError, Violation
from manylora_gateway.generation import GenerationRequest
from manylora_gateway.limits import Limits
from manylora_gateway.openai_http.bodies import (
    ChatBody,
    CompletionBody,
    JsonObjectFormat,
    JsonSchemaFormat,
)

SEED_MASK = (1 << 64) - 1
"""Seeds of OpenAI's API may be negative."""


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks for."""

    requests: tuple[GenerationRequest, ...]
    """One for each prompt; a chat has one."""
    stream: bool
    include_usage: bool
    form: str
    """The parameter that says what answers are held to; empty where none does."""


class Reading:
    """Reads bodies under the limits of one gateway.

    Args:
        base: what `model` names the bare base with, beside the empty string.
    """

    def __init__(self, limits: Limits, base: str) -> None:
        self.limits = limits
        self.base = base

    def chat(self, body: ChatBody, request_id: str) -> Asked:
        """What a chat completion asks for.

        Raises:
            InvalidRequestError: with every parameter that is wrong.
        """
        # OpenAI's newer models read "developer" where older ones read "system".
        turns = [
            Message("system" if turn.role == "developer" else turn.role, turn.text())
            for turn in body.messages
        ]
        wanted = body.top_logprobs or 0
        violations: list[Violation] = []
        if wanted and not body.logprobs:
            violations.append(Violation("top_logprobs", "needs logprobs to be true"))
        max_tokens = body.max_tokens
        names = {"logprobs": "top_logprobs"}
        if body.max_completion_tokens is not None:
            max_tokens = body.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        return self._asked(
            body,
            [ChatPrompt(tuple(turns))],
            max_tokens,
            wanted if body.logprobs else None,
            names,
            violations,
            request_id,
        )

    def completion(self, body: CompletionBody, request_id: str) -> Asked:
        """What a text completion asks for.

        Raises:
            InvalidRequestError: with every parameter that is wrong.
        """
        names = {"text": "prompt", "ids": "prompt"}
        prompts = _prompts(body)
        violations: list[Violation] = []
        most = self.limits.config.max_batch
        if not 1 <= len(prompts) <= most:
            text = f"has {len(prompts)} prompts; must have 1 to {most}"
            violations.append(Violation("prompt", text))
            prompts = []
        return self._asked(
            body, prompts, body.max_tokens, body.logprobs, names, violations, request_id
        )

    def _asked(
        self,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        logprobs: int | None,
        names: dict[str, str],
        violations: list[Violation],
        request_id: str,
    ) -> Asked:
        def say(field: str, text: str) -> None:
            violations.append(Violation(_renamed(field, names), text))

        constraint, names["constraint"] = _constraint(body, say)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        default = min(self.limits.config.default_max_tokens, self.limits.max_tokens)
        sampling = Sampling(
            max_tokens=default if max_tokens is None else max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            # vLLM's server knows -1 for "all" too.
            top_k=0 if body.top_k == -1 else body.top_k,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            n=body.n,
            seed=None if body.seed is None else body.seed & SEED_MASK,
            stop=stop,
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            constraint=constraint,
        )
        self.limits.check_sampling(sampling, say)
        for prompt in prompts:
            self.limits.check_prompt(prompt, say)
        if violations:
            raise InvalidRequestError(violations)
        adapter = "" if body.model == self.base else body.model
        ids = (
            [request_id]
            if len(prompts) == 1
            else [f"{request_id}/{i}" for i in range(len(prompts))]
        )
        return Asked(
            requests=tuple(
                GenerationRequest(adapter, prompt, sampling, name)
                for prompt, name in zip(prompts, ids, strict=True)
            ),
            stream=body.stream,
            include_usage=body.stream_options.include_usage,
            form=names["constraint"],
        )


def _renamed(field: str, names: dict[str, str]) -> str:
    """A field of our dataclasses as the parameter it came from."""
    head, bracket, rest = field.partition("[")
    return names.get(head, head) + bracket + rest


def _prompts(body: CompletionBody) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    prompts: list[Prompt] = []
    ids: list[int] = []
    for entry in prompt:
        if isinstance(entry, str):
            prompts.append(TextPrompt(entry))
        elif isinstance(entry, int):
            ids.append(entry)
        else:
            prompts.append(TokenPrompt(tuple(entry)))
    return [*prompts, TokenPrompt(tuple(ids))] if ids else prompts


def _constraint(
    body: ChatBody | CompletionBody, say: Callable[[str, str], None]
) -> tuple[Constraint | None, str]:
    """The form the answer is held to, and the parameter that asks for it."""
    given: list[tuple[Constraint, str]] = []
    match body.response_format:
        case JsonSchemaFormat(json_schema=named):
            schema = JsonSchema(json.dumps(named.schema_))
            given.append((schema, "response_format.json_schema.schema"))
        case JsonObjectFormat():
            given.append((JsonObject(), "response_format"))
        case _:
            pass
    if (form := body.structured_outputs) is not None:
        where = "structured_outputs"
        if form.json_ is not None:
            text = form.json_ if isinstance(form.json_, str) else json.dumps(form.json_)
            given.append((JsonSchema(text), f"{where}.json"))
        if form.json_object:
            given.append((JsonObject(), f"{where}.json_object"))
        if form.regex is not None:
            given.append((Regex(form.regex), f"{where}.regex"))
        if form.choice is not None:
            given.append((OneOf(tuple(form.choice)), f"{where}.choice"))
        if form.grammar is not None:
            given.append((Grammar(form.grammar), f"{where}.grammar"))
        if not given:
            say(where, "give one of json, json_object, regex, choice and grammar")
    if len(given) > 1:
        say(given[1][1], "an answer can be held to one form only")
    return given[0] if given else (None, "")
