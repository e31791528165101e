"""How inputs are drawn, wherever a test draws them, and which signals its processes hear."""

import signal

from hypothesis import HealthCheck, settings

# A machine that stands still for a moment makes no test fail. And a commit has the same examples
# wherever it is tested: what other draws would find comes with the next change of the test, or with
# --hypothesis-profile=default, and not with a push that has nothing to do with it.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# A shell starts background jobs with SIGINT ignored, and processes inherit that. Not in the new
# process by a preexec_fn, which may break where this one has threads, as those of gRPC.
signal.signal(signal.SIGINT, signal.default_int_handler)
