"""The cheap checks: whether a stage's gateway could serve a version, and may."""

from deploy.stages.errors import CheckError
from deploy.stages.settings import Stage
from manylora_registry import Registry, Version, identify_base
from manylora_registry.errors import UnsignedError


def servable(registry: Registry, stage: Stage, reference: str) -> Version:
    """The version that `reference` means, if it fits the stage's base and engine and is signed.

    Raises:
        CheckError: it may not enter the stage.
        RegistryError: it is not there, was withdrawn, or was made for another base.
    """
    fingerprint = identify_base(stage.gateway.base).fingerprint
    version = registry.resolve(reference, base=fingerprint)
    highest = stage.gateway.engine.max_rank
    if version.rank > highest:
        raise CheckError(
            f"{version.name}@{version.number} has rank {version.rank}, and the engines of "
            f"{stage.name} take {highest}: raise engine.max_rank in {stage.gateway_file}"
        )
    if stage.gates.signatures:
        try:
            registry.signatures.verify(version, stage.gates.signatures)
        except UnsignedError as error:
            raise CheckError(f"{stage.name} asks for a signature: {error}") from error
    return version


def unprotected(registry: Registry, stage: Stage, version: Version) -> None:
    """Sees that the registry lets the stage's alias move to `version`.

    Raises:
        CheckError: the alias is protected by a gate that the version has not passed.
    """
    for protection in registry.protections(version.name):
        if protection.alias != stage.alias:
            continue
        latest = {entry.suite: entry.passed for entry in registry.evaluations(version)}
        if protection.suite is not None:
            latest = {protection.suite: latest.get(protection.suite, False)}
        if not latest or not all(latest.values()):
            failed = [suite for suite, passed in latest.items() if not passed]
            raise CheckError(
                f"{version.name}@{stage.alias} is protected, and version {version.number} has not "
                f"passed {', '.join(failed) or 'any suite'}: add the suite to gates.yaml, or "
                "record it with `manylora evaluate --record`"
            )
