"""The registry: publish, resolve, move aliases, materialize."""

import getpass
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType

from manylora_registry import materialize as files
from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import LocalBlobStore, sync
from manylora_registry.cache import Cache
from manylora_registry.catalog import Catalog, Description, require_served
from manylora_registry.copy import Progress, copy
from manylora_registry.database import Database
from manylora_registry.description import check_description, one_line
from manylora_registry.diff import VersionDiff, diff
from manylora_registry.errors import RegistryLocationError, WrongBaseError
from manylora_registry.export import Format, export
from manylora_registry.manifest import digest_of
from manylora_registry.reference import AdapterReference, check_adapter_name, check_alias_name
from manylora_registry.signatures import Signatures
from manylora_registry.signing import required_keys, sign_manifest
from manylora_registry.staging import largest_adapter, stage_adapter
from manylora_registry.unpack import unpack
from manylora_registry.verify import verify
from manylora_registry.version import Adapter, AliasMove, Event, VerifyReport, Version

LOCATION_VARIABLE = "MANYLORA_REGISTRY"
DATABASE_FILE = "registry.sqlite"
EVENTS_AT_ONCE = 1000
POLL_SECONDS = 0.2
_MANIFEST = "manifest.json"


class Registry:
    """Adapters and their versions in one directory; safe to share by threads and processes.

    Made by `Registry.open`; a context manager.
    """

    def __init__(self, blobs: LocalBlobStore, database: Database) -> None:
        self._blobs = blobs
        self._database = database
        self._catalog = Catalog(database)
        self._signatures = Signatures(blobs, database)
        self._signing_key: Path | None = None
        self._required_keys = required_keys()
        self._leases = ExitStack()
        self._held: dict[str, Path] = {}
        self._holding = threading.Lock()

    @classmethod
    def open(cls, location: str | Path | None = None, *, create: bool = True) -> "Registry":
        """Opens the registry in the directory `location`, else in `$MANYLORA_REGISTRY`.

        Args:
            location: the directory; a new or an empty one becomes a registry.
            create: False to refuse a directory that is not a registry yet.

        Raises:
            RegistryLocationError: no directory was named, or it holds something else.
            SchemaTooNewError: it was written by a newer version of this library.
        """
        root = Path(location or os.environ.get(LOCATION_VARIABLE) or "")
        if root == Path():
            raise RegistryLocationError(
                f"no registry was named: set {LOCATION_VARIABLE}=DIR or give --registry DIR"
            )
        if not (root / DATABASE_FILE).is_file():
            _prepare(root, create=create)
        return cls(LocalBlobStore(root), Database(root / DATABASE_FILE))

    def close(self) -> None:
        """Closes the database connections and gives back what is held in the cache."""
        self._leases.close()
        self._held.clear()
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
            SigningKeyError: it was to be signed with a key that cannot be used.
        """
        check_adapter_name(name)
        description = Description(metrics or {}, tags or {}, lineage or {})
        wrong = check_description(description.metrics, description.tags, description.lineage)
        with self._blobs.staging() as staging:
            manifest = stage_adapter(name, directory, staging, base, wrong)
            content = manifest.to_bytes()
            key = self._signing_key
            signature = None if key is None else sign_manifest(content, key)
            (staging / _MANIFEST).write_bytes(content)
            for file in manifest.files:
                self._blobs.put(staging / file.title, file.digest)
            self._blobs.put(staging / _MANIFEST, digest_of(content))
            version = self._catalog.add(name, digest_of(content), manifest, description)
            if signature is not None:
                self._signatures.add(version, signature)
        return version

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
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        version = self.find(reference)
        require_served(version)
        self._require_signature(version)
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
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        self._require_signature(version)
        if directory is not None:
            return files.materialize(self._blobs, version.digest, directory)
        with self._holding:
            if version.digest not in self._held:
                held = self.hold(version, Cache.from_environment())
                self._held[version.digest] = self._leases.enter_context(held)
            return self._held[version.digest]

    def hold(self, version: Version, cache: Cache) -> AbstractContextManager[Path]:
        """The version's directory in a cache, which keeps it until the block ends.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            BlobStoreError: it cannot be read.
            UnsignedError: a signature is required, and it has none of a trusted key.
        """
        self._require_signature(version)
        return cache.hold(self._blobs, version.digest)

    def sign_published_with(self, private_key: Path) -> None:
        """Signs every version published from now on; an elliptic-curve key in PEM."""
        self._signing_key = private_key

    def require_signatures_of(self, public_keys: Sequence[Path]) -> None:
        """From now on resolves and materializes only what one of these keys signed.

        Opened, a registry requires those in `$MANYLORA_REQUIRE_SIGNATURE`; none lifts it.
        """
        self._required_keys = tuple(public_keys)

    def sign(self, version: Version, private_key: Path) -> str:
        """Adds a signature to a version; the digest of the signature.

        Raises:
            SigningKeyError: the key cannot be used.
            CorruptBlobError: the manifest is damaged.
        """
        return self._signatures.sign(version, private_key)

    def verify_signature(self, version: Version, public_keys: Sequence[Path]) -> Path:
        """Which of the keys signed the version.

        Raises:
            UnsignedError: none of them.
            SigningKeyError: a key cannot be read.
            CorruptBlobError: the manifest or a signature is damaged.
        """
        return self._signatures.require(version, public_keys)

    def _require_signature(self, version: Version) -> None:
        if self._required_keys:
            self._signatures.require_once(version, self._required_keys)

    def diff(self, before: Version, after: Version) -> VersionDiff:
        """What differs between two versions: config, description, and each module's weights.

        Raises:
            CorruptBlobError: a stored blob is damaged.
            BlobStoreError: one cannot be read.
        """
        return diff(self._blobs, before, after)

    def export(self, version: Version, destination: Path, format: Format = "peft") -> None:  # noqa: A002
        """Writes the version in a form that imports to the same digest.

        Args:
            version: one of this registry.
            destination: a path where nothing is yet, or an empty directory.
            format: `peft` or `hf`, directories for PEFT and the Hugging Face hub; `oci`, an OCI
                image layout; `tar`, that as one file.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            BlobStoreError: one cannot be read.
            DestinationError: `destination` is there already, or cannot be written.
        """
        export(self._blobs, version, destination, format)

    def import_adapter(self, name: str, source: Path, *, base: BaseModelIdentity) -> Version:
        """Publishes what `export` wrote, or any PEFT adapter directory, as a version of `name`.

        What the exported version was described with is kept.

        Raises:
            SourceError: `source` is in none of these forms, or damaged.
            InvalidNameError: an adapter may not be called `name`.
            InvalidAdapterError: it may not be served; carries every problem.
            WrongBaseError: it was made for another base.
        """
        check_adapter_name(name)
        with self._blobs.staging() as staging:
            found = unpack(source, staging, largest_adapter(base))
            if found.base_fingerprint not in (None, base.fingerprint):
                raise WrongBaseError(name, found.base_fingerprint, base.fingerprint)
            return self.publish(
                name,
                found.directory,
                base=base,
                metrics=found.metrics,
                tags=found.tags,
                lineage=found.lineage,
            )

    def copy_to(self, target: "Registry", progress: Progress | None = None) -> VerifyReport:
        """Makes `target`, a new registry or a copy begun before, equal to this one; verifies it.

        Numbers, digests, aliases, history and events stay what they are. Interrupted, it can be
        started again and goes on.

        Raises:
            CorruptBlobError: a blob is damaged here.
            BlobStoreError: blobs cannot be read or written.
            DestinationError: `target` holds something else.
        """
        copy(
            self._blobs,
            self._database,
            target._blobs,
            target._database,
            progress or (lambda _arrived, _all: None),
        )
        return target.verify()

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
