"""What a run writes about itself, checked where it is read: a person may have edited it."""

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Record(BaseModel):
    # What else stands in them differs from version to version.
    model_config = ConfigDict(strict=True)


class BaseRecord(_Record):
    """base.json: the base's identity."""

    fingerprint: str
    tensors: dict[str, list[int]]


class _Base(_Record):
    fingerprint: str


class _Task(_Record):
    data_fingerprint: str
    rows_skipped: int
    # Null where it was NaN, which is no JSON.
    steps: int | None = None
    init_from: str | None = None
    # From here on: how far it came, written once its steps begin.
    metrics: dict[str, float | None] = {}
    tokens: int = Field(default=0, ge=0, lt=2**63)
    seconds: FiniteFloat = 0.0
    overlong_dropped: int = 0
    overlong_truncated: int = 0
    stopped: str | None = None
    ended_early: str | None = None


class RunRecord(_Record):
    """run.json: what a run is and how far it came."""

    id: str
    status: Literal["running", "finished", "failed"]
    kind: str | None = None
    started_at: Annotated[str, AfterValidator(_moment)]
    ended_at: str | None = None
    recipe_digest: str
    base: _Base
    seed: int
    versions: dict[str, str]
    # A run that began before it was recorded has none.
    pack_tokens: int = Field(default=1, ge=1)
    changes: list[dict[str, Any]] = []
    tasks: dict[str, _Task]

    @model_validator(mode="after")
    def _tells_of_its_end(self) -> "RunRecord":
        told = {"metrics", "tokens", "seconds", "overlong_dropped", "overlong_truncated", "stopped"}
        for name, task in self.tasks.items():
            if self.status != "running" and (missing := told - task.model_fields_set):
                raise ValueError(f"tasks.{name}.{min(missing)} is missing")
        return self


class _Gpu(_Record):
    name: str


class _Environment(_Record):
    gpus: list[_Gpu] = []
    packages: dict[str, str] = {}


class _Git(_Record):
    commit: str
    branch: str | None
    dirty: bool


class _Start(_Record):
    at: str
    git: _Git | None
    environment: _Environment


class EnvironmentRecord(_Record):
    """environment.json: what a run ran on, from each start."""

    starts: list[_Start] = Field(min_length=1)


def checked(kind: type[_Record], value: Any) -> dict[str, Any]:
    """The same value, once it is seen to be such a record.

    Raises:
        ValueError: it is none; in one line, with the first field that is wrong.
    """
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"{where} is missing") from error
        if first["type"] == "value_error":
            said = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {said}" if where else said) from error
        found = json.dumps(first["input"])[:40]
        raise ValueError(f"{where or 'it'} is {found}: {first['msg']}") from error
    return value
