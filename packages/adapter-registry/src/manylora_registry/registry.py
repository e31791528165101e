"""The registry: publish, move aliases, record, withdraw, collect, verify."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from manylora_registry.aliases import Reason, this_user
from manylora_registry.base import BaseModelIdentity
from manylora_registry.blobs import Progress, untold
from manylora_registry.catalog import Description
from manylora_registry.description import check_description, one_line
from manylora_registry.errors import AliasConflictError, VersionNotFoundError
from manylora_registry.evaluations import check_suite_name
from manylora_registry.garbage import collect_garbage
from manylora_registry.leases import SERVING_SECONDS, Lease, lease_version, uploading
from manylora_registry.manifest import digest_of
from manylora_registry.reading import Reading, reference_to
from manylora_registry.reference import AdapterReference, check_adapter_name, check_alias_name
from manylora_registry.staging import stage_adapter
from manylora_registry.verify import verify
from manylora_registry.version import (
    AliasMove,
    Deployment,
    Evaluation,
    GarbageReport,
    VerifyReport,
    Version,
)

GRACE = timedelta(days=1)
_MANIFEST = "manifest.json"


class Registry(Reading):
    """Adapters and their versions; safe to share by threads and processes.

    Made by `Registry.open`; a context manager.
    """

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
        """
        check_adapter_name(name)
        description = Description(
            metrics or {},
            tags or {},
            lineage or {},
            None if parent is None else reference_to(parent),
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
            UnsignedError: a signature is required, and it has none of a trusted key.
            AliasConflictError: the alias is not at the expected generation; nothing was changed.
            AliasProtectedError: the version has not passed the alias's gate.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        reason = Reason.of(actor, why, override=override)
        # Before the move, which would keep other writers waiting for the reading of signatures.
        version = self.resolve(AdapterReference(name, str(selector)))
        return self._aliases.move(name, alias, version.number, reason, expect=expect)

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

        It passes over versions that were withdrawn. Done twice it never swings forward again to
        what was rolled back.

        Raises:
            VersionNotFoundError: there is none to go back to, or it was moved back already.
            RegistryError: as `set_alias` does.
        """
        check_adapter_name(name)
        check_alias_name(alias)
        reason = Reason.of(actor, why or "rolled back", override=override and bool(why))
        before, generation = self._aliases.before(name, alias)
        if before is None:
            raise VersionNotFoundError(
                f"{name}@{alias} was moved back already: to move it further name a version, "
                f"`manylora registry alias {name} {alias} VERSION`"
            )
        if expect is not None and expect != generation:
            raise AliasConflictError(f"{name}@{alias}", expect, generation)
        version = self.resolve(AdapterReference(name, str(before)))
        return self._aliases.move(name, alias, version.number, reason, expect=generation)

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
        return self._evaluations.add(reference_to(version), suite, result, passed=passed, actor=who)

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
        return self._catalog.describe(reference_to(version), tags or {}, metrics or {})

    def yank(self, version: Version | str | AdapterReference) -> Version:
        """Withdraws a version: it resolves no more, aliases at it included; its bytes are kept.

        Raises:
            InvalidReferenceError: not a reference.
            NotFoundError: no such adapter, version or alias.
        """
        return self._catalog.yank(reference_to(version))

    def delete(self, version: Version | str | AdapterReference) -> Version:
        """Marks a version as deleted: it is not served, and `collect_garbage` removes its bytes.

        They stay until its grace is over and no lease and no version that was trained on from it
        needs them. Its number, digest, description and history stay for ever; publishing the same
        files again restores it.

        Raises:
            NotFoundError: there is no such version.
            VersionInUseError: an alias points at it, or a rollback of one would go to it and it
                was not yanked.
        """
        return self._catalog.delete(reference_to(version))

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
        return lease_version(self.database, reference_to(version), seconds, who)

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
