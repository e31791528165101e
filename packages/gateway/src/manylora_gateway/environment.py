"""What processes of the gateway find around them: variables, files, libraries of the machine."""

import ctypes
import os
import resource

from manylora_gateway.config import EngineConfig
from manylora_gateway.errors import StartError

ENOUGH_FILES = 65_536


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """For an engine replica, before vLLM is imported."""
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.replicas)
    return {
        # Ray sets one thread for each process it starts.
        "OMP_NUM_THREADS": str(threads),
        # Replicas share the cores; binding would put all of them on the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def cluster_environment() -> dict[str, str]:
    """For this process and the Ray processes it starts, before Ray is imported."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray puts what it starts behind everything else on the machine (nice 15): engines starve.
        "RAY_worker_niceness": "0",
        # Ray looks after its own ten times a second, keeps what each call did for a dashboard that
        # nobody sees here, and reports on the machine; engines need the processors more.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_enable_metrics_collection": "0",
        "REPORTER_UPDATE_INTERVAL_MS": "60000",
        # Failures of calls whose callers have left, as traces in the midst of our own log.
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        # What Ray prints itself: escapes have no place in a log.
        "RAY_COLOR_PREFIX": "0",
        # Ray starts programs while our servers hold threads; they must not hear of the fork.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }


def raise_file_limit() -> None:
    """Lets this process, and what it starts, have as many files and connections as it may.

    Shells give 1,024, and every HTTP connection takes one: `limits.max_requests` of them would
    leave none for the engines. Not beyond `ENOUGH_FILES`: some programs look at each number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def require_libnuma() -> None:
    """Sees that the machine has what vLLM's kernels for CPUs are linked to.

    Without it vLLM goes on, and ends with a word about a missing operation.

    Raises:
        StartError: it has not; says what to install.
    """
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise StartError(
            f"vLLM on a CPU needs libnuma ({error}): install it, as with `apt-get install "
            "libnuma1` or `dnf install numactl-libs`"
        ) from error
