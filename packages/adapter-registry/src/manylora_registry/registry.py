"""The registry: publish, resolve, move aliases, materialize."""

import getpass
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from manylora_registry import materialize as files
from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import BlobStore, open_blob_store, sync
from manylora_registry.catalog import Catalog, Description, require_served
from manylora_registry.database import Database
from manylora_registry.description import check_description, one_line
from manylora_registry.errors import RegistryLocationError
from manylora_registry.location import DATABASE_FILE, locate
from manylora_registry.manifest import digest_of
from manylora_registry.reference import AdapterReference, check_adapter_name, check_alias_name
from manylora_registry.staging import stage_adapter
from manylora_registry.verify import verify
from manylora_registry.version import Adapter, AliasMove, Event, VerifyReport, Version

EVENTS_AT_ONCE = 1000
POLL_SECONDS = 0.2
_MANIFEST = "manifest.json"


class Registry:
    """Adapters and their versions; safe to share by threads and processes.

    Made by `Registry.open`; a context manager.
    """

    def __init__(self, blobs: BlobStore, database: Database) -> None:
        self._blobs = blobs
        self._database = database
        self._catalog = Catalog(database)

    @classmethod
    def open(
        cls,
        location: str | Path | None = None,
        *,
        database: str | None = None,
        blobs: str | None = None,
        create: bool = True,
    ) -> "Registry":
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
        """
        found = locate(location, database, blobs)
        if found.directory and not (found.directory / DATABASE_FILE).is_file():
            _prepare(found.directory, create=create)
        return cls(open_blob_store(found.blobs), Database(found.database, create=create))

    def close(self) -> None:
        """Closes the database connections."""
        self._database.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def publish(
        self,
        name: str,
        directory: Path,
        *,
        base: BaseModelIdentity,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        lineage: Mapping[str, str] | None = None,
    ) -> Version:
        """Adds the adapter in `directory` as the next version of `name`.

        Everything is checked before anything is visible; once this returns, the version survives
        a power cut, and before that a crash leaves no trace but unreferenced blobs. The same
        files published again under the same name are the version they were, described as at
        first.

        Args:
            name: the adapter; made if it is new.
            directory: `adapter_config.json`, `adapter_model.safetensors`, perhaps `README.md`.
            base: the base model it was trained on.
            metrics: finite numbers, e.g. `{"validation_loss": 0.31}`.
            tags: short texts.
            lineage: where it came from, e.g. `{"run": …, "recipe": "sha256:…"}`.

        Raises:
            InvalidNameError: an adapter may not be called `name`.
            InvalidAdapterError: it may not be served; carries every problem.
            WrongBaseError: it says itself that it was made for another base.
        """
        check_adapter_name(name)
        description = Description(metrics or {}, tags or {}, lineage or {})
        wrong = check_description(description.metrics, description.tags, description.lineage)
        with self._blobs.staging() as staging:
            manifest = stage_adapter(name, directory, staging, base, wrong)
            content = manifest.to_bytes()
            (staging / _MANIFEST).write_bytes(content)
            for file in manifest.files:
                self._blobs.put(staging / file.title, file.digest)
            self._blobs.put(staging / _MANIFEST, digest_of(content))
            return self._catalog.add(name, digest_of(content), manifest, description)

    def resolve(self, reference: str | AdapterReference, *, base: str | None = None) -> Version:
        """The version a reference means now, if it may be served.

        Args:
            reference: `NAME[@SELECTOR]`.
            base: fingerprint of the base it must belong to.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
            YankedError: the version was withdrawn.
            WrongBaseError: it belongs to another base than `base`.
        """
        version = self.find(reference)
        require_served(version)
        if base is not None:
            version.require_base(base)
        return version

    def find(self, reference: str | AdapterReference) -> Version:
        """Like `resolve`, to look at and not to serve: finds withdrawn versions too.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
        """
        return self._catalog.find(_reference(reference))

    def adapters(self) -> list[Adapter]:
        """Every adapter with its latest version and its aliases, by name."""
        return self._catalog.adapters()

    def versions(self, name: str) -> list[Version]:
        """Every version of an adapter, from 1 upwards, withdrawn ones too.

        Raises:
            InvalidNameError: an adapter cannot be called that.
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._catalog.versions(name)

    def set_alias(
        self,
        name: str,
        alias: str,
        selector: int | str,
        *,
        expect: int | None = None,
        actor: str | None = None,
        why: str = "",
    ) -> AliasMove:
        """Points an alias at a version; every call is a move and is kept in the history.

        Args:
            name: the adapter.
            alias: the alias, e.g. `production`; made if it is new.
            selector: the version: its number, its digest, or another alias.
            expect: the generation the alias must be at, 0 for one that must be new; None for any.
            actor: who moves it; else the user and host of this process.
            why: the reason, for the history; one line.

        Raises:
            InvalidNameError: an adapter or an alias cannot be called that.
            InvalidReferenceError: `selector` selects no version.
            NotFoundError: no such adapter, version or alias.
            YankedError: the version was withdrawn.
            AliasConflictError: the alias is not at the expected generation; nothing was changed.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        return self._catalog.move(
            name,
            alias,
            str(selector),
            expect=expect,
            actor=one_line(actor or _this_user()),
            why=one_line(why),
        )

    def history(self, name: str) -> list[AliasMove]:
        """Every move of an adapter's aliases, oldest first.

        Raises:
            InvalidNameError: an adapter cannot be called that.
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._catalog.history(name)

    def materialize(self, version: Version, directory: Path) -> Path:
        """Makes `directory/<hexadecimal digest>/` with the version's verified files.

        Atomic, and cheap if it is there already (see `manylora_registry.materialize` for when an
        existing one is trusted). Safe with any number of threads and processes.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
        """
        return files.materialize(self._blobs, version.digest, directory)

    def export(self, version: Version, directory: Path) -> None:
        """Writes the version as an adapter directory, which publishes to the same digest.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            DestinationError: `directory` exists and is not empty, or cannot be written.
        """
        files.export(self._blobs, version.digest, directory)

    def events(self, since: int = 0, limit: int = EVENTS_AT_ONCE) -> list[Event]:
        """What happened after event number `since`, in order, at most `limit` events."""
        return self._catalog.events(since, limit)

    def watch(
        self,
        since: int = 0,
        *,
        stop: threading.Event | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> Iterator[Event]:
        """Events after number `since` as they happen, in order, until `stop` is set."""
        stop = stop or threading.Event()
        while not stop.is_set():
            found = self.events(since)
            for event in found:
                since = event.sequence
                yield event
            if not found:
                stop.wait(poll_seconds)

    def yank(self, reference: str | AdapterReference) -> Version:
        """Withdraws a version: it resolves no more, aliases at it included; its bytes are kept.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
        """
        return self._catalog.yank(_reference(reference))

    def verify(self) -> VerifyReport:
        """Checks every byte and every record; changes nothing."""
        return verify(self._blobs, self._database)


def _reference(reference: str | AdapterReference) -> AdapterReference:
    if isinstance(reference, AdapterReference):
        return reference
    return AdapterReference.parse(reference)


def _prepare(root: Path, *, create: bool) -> None:
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


def _this_user() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
