"""Rollouts as messages."""

# Generated modules of protobuf.
# pyright: reportMissingTypeStubs=false

from manylora.admin.v1 import admin_pb2
from manylora_gateway.errors import InvalidRequestError, Violation
from manylora_gateway.figures import VersionFigures
from manylora_gateway.messages import adapter_version
from manylora_gateway.operations import Operations, RolloutState
from manylora_gateway.rollouts import AliasKey, Rollout
from manylora_registry.errors import InvalidNameError
from manylora_registry.reference import check_alias_name, is_name

PRODUCTION = "production"


def alias_key(adapter: str, alias: str) -> AliasKey:
    """Adapter and alias as a request names them.

    Raises:
        InvalidRequestError: the adapter is missing or has a selector, or one of the two is no name.
    """
    if not is_name(adapter):
        raise InvalidRequestError([Violation("adapter", "must be an adapter's name alone")])
    try:
        check_alias_name(alias or PRODUCTION)
    except InvalidNameError as error:
        raise InvalidRequestError([Violation("alias", str(error))]) from error
    return adapter, alias or PRODUCTION


def rollout(state: RolloutState, operations: Operations) -> admin_pb2.Rollout:
    """How the requests for an alias are divided, and how each version does."""
    name, alias = state.key
    figures = operations.metrics.figures
    return admin_pb2.Rollout(
        adapter=name,
        alias=alias,
        shares=[
            admin_pb2.VersionShare(
                version=adapter_version(share.version),
                percent=share.percent,
                figures=_figures(figures.of(share.version.digest)),
            )
            for share in state.shares
        ],
        shadow=None if state.rollout is None else _shadow(state.rollout),
        durable=operations.rollouts.durable,
    )


def _figures(figures: VersionFigures) -> admin_pb2.VersionFigures:
    return admin_pb2.VersionFigures(
        requests=figures.requests,
        errors=figures.errors.total(),
        tokens=figures.tokens,
        ttft_p50_s=figures.first_token.quantile(0.5),
        ttft_p95_s=figures.first_token.quantile(0.95),
        errors_by_reason=figures.errors,
    )


def _shadow(rollout: Rollout) -> admin_pb2.ShadowReport | None:
    if rollout.shadow is None:
        return None
    figures = rollout.figures
    return admin_pb2.ShadowReport(
        version=adapter_version(rollout.shadow.version),
        percent=rollout.shadow.percent,
        same=figures.same,
        different=figures.different,
        failed=figures.failed,
        skipped=figures.skipped,
        ttft_p50_s=figures.first_token.quantile(0.5),
        ttft_p95_s=figures.first_token.quantile(0.95),
        agreeing_tokens=figures.agreeing_tokens / max(1, figures.different),
    )
