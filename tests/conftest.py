"""For all tests."""

from hypothesis import HealthCheck, settings

# The same examples every time, however slow the machine: by itself hypothesis draws anew in each
# run, and takes an example of 200 ms, or a second in which few are drawn, for a failure.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
