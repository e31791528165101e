"""Who is let in, who is told to come back and when."""

import asyncio
from contextlib import ExitStack

import pytest

from manylora_gateway.admission import Admission
from manylora_gateway.config import AdapterLimits, LimitsConfig
from manylora_gateway.errors import (
    ConcurrencyError,
    DrainingError,
    QueueFullError,
    TokenRateError,
)
from manylora_gateway.fair import Share
from manylora_gateway.tenants import ANONYMOUS, Tenant, TenantLimits
from tests.unit.gateway.test_pool import Clock


def test_a_flood_leaves_places_for_others() -> None:
    admission = Admission(LimitsConfig(max_requests=9))
    with ExitStack() as inside:
        for _ in range(5):
            inside.enter_context(admission.enter(ANONYMOUS, "red"))
        with pytest.raises(QueueFullError), admission.enter(ANONYMOUS, "red"):
            pass
        for name in ("green", "blue", ""):
            inside.enter_context(admission.enter(ANONYMOUS, name))
        inside.enter_context(admission.enter(Tenant("other"), "red"))
        with pytest.raises(QueueFullError), admission.enter(ANONYMOUS, "grey"):
            pass
    assert admission.inside == 0


def test_a_tenant_and_an_adapter_have_their_own_limits() -> None:
    limits = LimitsConfig(adapters={"red": AdapterLimits(concurrent_requests=2)})
    admission = Admission(limits)
    small = Tenant("small", limits=TenantLimits(concurrent_requests=1))
    with admission.enter(small, "green"):
        with pytest.raises(ConcurrencyError, match="small"), admission.enter(small, "red"):
            pass
        with (
            admission.enter(ANONYMOUS, "red"),
            admission.enter(ANONYMOUS, "red"),
            pytest.raises(ConcurrencyError, match="red"),
            admission.enter(ANONYMOUS, "red"),
        ):
            pass
    with admission.enter(small, "red"):
        pass


def test_a_token_rate_is_a_bucket_that_says_when_to_come_back() -> None:
    clock = Clock()
    tenant = Tenant("metered", limits=TenantLimits(tokens_per_second=10))
    admission = Admission(LimitsConfig(), clock)
    with admission.enter(tenant, tokens=1000) as ticket:
        # What it may cost is set aside: nobody overdraws beside it.
        with pytest.raises(TokenRateError), admission.enter(tenant, tokens=1):
            pass
        ticket.used = 150
    with pytest.raises(TokenRateError) as caught, admission.enter(tenant, tokens=1):
        pass
    assert caught.value.retry_after_s == pytest.approx(5.1)
    clock.now += caught.value.retry_after_s or 0
    with admission.enter(tenant, tokens=1):
        pass
    with admission.enter(ANONYMOUS, tokens=1):
        pass


def test_a_rate_that_changes_forgives_nothing() -> None:
    clock = Clock()
    admission = Admission(LimitsConfig(), clock)

    def metered(rate: float) -> Tenant:
        return Tenant("metered", limits=TenantLimits(tokens_per_second=rate))

    with admission.enter(metered(10), tokens=300) as ticket:
        ticket.used = 300
    clock.now += 10
    # 100 a burst and as many since, of 300 that were spent.
    with pytest.raises(TokenRateError) as caught, admission.enter(metered(20), tokens=1):
        pass
    assert caught.value.retry_after_s == pytest.approx(101 / 20)
    clock.now += 60
    # What piled up at the higher rate is cut to a burst of the lower.
    with admission.enter(metered(1), tokens=10) as ticket:
        ticket.used = 10
    with pytest.raises(TokenRateError), admission.enter(metered(1), tokens=1):
        pass


def test_a_request_has_the_weights_of_its_tenant_and_its_adapter() -> None:
    admission = Admission(LimitsConfig(adapters={"red": AdapterLimits(weight=3)}))
    tenant = Tenant("heavy", limits=TenantLimits(weight=2))
    with admission.enter(tenant, "red") as ticket:
        assert ticket.share == Share("heavy", tenant_weight=2, adapter_weight=3)


async def test_a_drain_ends_when_the_last_has_left() -> None:
    admission = Admission(LimitsConfig())
    with admission.enter(ANONYMOUS):
        drained = asyncio.create_task(admission.drain())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError), admission.enter(ANONYMOUS):
            pass
        assert not drained.done()
    await drained


async def test_what_is_cut_off_is_told_so_unless_its_client_left_that_moment() -> None:
    admission = Admission(LimitsConfig())
    answering = asyncio.Event()

    async def answer() -> None:
        async with admission.answering.around():
            answering.set()
            await asyncio.Event().wait()

    ends = {DrainingError: False, asyncio.CancelledError: True}
    for error, left in ends.items():
        answering.clear()
        task = asyncio.create_task(answer())
        await answering.wait()
        # What has ended is forgotten: a timeout that is over cannot be set.
        admission.answering.end()
        if left:
            task.cancel()
        with pytest.raises(error):
            await task
