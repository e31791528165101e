"""Every error the registry states.

RegistryError
├── ConfigError                a YAML file is wrong; carries every problem at once
├── BaseError                  a directory is not a usable base model
├── RegistryLocationError      there is no registry where it was looked for
├── DatabaseUnavailableError   the registry's database cannot be reached, or is locked too long
├── DatabaseDamagedError       the registry's database is damaged, or is no database
├── SchemaTooNewError          the registry was written by a newer version of this library
├── InvalidReferenceError      a text is not NAME[@SELECTOR]
├── InvalidNameError           an adapter or alias may not be called that
├── NotFoundError
│   ├── AdapterNotFoundError   no adapter of that name
│   ├── VersionNotFoundError   the adapter has no such version
│   └── AliasNotFoundError     the adapter has no such alias
├── InvalidAdapterError        an adapter directory cannot be published; every problem at once
├── WrongBaseError             an adapter was made for another base model
├── YankedError                a version was withdrawn and is not served
│   └── DeletedError           a version was deleted; its bytes may be gone
├── UnsignedError              a signature is required, and no trusted key signed the version
├── SigningKeyError            a key to sign or to verify with cannot be used
├── DescriptionError           tags, metrics or a record cannot be kept; every problem at once
├── AliasConflictError         somebody else moved the alias first
├── AliasProtectedError        the version has not passed the gate of a protected alias
├── VersionInUseError          a version cannot be deleted while an alias needs it
├── LeaseError                 a lease was asked for that cannot be given
├── LeaseExpiredError          a lease ran out before what it protected was done
├── QueryError                 a filter or an order of `list` cannot be read
├── CorruptBlobError           stored bytes are gone or differ from their digest
├── BlobStoreError             the store of blobs cannot be reached, or refuses
├── SourceError                what is to be imported is no exported version, or damaged
└── DestinationError           a place to write a version to is taken, or cannot be written
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN_PROBLEMS = 20
SHOWN_PATHS = 3


class RegistryError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "REGISTRY"
    """For google.rpc.ErrorInfo, in UPPER_SNAKE."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception by itself is made again from its text alone, and a pool of processes hangs
        # on one that cannot be.
        return Exception.__new__, (type(self), *self.args), vars(self)


@dataclass(frozen=True)
class Problem:
    """One mistake in a config file or an adapter directory."""

    path: str
    """Dotted path of the key, or name of the file or tensor; empty for the whole."""
    message: str
    line: int | None = None

    def __str__(self) -> str:
        return _line([self])


def _line(alike: Sequence[Problem]) -> str:
    """Problems that differ in their path alone."""
    where = f"line {alike[0].line}: " if alike[0].line is not None else ""
    paths = ", ".join(_printable(problem.path) for problem in alike[:SHOWN_PATHS])
    if len(alike) > SHOWN_PATHS:
        paths += f" and {len(alike) - SHOWN_PATHS} more"
    return f"{where}{paths}: {alike[0].message}" if paths else f"{where}{alike[0].message}"


def _printable(path: str) -> str:
    """A file or a tensor may be called anything, line breaks and megabytes included."""
    return "".join(letter if letter.isprintable() else "?" for letter in path[:200])


def _told(problems: Sequence[Problem]) -> str:
    """The first problems in one line; a hostile file may have any number of them."""
    alike: dict[tuple[int | None, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.line, problem.message), []).append(problem)
    text = "; ".join(_line(group) for group in [*alike.values()][:SHOWN_PROBLEMS])
    more = sum(len(group) for group in [*alike.values()][SHOWN_PROBLEMS:])
    return f"{text}; and {more} more" if more else text


class ConfigError(RegistryError):
    """A config file has mistakes; `problems` holds them all."""

    reason = "CONFIG_INVALID"

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(f"{path}: {_told(problems)}")


class BaseError(RegistryError):
    """A directory does not hold a base model this system can use."""

    reason = "BASE_INVALID"


class RegistryLocationError(RegistryError):
    """No registry was named, or what was named is none."""

    reason = "REGISTRY_LOCATION"


class DatabaseUnavailableError(RegistryError):
    """The registry's database does not answer, or another writer kept its lock too long."""

    reason = "REGISTRY_UNAVAILABLE"

    def __init__(self, database: str, cause: str) -> None:
        super().__init__(f"the registry's database {database} cannot be used: {cause}")


class DatabaseDamagedError(RegistryError):
    """The registry's database is damaged, or what is in its place is no database."""

    reason = "REGISTRY_DAMAGED"

    def __init__(self, database: str, cause: str) -> None:
        super().__init__(
            f"the registry's database {database} is damaged: {cause}. Restore it from a backup; "
            "the blobs are not touched"
        )


class SchemaTooNewError(RegistryError):
    """The registry's database has a schema this library does not know."""

    reason = "REGISTRY_SCHEMA_TOO_NEW"


class InvalidReferenceError(RegistryError):
    """A text is not an adapter reference."""

    reason = "ADAPTER_REFERENCE_INVALID"


class InvalidNameError(RegistryError):
    """A name is not allowed for an adapter or an alias."""

    reason = "NAME_INVALID"


class NotFoundError(RegistryError):
    """A reference names something the registry does not hold."""

    reason = "NOT_FOUND"


class AdapterNotFoundError(NotFoundError):
    """No adapter has that name."""

    reason = "ADAPTER_NOT_FOUND"


class VersionNotFoundError(NotFoundError):
    """The adapter has no version of that number or digest."""

    reason = "VERSION_NOT_FOUND"


class AliasNotFoundError(NotFoundError):
    """The adapter has no such alias."""

    reason = "ALIAS_NOT_FOUND"


class InvalidAdapterError(RegistryError):
    """An adapter directory cannot be published; `problems` says everything that is wrong."""

    reason = "ADAPTER_INVALID"

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{name} cannot be published: {_told(problems)}")


class WrongBaseError(RegistryError):
    """An adapter was made for another base model than the one it is wanted for."""

    reason = "ADAPTER_WRONG_BASE"

    def __init__(self, adapter: str, made_for: str, wanted: str) -> None:
        self.made_for = made_for
        self.wanted = wanted
        super().__init__(
            f"{adapter} was made for the base {made_for}, not for {wanted}; "
            "weights, tokenizer, chat template and generation config must all be the same"
        )


class YankedError(RegistryError):
    """A version was withdrawn: its bytes are kept, but it is not served."""

    reason = "ADAPTER_YANKED"


class DeletedError(YankedError):
    """A version was deleted: it is not served, and garbage collection removes its bytes."""

    reason = "ADAPTER_DELETED"


class UnsignedError(RegistryError):
    """A signature is required, and no trusted key signed the version."""

    reason = "ADAPTER_UNSIGNED"


class SigningKeyError(RegistryError):
    """A key to sign or to verify with cannot be used."""

    reason = "SIGNING_KEY"


class DescriptionError(RegistryError):
    """Tags, metrics or an evaluation record are wrong; `problems` says everything."""

    reason = "DESCRIPTION_INVALID"

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{what} cannot be described so: {_told(problems)}")


class AliasProtectedError(RegistryError):
    """A protected alias was to move to a version without a passed gate; nothing was changed."""

    reason = "ALIAS_PROTECTED"


class VersionInUseError(RegistryError):
    """A version was to be deleted while an alias points or goes back to it; nothing was changed."""

    reason = "VERSION_IN_USE"


class LeaseError(RegistryError):
    """A lease was asked for that cannot be given."""

    reason = "LEASE_INVALID"


class LeaseExpiredError(RegistryError):
    """A lease ran out, and what it protected may have been collected."""

    reason = "LEASE_EXPIRED"


class QueryError(RegistryError):
    """A filter or an order cannot be read; the message points at the place."""

    reason = "QUERY_INVALID"


class AliasConflictError(RegistryError):
    """An alias was not at the generation the caller expected; nothing was changed."""

    reason = "ALIAS_CONFLICT"

    def __init__(self, alias: str, expected: int, generation: int) -> None:
        self.expected = expected
        self.generation = generation
        super().__init__(
            f"{alias} is at generation {generation}, not {expected}: somebody moved it meanwhile. "
            "Look at it again, then repeat with the new generation."
        )


class CorruptBlobError(RegistryError):
    """Stored bytes are missing or do not match their digest; they reach no engine."""

    reason = "ADAPTER_CORRUPT"

    def __init__(self, digest: str, what: str) -> None:
        self.digest = digest
        self.what = what
        super().__init__(
            f"stored blob {digest} {what}; publish the same adapter again to restore it, "
            "and run `manylora registry verify`"
        )


class BlobStoreError(RegistryError):
    """The store of blobs did not do what it was asked for, for now or for want of permission."""

    reason = "BLOB_STORE_UNAVAILABLE"


class SourceError(RegistryError):
    """What is to be imported is in none of the known forms, or damaged."""

    reason = "SOURCE"


class DestinationError(RegistryError):
    """A place to write a version to is taken, full or not to be written to."""

    reason = "DESTINATION"
