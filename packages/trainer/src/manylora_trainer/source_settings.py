"""Settings of where a task's rows come from. Credentials never stand in them: see `SqlSource`."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manylora_registry.config import ConfigModel

ENVIRONMENT_VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a setting names a value that stays in the environment."""
Locations = str | tuple[str, ...]
"""One path, glob or URI, or several."""


class PythonSource(ConfigModel):
    """Rows from a Python generator function."""

    kind: Literal["python"]
    file: Path
    """Python file, relative to the recipe."""
    function: str = Field(min_length=1)
    """Function in it that takes no arguments and yields a mapping a row, the same at each call."""

    def relative_to(self, directory: Path) -> "PythonSource":
        """The same with its file found from `directory`."""
        return self.model_copy(update={"file": directory / self.file.expanduser()})


class _Files(ConfigModel):
    path: Locations = Field(min_length=1)
    """File or glob (`*`, `**`), relative to the recipe, or a URI such as `s3://bucket/rows-*`; a
    list for several. Files are read in the order given, those of a glob sorted by name."""

    @field_validator("path")
    @classmethod
    def _without_credentials(cls, value: Locations) -> Locations:
        for location in [value] if isinstance(value, str) else value:
            if not location:
                raise ValueError("a path is empty")
            if re.match(r"\w+://[^/?]*:[^/?]*@", location):
                raise ValueError(
                    "credentials do not belong in a recipe: leave them to the environment "
                    "(AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance's role)"
                )
        return value

    @property
    def locations(self) -> tuple[str, ...]:
        """The paths, always as several."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def relative_to(self, directory: Path) -> Any:
        """The same with its files found from `directory`."""
        found = tuple(resolve_location(location, directory) for location in self.locations)
        return self.model_copy(update={"path": found[0] if isinstance(self.path, str) else found})


class JsonlSource(_Files):
    """Rows from files with one JSON object a line; `.gz` and `.zst` are decompressed."""

    kind: Literal["jsonl"]


class ParquetSource(_Files):
    """Rows from Parquet files, read one row group at a time."""

    kind: Literal["parquet"]


class SqlSource(ConfigModel):
    """Rows of a database, in the order of a unique key, read page by page."""

    kind: Literal["sql"]
    url: str | None = None
    """SQLAlchemy URL. `${NAME}` is replaced by that environment variable when the database is
    opened, e.g. `postgresql+psycopg://reader:${PGPASSWORD}@db/shop`, and never written anywhere."""
    url_env: str | None = None
    """Instead of `url`: the environment variable that holds the whole URL."""
    table: str | None = Field(default=None, min_length=1)
    """Table or view to read, `NAME` or `SCHEMA.NAME`."""
    query: str | None = Field(default=None, min_length=1)
    """Instead of `table`: a SELECT, without ORDER BY. It becomes a subquery."""
    key: str = Field(min_length=1)
    """Column of the result that is unique, never NULL, and best indexed: the order of the rows."""
    page_rows: int = Field(default=10_000, ge=1)
    """Rows fetched at once. No connection is held between pages."""

    @field_validator("url")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        if value is not None:
            _check_url(value)
        return value

    @model_validator(mode="after")
    def _one_of_each(self) -> "SqlSource":
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give either url or url_env")
        if (self.table is None) == (self.query is None):
            raise ValueError("give either table or query")
        return self

    def relative_to(self, directory: Path) -> "SqlSource":
        """The same with a SQLite file found from `directory`."""
        # After `file:` as well, with which SQLite takes its own options: ?mode=ro&uri=true.
        match = re.fullmatch(
            r"(sqlite(?:\+\w+)?:///(?:file:)?)((?!file:)[^/:?$][^?]*)(\?.*)?", self.url or ""
        )
        if match is None:
            return self
        start, file, end = match.groups()
        return self.model_copy(update={"url": f"{start}{directory / file}{end or ''}"})


class DatasetsSource(ConfigModel):
    """Rows of a Hugging Face dataset on disk. Needs the extra `datasets`."""

    kind: Literal["datasets"]
    path: str = Field(min_length=1)
    """What `save_to_disk` wrote; with `builder` a file or glob. Relative to the recipe."""
    builder: str | None = None
    """Read `path` with this packaged builder of the library, e.g. `csv`, `text` or `arrow`."""
    split: str = "train"
    """Split of the dataset, where it has several."""

    def relative_to(self, directory: Path) -> "DatasetsSource":
        """The same with its path found from `directory`."""
        return self.model_copy(update={"path": resolve_location(self.path, directory)})


class RaySource(ConfigModel):
    """Rows of a Ray Data dataset, prepared by a cluster. Needs the extra `ray`."""

    kind: Literal["ray"]
    file: Path
    """Python file, relative to the recipe."""
    function: str = Field(min_length=1)
    """Function in it that takes no arguments and returns a `ray.data.Dataset`."""

    def relative_to(self, directory: Path) -> "RaySource":
        """The same with its file found from `directory`."""
        return self.model_copy(update={"file": directory / self.file.expanduser()})


class WeightedSource(ConfigModel):
    """One source of a mix."""

    weight: float = Field(default=1.0, gt=0.0)
    """Its share of the rows, relative to the other weights."""
    source: "SourceSettings"
    """Where its rows come from: any of the kinds there are."""


class MixSource(ConfigModel):
    """Rows of several sources, drawn by weight.

    A pass ends when each source has been read to its end; a shorter one begins again meanwhile.
    """

    kind: Literal["mix"]
    sources: tuple[WeightedSource, ...] = Field(min_length=2)
    """Two or more."""

    def relative_to(self, directory: Path) -> "MixSource":
        """The same with all files found from `directory`."""
        return self.model_copy(
            update={
                "sources": tuple(
                    part.model_copy(update={"source": part.source.relative_to(directory)})
                    for part in self.sources
                )
            }
        )


SourceSettings = Annotated[
    PythonSource | JsonlSource | ParquetSource | SqlSource | DatasetsSource | RaySource | MixSource,
    Field(discriminator="kind"),
]
WeightedSource.model_rebuild()
MixSource.model_rebuild()


def is_uri(location: str) -> bool:
    """Whether a location names its file system, as `s3://` does."""
    return "://" in location


def resolve_location(location: str, directory: Path) -> str:
    """A location with a relative path found from `directory`."""
    if is_uri(location):
        return location
    # Joined, not resolved further: a link in a path is the user's choice of name.
    return str(directory / Path(location).expanduser())


def _check_url(url: str) -> None:
    """Raises ValueError for a URL that cannot be read or that holds a secret."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    # A variable may stand for any part, the port too, so a digit is the one safe stand-in.
    try:
        parsed = make_url(ENVIRONMENT_VARIABLE.sub("0", url))
    except (ArgumentError, ValueError) as error:
        if ENVIRONMENT_VARIABLE.match(url):
            return
        raise ValueError("is not a SQLAlchemy URL such as postgresql+psycopg://host/db") from error
    secrets = [parsed.password, *(v for k, v in parsed.query.items() if "password" in k.lower())]
    if any(secret not in (None, "0") for secret in secrets):
        raise ValueError(
            "a password does not belong in a recipe, which is copied to every run directory: "
            "write ${NAME} for the environment variable that holds it, or use url_env"
        )
