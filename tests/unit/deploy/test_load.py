"""What a smoke load says about its bounds."""

from deploy.stages.gate_settings import Smoke
from deploy.stages.load import Asked, Load


def test_as_many_requests_as_the_bound_says_may_fail() -> None:
    bounds = Smoke(errors=0.29)
    answered, failed = Asked(0.1, 0.2), Asked(0, 0, "gone")

    assert Load((answered,) * 71 + (failed,) * 29).broken(bounds) == []
    (reason,) = Load((answered,) * 70 + (failed,) * 30).broken(bounds)
    assert reason.startswith("30 of 100 requests of the smoke load failed, the first with: gone")
