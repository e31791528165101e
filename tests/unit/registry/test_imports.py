import subprocess
import sys


def test_reading_configs_and_references_waits_for_no_heavy_library():
    program = (
        "import sys, manylora_registry, manylora_registry.base, manylora_registry.config, "
        "manylora_registry.errors, manylora_registry.reference; "
        "print({'sqlalchemy', 'alembic', 'numpy', 'torch'} & sys.modules.keys())"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout == "set()\n"
