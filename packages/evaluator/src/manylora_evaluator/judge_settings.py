"""Settings of the models that judge."""

import os
from typing import Annotated, Literal, TypeAlias

import httpx
from pydantic import Field, JsonValue, field_validator

from manylora_evaluator.errors import JudgeError
from manylora_evaluator.references import ReferenceOrBase
from manylora_evaluator.suite_path import SuitePath
from manylora_registry.config import ConfigModel


class _Model(ConfigModel):
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of one verdict."""
    temperature: float = Field(default=0, ge=0)
    """0: greedy; more than one sample needs more than 0."""
    concurrency: int = Field(default=8, ge=1)
    """Most requests under way at once."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(default=3, ge=0)
    """Further attempts when the model is overloaded, fails or does not answer in time."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Seconds before the second attempt, doubled for each further one; a longer wait the server
    asks for is kept, up to a minute."""
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How the verdict's form is asked for: by its schema, as JSON, or in the prompt alone."""
    prompt_price: float = Field(default=0, ge=0)
    """Of a million prompt tokens, in any currency."""
    completion_price: float = Field(default=0, ge=0)
    """Of a million tokens made, in the same."""
    cache: SuitePath | None = None
    """Directory that keeps verdicts by content, relative to the suite; unset: in that of
    `--out`, until the evaluation is whole. It knows an adapter by its digest, but another model by
    its address and name alone."""


class GatewayModel(_Model):
    """A manylora gateway: the bare base or an adapter."""

    kind: Literal["gateway"]
    adapter: ReferenceOrBase = ""
    """Adapter reference, resolved once; empty: the bare base."""
    server: str | None = None
    """HOST:PORT; unset: the gateway that is evaluated."""


class OpenAIModel(_Model):
    """An endpoint that speaks OpenAI's chat completions."""

    kind: Literal["openai"]
    url: str = Field(pattern=r"^https?://\S+$")
    """Up to `/v1`; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """As the endpoint calls it."""
    api_key_env: str | None = None
    """Environment variable that holds the key; unset: none is sent."""

    body: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    """Fields that are added to each request, or replace one of ours; null leaves one out, e.g.
    `{max_tokens: null, max_completion_tokens: 512}` where an endpoint wants the other name."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"is no URL: {error}") from error
        return value

    def api_key(self) -> str | None:
        """The key.

        Raises:
            JudgeError: the environment does not hold it, or one that cannot be sent.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise JudgeError(f"the judge {self.model} needs a key: set {self.api_key_env}")
        if not (key.isascii() and key.isprintable()):
            raise JudgeError(f"the key in {self.api_key_env} has characters that cannot be sent")
        return key


JudgeModel: TypeAlias = Annotated[GatewayModel | OpenAIModel, Field(discriminator="kind")]
