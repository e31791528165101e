"""Where a registry is: one directory, or a database and a blob store that are named by URLs."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from manylora_registry.errors import RegistryLocationError
from manylora_registry.syncs import sync

DIRECTORY_VARIABLE = "MANYLORA_REGISTRY"
DATABASE_VARIABLE = "MANYLORA_REGISTRY_DATABASE"
BLOBS_VARIABLE = "MANYLORA_REGISTRY_BLOBS"
DATABASE_FILE = "registry.sqlite"
_URL = re.compile(r"[a-z][a-z0-9+]+:/")
"""How a URL begins; a `Path` has lost one of its slashes."""
_DRIVERS = {
    "sqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}


@dataclass(frozen=True)
class Location:
    """Database and blobs of one registry."""

    database: URL
    blobs: str
    """URL of the blob store."""
    directory: Path | None
    """The directory that holds both, of an embedded registry."""


def locate(
    directory: str | Path | None = None, database: str | None = None, blobs: str | None = None
) -> Location:
    """The registry that was named, else the one in the environment.

    Raises:
        RegistryLocationError: none was named, or two, or half of one, or what names nothing.
    """
    if not (directory or database or blobs):
        directory = os.environ.get(DIRECTORY_VARIABLE)
        database = os.environ.get(DATABASE_VARIABLE)
        blobs = os.environ.get(BLOBS_VARIABLE)
    if any("\0" in str(part) for part in (directory, database, blobs)):
        raise RegistryLocationError("a registry was named with a NUL in it, which no path has")
    if directory and (database or blobs):
        raise RegistryLocationError(
            "two registries were named, one by its directory and one by the URLs of its database "
            f"and blobs: keep either {DIRECTORY_VARIABLE} or both {DATABASE_VARIABLE} and "
            f"{BLOBS_VARIABLE}"
        )
    if directory:
        if _URL.match(str(directory)):
            # Not repeated: there may be a password in it.
            raise RegistryLocationError(
                "a URL was given where the directory of a registry belongs: name a shared one by "
                f"{DATABASE_VARIABLE} and {BLOBS_VARIABLE}, or as DATABASE,BLOBS to "
                "`manylora registry copy`"
            )
        root = Path(directory)
        file = URL.create("sqlite", database=str(root / DATABASE_FILE))
        return Location(file, root.absolute().as_uri(), root)
    if not database and not blobs:
        raise RegistryLocationError(
            f"no registry was named: set {DIRECTORY_VARIABLE}=DIR or give --registry DIR; for a "
            f"shared one set {DATABASE_VARIABLE} and {BLOBS_VARIABLE}"
        )
    if not database or not blobs:
        missing = BLOBS_VARIABLE if database else DATABASE_VARIABLE
        raise RegistryLocationError(f"half a registry was named: set {missing} too")
    return Location(_database_url(database), blobs, None)


def prepare(root: Path, *, create: bool) -> None:
    """Makes the directory of a new registry, unless something else is there.

    Raises:
        RegistryLocationError: `root` holds other things, or it may not be created.
    """
    if not create:
        raise RegistryLocationError(
            f"{root} is not a registry; publishing to it makes one (`manylora publish`)"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One that was being created when its process died, or is just now, has its lock only.
        foreign = [path.name for path in root.iterdir() if not path.name.startswith("registry.")]
        sync(root.parent)
    except OSError as error:
        raise RegistryLocationError(f"{root} cannot be a registry: {error.strerror}") from error
    if foreign:
        raise RegistryLocationError(
            f"{root} is not a registry and not empty (it holds {sorted(foreign)[0]}); "
            "give a new directory"
        )


def shown(url: URL) -> str:
    """The URL without anything that might be secret."""
    host = url.query.get("host", "")
    plain = URL.create(
        url.drivername,
        host=url.host or (host if isinstance(host, str) else host[0]) or None,
        port=url.port,
        database=url.database,
    )
    return plain.render_as_string(hide_password=True)


def _database_url(text: str) -> URL:
    # Neither the text nor the cause is repeated: there is a password in it.
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise RegistryLocationError(
            "the URL of the registry's database cannot be read: give "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or sqlite:////FILE"
        ) from None
    driver = _DRIVERS.get(url.drivername)
    if driver is None or not url.database:
        raise RegistryLocationError(
            f"{shown(url)} names no database a registry can be in: give "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or sqlite:////FILE"
        )
    return url.set(drivername=driver)
