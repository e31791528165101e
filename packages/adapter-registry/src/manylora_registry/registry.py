"""The registry: publish, resolve, move aliases, materialize."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from manylora_registry.aliases import Aliases, Reason, this_user
from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import BlobStore, Progress, open_blob_store, untold
from manylora_registry.cache import Cache
from manylora_registry.catalog import Catalog, Description
from manylora_registry.database import Database
from manylora_registry.deployments import Deployments
from manylora_registry.description import check_description, one_line
from manylora_registry.diff import VersionDiff, diff
from manylora_registry.evaluations import Evaluations, check_suite_name
from manylora_registry.files import Files
from manylora_registry.garbage import collect_garbage
from manylora_registry.leases import SERVING_SECONDS, Lease, lease_version, uploading
from manylora_registry.location import DATABASE_FILE, locate, prepare
from manylora_registry.manifest import digest_of
from manylora_registry.query import find_versions
from manylora_registry.reference import AdapterReference, check_adapter_name, check_alias_name
from manylora_registry.rows import require_served
from manylora_registry.signatures import Signatures
from manylora_registry.staging import stage_adapter
from manylora_registry.verify import verify
from manylora_registry.version import (
    Adapter,
    Alias,
    AliasMove,
    Deployment,
    Evaluation,
    Event,
    GarbageReport,
    Protection,
    VerifyReport,
    Version,
    VersionPage,
)

EVENTS_AT_ONCE = 1000
MOST_EVENTS = (1 << 63) - 1
POLL_SECONDS = 1.0
GRACE = timedelta(days=1)
_MANIFEST = "manifest.json"


class Registry:
    """Adapters and their versions; safe to share by threads and processes.

    Made by `Registry.open`; a context manager.
    """

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
        parent: str | AdapterReference | None = None,
    ) -> Version:
        """Adds the adapter in `directory` as the next version of `name`.

        Everything is checked before anything is visible; once this returns, the version survives
        a power cut, and before that a crash leaves no trace but unreferenced blobs. The same
        files published again under the same name are the version they were, described as at
        first; one that was deleted is restored.

        Args:
            name: the adapter; made if it is new.
            directory: `adapter_config.json`, `adapter_model.safetensors`, perhaps `README.md`.
            base: the base model it was trained on.
            metrics: finite numbers, e.g. `{"validation_loss": 0.31}`.
            tags: short texts.
            lineage: where it came from, e.g. `{"run": …, "recipe": "sha256:…"}`.
            parent: the version it was trained on from; kept as long as this one.

        Raises:
            InvalidNameError: an adapter may not be called `name`.
            NotFoundError: there is no such parent.
            InvalidAdapterError: it may not be served; carries every problem.
            WrongBaseError: it says itself that it was made for another base.
            SigningKeyError: it was to be signed with a key that cannot be used.
        """
        check_adapter_name(name)
        description = Description(
            metrics or {}, tags or {}, lineage or {}, None if parent is None else _reference(parent)
        )
        wrong = check_description(description.metrics, description.tags, description.lineage)
        if description.parent is not None:
            self.find(description.parent)
        with self.blobs.staging() as staging:
            manifest = stage_adapter(name, directory, staging, base, wrong)
            content = manifest.to_bytes()
            signature = self.signatures.of_published(content)
            (staging.directory / _MANIFEST).write_bytes(content)
            files_of = {file.digest: staging.directory / file.title for file in manifest.files}
            files_of[digest_of(content)] = staging.directory / _MANIFEST
            with uploading(self.database, files_of, this_user()) as lease:
                staging.put(files_of)
                version = self._catalog.add(name, digest_of(content), manifest, description, lease)
            if signature is not None:
                self.signatures.add(version, signature)
        return version

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
        return self._catalog.find(_reference(reference))

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

    def set_alias(
        self,
        name: str,
        alias: str,
        selector: int | str,
        *,
        expect: int | None = None,
        actor: str | None = None,
        why: str = "",
        override: bool = False,
    ) -> AliasMove:
        """Points an alias at a version; every call is a move and is kept in the history.

        Args:
            name: the adapter.
            alias: the alias, e.g. `production`; made if it is new.
            selector: the version: its number, its digest, or another alias.
            expect: the generation the alias must be at, 0 for one that must be new; None for any.
            actor: who moves it; else the user and host of this process.
            why: the reason, for the history; one line.
            override: move a protected alias to a version that has not passed; needs `why`.

        Raises:
            InvalidNameError: an adapter or an alias cannot be called that.
            InvalidReferenceError: `selector` selects no version.
            NotFoundError: no such adapter, version or alias.
            YankedError: the version was withdrawn, or DeletedError: deleted.
            AliasConflictError: the alias is not at the expected generation; nothing was changed.
            AliasProtectedError: the version has not passed the alias's gate.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        reason = Reason.of(actor, why, override=override)
        return self._aliases.move(name, alias, str(selector), reason, expect=expect)

    def rollback(
        self,
        name: str,
        alias: str,
        *,
        expect: int | None = None,
        actor: str | None = None,
        why: str = "",
        override: bool = False,
    ) -> AliasMove:
        """Points an alias at the version it pointed at before the present one; a move like others.

        Raises:
            VersionNotFoundError: it never pointed at another version.
            RegistryError: as `set_alias` does.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        reason = Reason.of(actor, why or "rolled back", override=override and bool(why))
        return self._aliases.rollback(name, alias, reason, expect=expect)

    def protect(
        self,
        name: str,
        alias: str,
        *,
        suite: str | None = None,
        protected: bool = True,
        actor: str | None = None,
        why: str = "",
    ) -> None:
        """Lets an alias move only to versions that have passed a gate; kept with who and why.

        Args:
            name: the adapter.
            alias: the alias, which may be new.
            suite: the suite whose latest record must have passed; None: each suite the version
                has a record of, and there must be one.
            protected: False to lift the protection, which needs `why`.
            actor: who does it; else the user and host of this process.
            why: the reason.

        Raises:
            InvalidNameError: an adapter, an alias or a suite cannot be called that.
            AdapterNotFoundError: there is no such adapter.
            AliasProtectedError: it is to be lifted without a reason.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        if suite is not None:
            check_suite_name(suite)
        reason = Reason.of(actor, why)
        self._aliases.protect(name, alias, reason, suite=suite, protected=protected)

    def protections(self, name: str) -> list[Protection]:
        """The protections of an adapter's aliases, by alias.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._aliases.protections(name)

    def record_evaluation(
        self,
        version: Version | str | AdapterReference,
        suite: str,
        result: Mapping[str, Any],
        passed: bool,
        *,
        actor: str | None = None,
    ) -> Evaluation:
        """Keeps for ever what a suite found about a version, and whether it passed.

        Args:
            version: the version, or a reference to it.
            suite: name of the suite or the gate.
            result: figures, as JSON.
            passed: whether the version is good enough by this suite.
            actor: who says so; else the user and host of this process.

        Raises:
            InvalidNameError: a suite cannot be called that.
            NotFoundError: there is no such version.
            DescriptionError: the result is not JSON, or too large.
        """
        who = Reason.of(actor, "").actor
        return self._evaluations.add(_reference(version), suite, result, passed=passed, actor=who)

    def evaluations(self, version: Version | str | AdapterReference) -> list[Evaluation]:
        """The evaluation records of a version, oldest first.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._evaluations.of(_reference(version))

    def record_deployment(
        self,
        stage: str,
        action: str,
        outcome: str,
        *,
        step: str = "",
        version: Version | None = None,
        actor: str | None = None,
        why: str = "",
        detail: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Deployment:
        """Keeps for ever what was done to a stage and what came of it.

        Args:
            stage: the stage, e.g. `production`.
            action: what was done, e.g. `promote`.
            outcome: what came of it, e.g. `done`.
            step: the part of the action that this is about; empty: the whole.
            version: the version it was about.
            actor: who did it; else the user and host of this process.
            why: the reason; one line.
            detail: figures and reasons, as JSON.
            key: a record whose key is there already is returned unchanged, so that whoever was
                interrupted can repeat himself; None: a key of its own.

        Raises:
            InvalidNameError: a stage, an action or an outcome cannot be called that.
            DescriptionError: the detail is not JSON, or too large.
        """
        reason = Reason.of(actor, why)
        return self._deployments.add(
            stage,
            action,
            outcome,
            step=step,
            version=version,
            actor=reason.actor,
            why=reason.why,
            detail=detail or {},
            key=key,
        )

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

    def describe(
        self,
        version: Version | str | AdapterReference,
        *,
        tags: Mapping[str, str | None] | None = None,
        metrics: Mapping[str, float | None] | None = None,
    ) -> Version:
        """Sets tags and metrics of a version; None removes one. The rest stays as it is.

        Raises:
            NotFoundError: there is no such version.
            DescriptionError: a key or a value cannot be kept; nothing was changed.
        """
        return self._catalog.describe(_reference(version), tags or {}, metrics or {})

    def history(self, name: str) -> list[AliasMove]:
        """Every move of an adapter's aliases, oldest first.

        Raises:
            InvalidNameError: an adapter cannot be called that.
            AdapterNotFoundError: there is no such adapter.
        """
        check_adapter_name(name)
        return self._aliases.history(name)

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

    def yank(self, reference: str | AdapterReference) -> Version:
        """Withdraws a version: it resolves no more, aliases at it included; its bytes are kept.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
        """
        return self._catalog.yank(_reference(reference))

    def delete(self, version: Version | str | AdapterReference) -> Version:
        """Marks a version as deleted: it is not served, and `collect_garbage` removes its bytes.

        They stay until its grace is over and no lease and no version that was trained on from it
        needs them. Its number, digest, description and history stay for ever; publishing the same
        files again restores it.

        Raises:
            NotFoundError: there is no such version.
            VersionInUseError: an alias points at it.
        """
        return self._catalog.delete(_reference(version))

    def lease(
        self,
        version: Version | str | AdapterReference,
        *,
        seconds: float = SERVING_SECONDS,
        holder: str | None = None,
    ) -> Lease:
        """Takes a lease: the version's bytes are not collected while it holds.

        For whoever goes on reading a version that may be deleted meanwhile, as an engine does
        that pages weights in. Renewed before it runs out, released at the end; of a holder that
        died it runs out.

        Args:
            version: the version, or a reference to it.
            seconds: how long it holds.
            holder: who has it, for the reports of garbage collection; else user and host.

        Raises:
            LeaseError: it cannot last that long.
            NotFoundError: there is no such version.
            DeletedError: its bytes are gone.
        """
        who = one_line(holder or this_user())
        return lease_version(self.database, _reference(version), seconds, who)

    def collect_garbage(self, *, grace: timedelta = GRACE, dry_run: bool = False) -> GarbageReport:
        """Removes the bytes of deleted versions, and what killed publications left behind.

        Safe beside publishers, readers and other collections; see `manylora_registry.garbage` for
        the rules.

        Args:
            grace: nothing younger is removed; readers without a lease have that long to finish.
            dry_run: only say what would be done.
        """
        return collect_garbage(self.blobs, self.database, grace, dry_run=dry_run)

    def verify(self, *, repair: bool = False, progress: Progress = untold) -> VerifyReport:
        """Checks every byte and every record.

        Args:
            repair: take damaged blobs out of the store, so that nothing reads them and publishing
                the same files again replaces them; otherwise nothing is changed.
            progress: told blob by blob.
        """
        return verify(self.blobs, self.database, repair=repair, progress=progress)


def _reference(meant: Version | str | AdapterReference) -> AdapterReference:
    if isinstance(meant, Version):
        return AdapterReference(meant.name, str(meant.number))
    return meant if isinstance(meant, AdapterReference) else AdapterReference.parse(meant)
