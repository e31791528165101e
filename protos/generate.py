"""Writes the Python stubs of every proto here into DIR (default: the manylora-protos package).

Usage: python protos/generate.py [DIR]
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
PACKAGE = PROTOS.parent / "packages/protos/src"


def generate(target: Path) -> None:
    """Replaces the stubs under `target`/manylora with what the protos say now."""
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={PROTOS}",
                f"--python_out={scratch}",
                f"--grpc_python_out={scratch}",
                f"--mypy_out={scratch}",
                f"--mypy_grpc_out={scratch}",
                *files,
            ],
            check=True,
        )
        for fresh in sorted((Path(scratch) / "manylora").iterdir()):
            old = target / "manylora" / fresh.name
            shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(fresh, old)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
