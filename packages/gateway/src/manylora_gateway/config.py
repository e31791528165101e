"""What a gateway is configured with: pure data, checked before anything heavy is imported."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from manylora_registry.config import ConfigModel

MAX_PORT = 65_535


_ADDRESS = re.compile(r"(?:[^\s:]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")


def _with_a_port(address: str) -> str:
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"{address!r} is no HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    # gRPC would listen on what is left of it in 16 bits.
    if int(address.rpartition(":")[2]) > MAX_PORT:
        raise ValueError(f"the port must be at most {MAX_PORT}")
    return address


Address = Annotated[str, AfterValidator(_with_a_port)]
ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
TokenRate = Annotated[float, Field(ge=0.001)]
"""One token in a quarter of an hour; of still less no client could be told when to come back."""
Weight = Annotated[float, Field(ge=0.001, le=1000)]
"""Of one beside others; of less nothing is left when it is divided by."""
AliasName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class ListenConfig(ConfigModel):
    """Where clients reach the gateway, as HOST:PORT; port 0 takes any free one."""

    inference: Address = "127.0.0.1:50051"
    """InferenceService, for clients."""
    admin: Address = "127.0.0.1:50052"
    """AdminService, for operators: bind it where only they can reach it."""
    http: Address | None = "127.0.0.1:0"
    """OpenAI's HTTP API over the same adapters; null: none."""
    metrics: Address | None = None
    """Prometheus scrapes, over HTTP. Unset: none."""
    health: Address | None = None
    """Probes, over HTTP without TLS or credentials, from the first second on: GET /health is 200
    while new requests are wanted, GET /live while the process answers. Unset: none."""


class TlsConfig(ConfigModel):
    """Certificates of all ports but those of metrics and health, PEM files."""

    certificate: Path
    """The gateway's, followed by what stands between it and its authority."""
    key: Path
    """Its private key, not encrypted."""
    client_ca: Path | None = None
    """Authorities of client certificates. With it every client must show one, on every port
    with TLS, health checks included; `listen.health` is for probes that have none."""

    def relative_to(self, directory: Path) -> "TlsConfig":
        """The same with its paths read from `directory`."""
        ca = None if self.client_ca is None else directory / self.client_ca
        return TlsConfig(
            certificate=directory / self.certificate, key=directory / self.key, client_ca=ca
        )


CPU_BATCHED_TOKENS = 256
"""By default vLLM computes 2,048 in a step, for two seconds, in which nobody gets a token."""


class EngineConfig(ConfigModel):
    """One engine replica and how many of them there are."""

    replicas: int = Field(default=1, ge=1, le=256)
    """Engine processes, each with a copy of the base."""
    slots: int = Field(default=16, ge=1, le=256)
    """Adapters that may generate at once in one replica. With fewer than requests, which are up to
    `max_concurrent` and `express`, some may wait for another's adapter to leave. The engine gets
    one more, kept for the version that replaces another."""
    host_adapters: int = Field(default=32, ge=2)
    """Adapters a replica keeps in memory, busy or idle; the longest idle goes first."""
    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Highest rank that can be loaded: every slot is this big."""
    max_context: int = Field(default=2048, ge=16)
    """Tokens of prompt and answer together."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a prompt. Unset: one less than `max_context`, so that one can be answered."""
    max_concurrent: int = Field(default=16, ge=1, le=4096)
    """Requests one replica runs in one batch; more wait."""
    express: int | None = Field(default=None, ge=0, le=4096)
    """Seats beside those for tenants and adapters that hold less than their share, so that a
    flood on another does not keep them waiting. Unset: half of `max_concurrent`."""
    max_batched_tokens: int | None = Field(default=None, ge=16)
    """Tokens one step of the engine computes at most; of longer prompts a part in each. Fewer let
    a new request, and everybody's next token, wait less. Unset: 256 on a CPU, vLLM's default on a
    GPU. Not less than all seats."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations. auto: float32 on a CPU, what the base says on a GPU. A CPU that
    multiplies bfloat16 itself (AMX) reads prompts faster in it, and takes no float16."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for attention keys and values. Unset: 1 GiB on a CPU, what `gpu_memory` leaves on a
    GPU."""
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory one replica takes."""
    gpus: int | None = Field(default=None, ge=0, le=16)
    """GPUs of one replica (tensor parallel above 1); 0: CPU. Unset: one if there are as many as
    replicas, else none."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one replica. Unset: the machine's cores shared evenly."""
    turn_s: float = Field(default=1.0, ge=0)
    """Seconds an adapter may hold its slot while another waits for one; then it takes no new
    requests until the other had its turn."""
    stream_interval_ms: float = Field(default=20.0, ge=0, le=1000)
    """Time between two deltas of a stream that is faster; tokens made meanwhile come together."""

    def on(self, gpus: int) -> "EngineConfig":
        """With what is unset as it is for a replica of so many GPUs."""
        if gpus or self.max_batched_tokens is not None:
            return self
        tokens = max(CPU_BATCHED_TOKENS, self.max_concurrent + self.express_seats)
        return self.model_copy(update={"max_batched_tokens": tokens})

    @property
    def express_seats(self) -> int:
        """Seats beside `max_concurrent`."""
        return -(-self.max_concurrent // 2) if self.express is None else self.express


class AdapterLimits(ConfigModel):
    """How much the requests for one adapter may take together; unset is no limit of its own."""

    concurrent_requests: int | None = Field(default=None, ge=1)
    """Requests running or waiting at once."""
    tokens_per_second: TokenRate | None = None
    """Prompt and generated tokens, sustained; ten seconds' worth may be spent in one burst."""
    weight: Weight = 1.0
    """Share of the engine beside other adapters when all of them wait."""


class LimitsConfig(ConfigModel):
    """What one request, and all of them together, may ask for."""

    max_requests: int = Field(default=1024, ge=1)
    """Requests running or waiting in the whole gateway. One tenant's requests for one adapter get a
    place while they hold no more than are free; more are refused with RESOURCE_EXHAUSTED."""
    each_adapter: AdapterLimits = AdapterLimits()
    """For every adapter that `adapters` does not name."""
    adapters: dict[str, AdapterLimits] = Field(default_factory=dict)
    """By adapter name."""
    max_request_bytes: int = Field(default=1 << 20, ge=1024, le=64 << 20)
    """Size of one request: a GenerateRequest, alone or in a batch, or an HTTP body."""
    max_message_bytes: int = Field(default=64 << 20, ge=1024, le=1 << 30)
    """Size of one gRPC message, thus of a whole batch. gRPC itself refuses a larger one, with
    RESOURCE_EXHAUSTED, before it is read."""
    max_batch: int = Field(default=256, ge=1)
    """Requests of one BatchGenerate. Each takes a place of its own: of more than half of
    `max_requests` for one adapter the rest fails with RESOURCE_EXHAUSTED, the others do not."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens one answer may ask for. Unset: as many as `engine.max_context`."""
    default_max_tokens: int = Field(default=256, ge=1)
    """Where a request names no max_tokens."""
    max_choices: int = Field(default=16, ge=1, le=1024)
    """Answers to one request (n)."""
    max_stop_strings: int = Field(default=16, ge=0, le=1024)
    """Stop strings of one request."""
    max_stop_characters: int = Field(default=256, ge=1)
    """Length of each of them."""
    max_logprobs: int = Field(default=20, ge=0, le=1000)
    """Candidates reported at one position."""
    stall_s: float = Field(default=60.0, gt=0)
    """Seconds a client may leave its stream unread before it is cut off: it holds a place."""
    max_constraint_bytes: int = Field(default=64 << 10, ge=1)
    """Size of a JSON Schema, a regular expression, a grammar or all strings of a choice."""
    constraints: tuple[ConstraintKind, ...] = get_args(ConstraintKind)
    """Kinds of structured output that clients may ask for; empty: none. A grammar or a regular
    expression, also as the `pattern` of a schema, can hold up an engine for everybody."""


class FollowConfig(ConfigModel):
    """How the gateway keeps up with the registry."""

    aliases: tuple[AliasName, ...] = ("production",)
    """Aliases prepared as soon as they move, of every adapter; any other from its first request."""
    poll_s: float = Field(default=0.5, gt=0)
    """Seconds between two looks at the registry's events."""
    max_stale_s: float = Field(default=86_400.0, gt=0)
    """Seconds that references go on meaning what they last meant while the registry cannot be
    read; then requests fail with UNAVAILABLE until it can."""


class TracingConfig(ConfigModel):
    """OpenTelemetry."""

    endpoint: str | None = None
    """Where spans are exported to by OTLP over gRPC, e.g. "http://127.0.0.1:4317". Unset: none."""
    sample: float = Field(default=1.0, ge=0, le=1)
    """Share of the traces that begin here; a caller's own decision is followed."""


class LogConfig(ConfigModel):
    """Lines on stderr."""

    format: Literal["text", "json"] = "text"
    """Text for people, or one JSON object a line for machines."""
    requests: bool = False
    """One line for each request that ended: ids, tenant, version, code, times and tokens."""


class MetricsConfig(ConfigModel):
    """What Prometheus gets."""

    max_versions: int = Field(default=100, ge=1, le=10_000)
    """Adapter versions with a label of their own; the others share one."""


class GatewayConfig(ConfigModel):
    """The whole file. Paths are relative to it."""

    base: Path
    """Directory of the base model."""
    registry: Path | None = None
    """Directory of the adapter registry; unset: the MANYLORA_REGISTRY variables."""
    cache: Path | None = None
    """Directory for verified copies of adapter versions; unset: a temporary one of this run."""
    cache_gib: float = Field(default=20.0, gt=0)
    """Size of `cache`: beyond it the copies longest unused go. Those of loaded adapters stay."""
    listen: ListenConfig = ListenConfig()
    """Where clients reach it."""
    tls: TlsConfig | None = None
    """The certificates of its ports. Unset: plain text on every port."""
    tenants: Path | None = None
    """YAML file of who may call; see docs/serving-api.md. Unset: everybody, with every right."""
    engine: EngineConfig = EngineConfig()
    """The engine replicas."""
    limits: LimitsConfig = LimitsConfig()
    """What clients may ask for."""
    follow: FollowConfig = FollowConfig()
    """How it keeps up with the registry."""
    tracing: TracingConfig = TracingConfig()
    """Where traces go."""
    log: LogConfig = LogConfig()
    """What is logged, and how."""
    metrics: MetricsConfig = MetricsConfig()
    """What is counted for Prometheus."""
    state: Path | None = None
    """Directory for what must survive a restart: rollouts. Unset: they end with the gateway."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that running requests may take to end after SIGTERM."""
    ray_address: str | None = None
    """A running Ray cluster to join, e.g. "auto"; unset: a private one on this machine."""
    ray_application: str | None = Field(default=None, min_length=1)
    """A Serve application in that cluster that holds the engine replicas, made by
    `manylora_gateway.application:engines`; the gateway waits for it, calls it and leaves it as it
    is. Unset: replicas of the gateway's own, which end with it."""

    @model_validator(mode="after")
    def _an_application_is_in_a_cluster(self) -> Self:
        if self.ray_application is not None and self.ray_address is None:
            raise ValueError("ray_application is in the cluster that ray_address names: give both")
        return self

    @property
    def base_name(self) -> str:
        """What HTTP clients call the base: the name of its directory, or of the link to it."""
        return Path(os.path.normpath(self.base)).name

    def relative_to(self, directory: Path) -> "GatewayConfig":
        """The same with its paths read from `directory`."""
        return self.model_copy(
            update={
                "base": directory / self.base,
                "registry": None if self.registry is None else directory / self.registry,
                "cache": None if self.cache is None else directory / self.cache,
                "tenants": None if self.tenants is None else directory / self.tenants,
                "tls": None if self.tls is None else self.tls.relative_to(directory),
                "state": None if self.state is None else directory / self.state,
            }
        )
