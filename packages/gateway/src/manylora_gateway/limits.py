"""What one request may ask for, whatever the wire it came by."""

import math
import re
import uuid
from collections.abc import Callable

from manylora_gateway import constraints
from manylora_gateway.config import LimitsConfig
from manylora_gateway.engine import ChatPrompt, Prompt, Sampling, TextPrompt
from manylora_gateway.errors import InvalidRequestError, Violation

ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")

Say = Callable[[str, str], None]
"""Notes that a field is wrong: its path in the request, and why."""


class Limits:
    """Checks prompts and sampling; a wrong field is named as in the dataclasses of `engine`.

    Args:
        max_context: tokens of prompt and answer together.
    """

    def __init__(self, config: LimitsConfig, max_context: int) -> None:
        self.config = config
        self.max_tokens = min(config.max_tokens or max_context, max_context)
        self._max_context = max_context

    def check_sampling(self, sampling: Sampling, say: Say) -> None:
        """Says what of `sampling` is wrong."""
        limits = self.config
        if not 1 <= sampling.max_tokens <= self.max_tokens:
            say("max_tokens", f"must be from 1 to {self.max_tokens}")
        _within(say, "temperature", sampling.temperature, 0, MAX_TEMPERATURE)
        if not (math.isfinite(sampling.top_p) and 0 < sampling.top_p <= 1):
            say("top_p", "must be above 0 and at most 1")
        if sampling.top_k < 0:
            say("top_k", "must not be negative")
        _within(say, "min_p", sampling.min_p, 0, 1)
        _within(say, "presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _within(say, "frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        penalty = sampling.repetition_penalty
        if not (math.isfinite(penalty) and 0 < penalty <= MAX_REPETITION_PENALTY):
            say("repetition_penalty", f"must be above 0 and at most {MAX_REPETITION_PENALTY:g}")
        if not 1 <= sampling.n <= limits.max_choices:
            say("n", f"must be from 1 to {limits.max_choices}")
        elif sampling.n > 1 and sampling.temperature == 0:
            say("n", "must be 1 where temperature is 0: greedy answers are all the same")
        if len(sampling.stop) > limits.max_stop_strings:
            say("stop", f"has {len(sampling.stop)} strings; the most is {limits.max_stop_strings}")
        for index, stop in enumerate(sampling.stop[: limits.max_stop_strings]):
            if not 1 <= len(stop) <= limits.max_stop_characters:
                say(f"stop[{index}]", f"must have 1 to {limits.max_stop_characters} characters")
            _unicode(say, f"stop[{index}]", stop)
        if sampling.logprobs is not None and not 0 <= sampling.logprobs <= limits.max_logprobs:
            say("logprobs", f"must be from 0 to {limits.max_logprobs}")
        if sampling.constraint is not None:
            if sampling.ignore_eos:
                say(
                    "ignore_eos", "must be false where the answer is held to a form: its end is one"
                )
            for problem in constraints.problems(sampling.constraint, limits):
                say("constraint", problem)

    def check_prompt(self, prompt: Prompt, say: Say) -> None:
        """Says what of `prompt` is wrong, as far as can be told without a tokenizer.

        Of its messages the first mistake: a body holds a quarter of a million of them.
        """
        if isinstance(prompt, ChatPrompt):
            if not prompt.messages:
                say("messages", "must not be empty")
            for index, turn in enumerate(prompt.messages):
                if turn.role not in ROLES:
                    say(f"messages[{index}].role", f"must be one of {', '.join(ROLES)}")
                    return
                _unicode(say, f"messages[{index}].content", turn.content)
        elif isinstance(prompt, TextPrompt):
            if not prompt.text:
                say("text", "must not be empty")
            _unicode(say, "text", prompt.text)
        elif not prompt.ids:
            say("ids", "must not be empty")
        elif min(prompt.ids) < 0:
            say("ids", "must not have negative tokens")
        elif len(prompt.ids) >= self._max_context:
            count = len(prompt.ids)
            say("ids", f"has {count} tokens; with the answer the most is {self._max_context}")


def check_request_id(request_id: str) -> str:
    """`request_id` where it can be echoed and logged as it is.

    Raises:
        InvalidRequestError: it cannot.
    """
    if request_id and not REQUEST_ID.fullmatch(request_id):
        text = "must have 1 to 128 letters, digits, or characters of . _ : / -"
        raise InvalidRequestError([Violation("x-request-id", text)])
    return request_id


def _unicode(say: Say, field: str, text: str) -> None:
    """JSON can carry half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        say(field, "is not Unicode text: it has a lone surrogate, half of a character that was cut")


def request_id_to_tell(said: str) -> str:
    """What a refused request goes by: its client's name for it if that can be told, or a new id."""
    return said if REQUEST_ID.fullmatch(said) else uuid.uuid4().hex


def _within(say: Say, field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        say(field, f"must be from {low:g} to {high:g}")
