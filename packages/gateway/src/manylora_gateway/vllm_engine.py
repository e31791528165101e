"""The engine: vLLM's AsyncLLM. vLLM is imported here and in `executor`, nowhere else."""

# vLLM and its tokenizers are not typed to the end.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false

import asyncio
import itertools
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from pydantic import ValidationError
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from manylora_gateway.config import EngineConfig
from manylora_gateway.constraints import FIELDS
from manylora_gateway.cpu_lora import plugin
from manylora_gateway.engine import (
    Candidate,
    ChatPrompt,
    Constraint,
    Delta,
    Finish,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Prompt,
    Regex,
    Sampling,
    TextPrompt,
    TokenLogprobs,
)
from manylora_gateway.environment import require_libnuma
from manylora_gateway.errors import (
    AdapterLoadError,
    InvalidRequestError,
    ReplicaLostError,
    StartError,
    Violation,
)
from manylora_gateway.executor import LocalExecutor
from manylora_gateway.refusals import by_our_names

GIB = 1 << 30
MAX_LOGPROBS = 1000
CODE_PLACE = re.compile(r"\[[0-9:]+\] \S+:\d+: ")
"""Where in its own source xgrammar found what it complains of."""
SEED_MASK = (1 << 62) - 1
"""Seeds are signed in 64 bits, and vLLM adds the index of the answer: one that is too big ends the
engine of a GPU for everybody."""

logger = logging.getLogger(__name__)


class VllmEngine:
    """The `Engine` of production. Made on the event loop it is used on.

    Args:
        base: directory of the base model.
        gpus: GPUs of this replica; 0 runs on the CPU.

    Raises:
        StartError: the LoRA kernels would be vLLM's own on a CPU, without being asked for, the
            machine lacks a library, a CPU is asked for float16, or vLLM refuses the base or the
            settings.
    """

    def __init__(self, base: Path, config: EngineConfig, gpus: int) -> None:
        if not gpus:
            require_libnuma()
            _require_range(config)
        self._max_context = config.max_context
        self._max_prompt = min(
            config.max_prompt_tokens or config.max_context, config.max_context - 1
        )
        self._interval_s = config.stream_interval_ms / 1000
        self._requests: dict[str, LoRARequest] = {}
        # Never reused: vLLM knows weights by this number in its caches.
        self._numbers = itertools.count(1)
        # On a CPU vLLM's own LoRA kernels answer with wrong adapters: never serve with them unseen.
        logger.info("LoRA kernels: %s", plugin.check())
        try:
            self._llm = AsyncLLM.from_engine_args(_arguments(base, config, gpus))
        except ValidationError as error:
            raise StartError(f"vLLM refuses it: {_refusal(error)}") from error
        self._tokenizer = self._llm.get_tokenizer()
        self._vocabulary = len(self._tokenizer)

    async def load(self, name: str, directory: Path) -> None:
        """Brings an adapter into host memory and a slot; `generate` never loads one.

        A LoRARequest that vLLM cannot load while it generates kills it for good, whereas
        `add_lora` only raises.
        """
        request = LoRARequest(name, next(self._numbers), str(directory))
        try:
            await self._llm.add_lora(request)
        except EngineDeadError as error:
            raise ReplicaLostError("The engine died.") from error
        except Exception as error:
            raise AdapterLoadError(f"The engine refused {name}: {error}") from error
        self._requests[name] = request

    async def unload(self, name: str) -> None:
        """Forgets an adapter that no generation uses."""
        request = self._requests.pop(name, None)
        if request is not None:
            await self._llm.remove_lora(request.lora_int_id)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The prompt as the engine reads it, the chat template of the base applied."""
        if isinstance(prompt, ChatPrompt):
            field, ids = "chat.messages", self._render(prompt)
        elif isinstance(prompt, TextPrompt):
            field, ids = "text", self._tokenizer.encode(prompt.text)
        else:
            field, ids = "tokens.ids", list(prompt.ids)
            if max(ids, default=0) >= self._vocabulary:
                text = f"token {max(ids)} is not in the vocabulary of {self._vocabulary}"
                raise InvalidRequestError([Violation(field, text)])
        if not 0 < len(ids) <= self._max_prompt:
            text = f"has {len(ids)} tokens; must have 1 to {self._max_prompt}"
            raise InvalidRequestError([Violation(field, text)])
        return ids

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Sampling,
        adapter: str | None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; a stream that is faster than the configured interval gets a delta each."""
        outputs = self._llm.generate(
            tokens_input(token_ids),
            sampling_params(sampling, self._max_context - len(token_ids), self._vocabulary),
            request_id,
            lora_request=None if adapter is None else self._requests[adapter],
            priority=priority,
        )
        completion_tokens = [0] * sampling.n
        previous = -math.inf
        try:
            async with aclosing(outputs) as stream:
                async for output in stream:
                    began = time.monotonic()
                    # An engine that takes longer by itself is not waited for: a timer a token
                    # would wake this process between its steps.
                    fast, previous = began - previous < 2 * self._interval_s, began
                    for part in output.outputs:
                        completion_tokens[part.index] += len(part.token_ids)
                        yield Delta(
                            text=part.text,
                            token_ids=tuple(part.token_ids),
                            logprobs=_logprobs(part, sampling.logprobs),
                            finish=_finish(
                                part, sampling, len(token_ids), completion_tokens[part.index]
                            ),
                            choice=part.index,
                        )
                    # What vLLM makes meanwhile it merges into one output.
                    if fast and not output.finished:
                        await asyncio.sleep(self._interval_s - (time.monotonic() - began))
        except EngineDeadError as error:
            raise ReplicaLostError("The engine died.") from error
        except VLLMValidationError as error:
            raise InvalidRequestError([_violation(error, sampling)]) from error

    def check_health(self) -> None:
        """Raises once the engine process is dead."""
        if self._llm.errored:
            raise ReplicaLostError("The engine died.")

    async def close(self) -> None:
        """Ends the engine process."""
        await asyncio.to_thread(self._llm.shutdown)

    def _render(self, prompt: ChatPrompt) -> list[int]:
        messages: list[Any] = [
            {"role": turn.role, "content": turn.content} for turn in prompt.messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert isinstance(text, str)
        except (TemplateError, ValueError) as error:
            text = f"the base's chat template refuses it: {error}"
            raise InvalidRequestError([Violation("chat.messages", text)]) from error
        # The template writes the special tokens itself.
        return self._tokenizer.encode(text, add_special_tokens=False)


def _require_range(config: EngineConfig) -> None:
    """Sees that what an adapter makes of the activations cannot overflow.

    vLLM's attention on a CPU would give the NaN that comes of it to other requests (decision 0004).

    Raises:
        StartError: it can.
    """
    if config.dtype == "float16":
        raise StartError(
            "engine.dtype: in float16 one adapter could spoil the answers of others on a CPU; "
            "take bfloat16, or float32"
        )


def _refusal(error: ValidationError) -> str:
    """The first sentence of what vLLM finds; behind it are lists and advice of other programs."""
    (first, *_) = error.errors()
    text = first["msg"].removeprefix("Value error, ").strip()
    return by_our_names(text.splitlines()[0].partition(". ")[0])


def _arguments(base: Path, config: EngineConfig, gpus: int) -> AsyncEngineArgs:
    cpu = gpus == 0
    kv_cache_gib = config.kv_cache_gib or (1.0 if cpu else None)
    return AsyncEngineArgs(
        model=str(base),
        # bf16 without bf16 instructions is three times slower than float32.
        dtype="float32" if cpu and config.dtype == "auto" else config.dtype,
        max_model_len=config.max_context,
        max_num_seqs=config.max_concurrent + config.express_seats,
        max_num_batched_tokens=config.max_batched_tokens,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        enforce_eager=cpu,
        kv_cache_memory_bytes=None if kv_cache_gib is None else round(kv_cache_gib * GIB),
        gpu_memory_utilization=config.gpu_memory,
        tensor_parallel_size=max(1, gpus),
        distributed_executor_backend=LocalExecutor if gpus <= 1 else "mp",
        enable_lora=True,
        max_lora_rank=config.max_rank,
        max_loras=config.slots + 1,
        max_cpu_loras=max(config.host_adapters, config.slots + 1),
        # What `limits.max_logprobs` may be at most; the front refuses what is above it.
        max_logprobs=MAX_LOGPROBS,
        # One backend for all requests: left to choose, vLLM takes that of the first request.
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar"),
        disable_log_stats=True,
        enable_log_requests=False,
    )


def sampling_params(sampling: Sampling, room: int, vocabulary: int) -> SamplingParams:
    """What vLLM calls `sampling`, where `room` tokens are left for an answer."""
    return SamplingParams(
        max_tokens=min(sampling.max_tokens, room),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=min(sampling.top_k, vocabulary),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        n=sampling.n,
        seed=None if sampling.seed is None else sampling.seed & SEED_MASK,
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        structured_outputs=(
            None if sampling.constraint is None else _structured(sampling.constraint)
        ),
        output_kind=RequestOutputKind.DELTA,
    )


def _structured(constraint: Constraint) -> StructuredOutputsParams:
    match constraint:
        case JsonSchema(schema):
            return StructuredOutputsParams(json=schema)
        case JsonObject():
            return StructuredOutputsParams(json_object=True)
        case Regex(pattern):
            return StructuredOutputsParams(regex=pattern)
        case OneOf(values):
            return StructuredOutputsParams(choice=list(values))
        case Grammar(text):
            return StructuredOutputsParams(grammar=text)


def _violation(error: VLLMValidationError, sampling: Sampling) -> Violation:
    """What vLLM refused; all that our own checks leave to it is the constraint."""
    field = "sampling" if sampling.constraint is None else FIELDS[type(sampling.constraint)]
    text, cause = str(error), str(error.__cause__ or "")
    # Of a grammar vLLM itself says no more than that it is invalid.
    if cause not in text:
        text = f"{text.rstrip('.')}: {cause}"
    return Violation(field, CODE_PLACE.sub("", text).strip())


def _finish(
    part: CompletionOutput, sampling: Sampling, prompt_tokens: int, completion_tokens: int
) -> Finish | None:
    if part.finish_reason is None:
        return None
    if part.finish_reason == "error" and sampling.constraint is not None:
        text = "the engine cannot hold an answer to it"
        raise InvalidRequestError([Violation(FIELDS[type(sampling.constraint)], text)])
    if part.finish_reason not in ("stop", "length"):
        raise ReplicaLostError(f"The engine ended the request: {part.finish_reason}.")
    return Finish(part.finish_reason, prompt_tokens, completion_tokens)


def _logprobs(part: CompletionOutput, wanted: int | None) -> tuple[TokenLogprobs, ...]:
    if wanted is None:
        return ()
    entries = cast("Sequence[Mapping[int, Logprob]]", part.logprobs or ())
    return tuple(
        _token_logprobs(token, entry, wanted)
        for token, entry in zip(part.token_ids, entries, strict=True)
    )


def _token_logprobs(token: int, entry: Mapping[int, Logprob], wanted: int) -> TokenLogprobs:
    # vLLM adds the taken token to the likeliest ones, of whatever rank.
    ranked = sorted((info.rank or 0, other) for other, info in entry.items())
    return TokenLogprobs(
        chosen=_candidate(token, entry[token]),
        top=tuple(_candidate(other, entry[other]) for _, other in ranked[:wanted]),
    )


def _candidate(token: int, info: Logprob) -> Candidate:
    return Candidate(token, info.logprob, info.decoded_token or "")
