"""What a registry tells: versions, where aliases point, files, and what happened."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from manylora_registry.aliases import Aliases
from manylora_registry.blobs import BlobStore
from manylora_registry.cache import Cache
from manylora_registry.catalog import Catalog
from manylora_registry.database import Database
from manylora_registry.deployments import Deployments
from manylora_registry.diff import VersionDiff, diff
from manylora_registry.evaluations import Evaluations
from manylora_registry.files import Files
from manylora_registry.location import DATABASE_FILE, locate, prepare
from manylora_registry.query import find_versions
from manylora_registry.reference import AdapterReference, check_adapter_name
from manylora_registry.rows import require_served
from manylora_registry.signatures import Signatures
from manylora_registry.stores import open_blob_store
from manylora_registry.version import (
    Adapter,
    Alias,
    AliasMove,
    Deployment,
    Evaluation,
    Event,
    Protection,
    Version,
    VersionPage,
)

EVENTS_AT_ONCE = 1000
MOST_EVENTS = (1 << 63) - 1
POLL_SECONDS = 1.0


class Reading:
    """The half of `Registry` that changes nothing in it."""

    def __init__(self, blobs: BlobStore, database: Database) -> None:
        self.blobs = blobs
        """Where the bytes are; for this package."""
        self.database = database
        """What is known of them; for this package."""
        self.signatures = Signatures(blobs, database)
        """Who signed what, and who must have."""
        self._catalog = Catalog(database)
        self._files = Files(blobs, self._catalog)
        self._aliases = Aliases(database)
        self._evaluations = Evaluations(database)
        self._deployments = Deployments(database)

    @classmethod
    def open(
        cls,
        location: str | Path | None = None,
        *,
        database: str | None = None,
        blobs: str | None = None,
        create: bool = True,
    ) -> Self:
        """Opens a registry: the one in a directory, or a shared one by its two URLs.

        What is not given comes from the environment: `$MANYLORA_REGISTRY`, a directory, or
        `$MANYLORA_REGISTRY_DATABASE` and `$MANYLORA_REGISTRY_BLOBS`.

        Args:
            location: the directory; a new or an empty one becomes a registry.
            database: `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`, or `sqlite:////FILE`.
            blobs: `s3://BUCKET/PREFIX`, or `file:///DIR`.
            create: False to refuse what is not a registry yet.

        Raises:
            RegistryLocationError: no registry was named, or something else is there.
            SchemaTooNewError: it was written by a newer version of this library.
            DatabaseUnavailableError: the database cannot be reached.
            DatabaseDamagedError: it is damaged, or no database.
        """
        found = locate(location, database, blobs)
        if found.directory and not (found.directory / DATABASE_FILE).is_file():
            prepare(found.directory, create=create)
        return cls(open_blob_store(found.blobs), Database(found.database, create=create))

    def close(self) -> None:
        """Closes the database connections and gives back what is held in the cache."""
        self._files.close()
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def resolve(self, reference: str | AdapterReference, *, base: str | None = None) -> Version:
        """The version a reference means now, if it may be served.

        Args:
            reference: `NAME[@SELECTOR]`.
            base: fingerprint of the base it must belong to.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
            YankedError: the version was withdrawn, or DeletedError: deleted.
            WrongBaseError: it belongs to another base than `base`.
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        version = self.find(reference)
        require_served(
            f"{version.name}@{version.number}", yanked=version.yanked, deleted=version.deleted
        )
        self.signatures.check(version)
        if base is not None:
            version.require_base(base)
        return version

    def find(self, reference: str | AdapterReference) -> Version:
        """Like `resolve`, to look at and not to serve: finds what is withdrawn or deleted too.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
        """
        return self._catalog.find(reference_to(reference))

    def adapters(self, *, limit: int | None = None, after: str | None = None) -> list[Adapter]:
        """Adapters with their latest version and their aliases, by name.

        Args:
            limit: at most so many; None for all.
            after: only those behind this name, to go on from a page.

        Raises:
            InvalidNameError: `after` is no name.
        """
        if after is not None:
            check_adapter_name(after)
        return self._catalog.adapters(limit, after)

    def versions(self, name: str) -> list[Version]:
        """Every version of an adapter, from 1 upwards, withdrawn and deleted ones too.

        Raises:
            InvalidNameError: an adapter cannot be called that.
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._catalog.versions(name)

    def aliases(self, name: str) -> Mapping[str, Alias]:
        """The aliases of an adapter and where they point.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._catalog.aliases(name)

    def find_versions(
        self, where: str = "", *, sort: str = "name", limit: int = 100, after: str | None = None
    ) -> VersionPage:
        """A page of the versions that match, deleted ones left out.

            registry.find_versions("tag.lang=en and metric.f1>0.8", sort="-metric.f1")

        Args:
            where: the filter; its grammar stands in `manylora_registry.where`.
            sort: name, created, metric.KEY or tag.KEY, ascending; with a '-' before it
                descending. Versions without the metric or the tag are left out.
            limit: at most so many, up to 1000.
            after: `next` of the page before.

        Raises:
            QueryError: one of them cannot be read; says where.
        """
        return find_versions(self.database, where, sort, limit, after)

    def history(self, name: str) -> list[AliasMove]:
        """Every move of an adapter's aliases, oldest first.

        Raises:
            InvalidNameError: an adapter cannot be called that.
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._aliases.history(name)

    def way(self, name: str, alias: str) -> list[Version]:
        """The versions `alias` came by to the one it points at, which is the last.

        Moving to a version that it pointed at before undoes everything since: one that was
        rolled back from is not among them.

        Raises:
            AliasNotFoundError: there is no such alias.
            AdapterNotFoundError: there is no such adapter.
        """
        numbers = self._aliases.way(name, alias)
        versions = self._catalog.versions(name)
        return [versions[number - 1] for number in numbers]

    def before(self, name: str, alias: str) -> Version | None:
        """Where a rollback of `alias` goes, past versions that were withdrawn.

        None: it was moved back already, and what it points at was not withdrawn.

        Raises:
            VersionNotFoundError: there is no version to go back to.
            AliasNotFoundError: there is no such alias.
            AdapterNotFoundError: there is no such adapter.
        """
        number, _ = self._aliases.before(name, alias)
        return None if number is None else self.find(AdapterReference(name, str(number)))

    def protections(self, name: str) -> list[Protection]:
        """The protections of an adapter's aliases, by alias.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._aliases.protections(name)

    def evaluations(self, version: Version | str | AdapterReference) -> list[Evaluation]:
        """The evaluation records of a version, oldest first.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._evaluations.of(reference_to(version))

    def deployments(
        self, name: str | None = None, *, stage: str | None = None, limit: int | None = None
    ) -> list[Deployment]:
        """The newest records of deployments, oldest first.

        Args:
            name: only those about this adapter.
            stage: only those of this stage.
            limit: at most so many; None: all.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        return self._deployments.all(name, stage, limit)

    def materialize(self, version: Version, directory: Path | None = None) -> Path:
        """Makes `directory/<hexadecimal digest>/` with the version's verified files.

        Atomic, and cheap if it is there already (see `manylora_registry.materialize` for when an
        existing one is trusted). Safe with any number of threads and processes.

        Args:
            version: one of this registry.
            directory: yours to clear; else `Cache.from_environment()`, where it is held until
                this registry is closed.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            BlobStoreError: it cannot be read.
            DestinationError: the directory is full or cannot be written.
            DeletedError: the version was deleted and its bytes were collected.
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        self.signatures.check(version)
        if directory is None:
            return self._files.held(version)
        return self._files.materialize(version, directory)

    def hold(self, version: Version, cache: Cache) -> AbstractContextManager[Path]:
        """The version's directory in a cache, which keeps it until the block ends.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            BlobStoreError: it cannot be read.
            DestinationError: the cache is full or cannot be written.
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        self.signatures.check(version)
        return self._files.hold(version, cache)

    def diff(self, before: Version, after: Version) -> VersionDiff:
        """What differs between two versions: config, description, and each module's weights.

        Raises:
            CorruptBlobError: a stored blob is damaged.
            BlobStoreError: one cannot be read.
        """
        return diff(self.blobs, before, after)

    def events(self, since: int = 0, limit: int = EVENTS_AT_ONCE) -> list[Event]:
        """What happened after event number `since`, in order, at most `limit` events."""
        # Numbers that no database has are asked for as the nearest that one may have.
        return self._catalog.events(min(max(since, 0), MOST_EVENTS), limit)

    def watch(
        self,
        since: int = 0,
        *,
        stop: threading.Event | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> Iterator[Event]:
        """Events after number `since` as they happen, in order, until `stop` is set.

        An iterator that is stopped or lost goes on where it was, given the last event's number.

        Args:
            since: number of the last event that was seen; 0 for all.
            stop: ends it soon after it is set.
            poll_seconds: look at the latest after so long, should no change be announced.

        Raises:
            DatabaseUnavailableError: the database cannot be reached.
        """
        stop = stop or threading.Event()
        # Told of changes before it looks for the first time: none falls between.
        with self.database.changes() as changes:
            while not stop.is_set():
                found = self.events(since)
                for event in found:
                    since = event.sequence
                    yield event
                if not found:
                    changes.wait(poll_seconds, stop)


def reference_to(meant: Version | str | AdapterReference) -> AdapterReference:
    """The reference to a version, however it was named.

    Raises:
        InvalidReferenceError: the text is none.
    """
    if isinstance(meant, Version):
        return AdapterReference(meant.name, str(meant.number))
    return meant if isinstance(meant, AdapterReference) else AdapterReference.parse(meant)
