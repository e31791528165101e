"""What a run ran on: interpreter, libraries, machine and the state of the working directory.

Nothing in it names the machine or its user, and nothing is read from the environment's variables,
where secrets live.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import os
import platform
import resource
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

GIT_SECONDS = 10.0
"""A working directory that git needs longer for is recorded without."""


def describe_environment(threads: int) -> dict[str, Any]:
    """Interpreter, hardware and every installed package, for `environment.json`."""
    import torch

    properties = [
        torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())
    ]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in properties],
        "cuda": torch.version.cuda if properties else None,
        "packages": dict(sorted({entry.name: entry.version for entry in distributions()}.items())),
    }


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and branch of the repository around `directory`, and whether tracked files differ.

    None where there is no repository, no commit or no git. Addresses of remotes are left out:
    they may carry credentials.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    branch = _git(directory, "rev-parse", "--abbrev-ref", "HEAD")
    return {"commit": commit, "branch": branch, "dirty": bool(changes)}


def peak_memory_bytes() -> int:
    """The most memory this process held so far: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
