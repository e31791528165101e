"""A CPU gateway never runs on vLLM's own LoRA kernels unless asked to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = "from manylora_gateway.cpu_lora import plugin; print(plugin.check())"


class FakeVllm:
    """A `vllm` that has only what the plugin asks it: its version and its platform."""

    def __init__(self, directory: Path, version: str, cpu: bool) -> None:
        self.directory = directory
        package = directory / "vllm"
        package.mkdir()
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (package / "platforms.py").write_text(
            "class Platform:\n"
            f"    def is_cpu(self): return {cpu}\n"
            "    @classmethod\n"
            "    def get_punica_wrapper(cls): return 'stock'\n"
            "current_platform = Platform()\n"
        )

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """What a fresh interpreter says of `code` beside this vLLM."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**kept, **environment, "PYTHONPATH": str(self.directory)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installed(self, **environment: str) -> str:
        """The kernels vLLM finds after the plugin ran."""
        code = (
            "from manylora_gateway.cpu_lora.plugin import register; register(); register()\n"
            "from vllm.platforms import current_platform\n"
            "print(current_platform.get_punica_wrapper())"
        )
        finished = self.run(code, **environment)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.strip()


@pytest.fixture
def tested(tmp_path: Path) -> FakeVllm:
    return FakeVllm(tmp_path, "0.32.0+cpu", cpu=True)


@pytest.fixture
def untested(tmp_path: Path) -> FakeVllm:
    return FakeVllm(tmp_path, "0.99.0", cpu=True)


def test_installs_on_a_tested_cpu_build(tested: FakeVllm) -> None:
    assert tested.installed() == "manylora_gateway.cpu_lora.wrapper.GroupedLoRAWrapper"
    assert tested.run(CHECK).stdout == "grouped\n"


def test_the_switch_gives_vllms_own(tested: FakeVllm) -> None:
    assert tested.installed(MANYLORA_CPU_LORA="stock") == "stock"
    assert tested.run(CHECK, MANYLORA_CPU_LORA="stock").stdout == "stock\n"


def test_a_misspelt_switch_is_an_error(tested: FakeVllm) -> None:
    finished = tested.run(CHECK, MANYLORA_CPU_LORA="stcok")
    assert finished.returncode == 1
    assert "StartError: MANYLORA_CPU_LORA is 'stcok'" in finished.stderr


def test_refuses_an_untested_version(untested: FakeVllm) -> None:
    assert untested.installed() == "stock"
    finished = untested.run(CHECK)
    assert finished.returncode == 1
    assert "tested with vLLM 0.32.0, not with 0.99.0" in finished.stderr


def test_an_untested_version_is_left_stock_with_a_warning(untested: FakeVllm) -> None:
    finished = untested.run("from manylora_gateway.cpu_lora import plugin; plugin.register()")
    assert finished.returncode == 0
    assert "tested with vLLM 0.32.0" in finished.stderr


def test_a_plugin_list_without_it_is_an_error(tested: FakeVllm) -> None:
    assert tested.run(CHECK, VLLM_PLUGINS="other,manylora_cpu_lora").stdout == "grouped\n"
    finished = tested.run(CHECK, VLLM_PLUGINS="other")
    assert finished.returncode == 1
    assert "VLLM_PLUGINS leaves out manylora_cpu_lora" in finished.stderr


def test_leaves_a_gpu_alone(tmp_path: Path) -> None:
    gpu = FakeVllm(tmp_path, "0.99.0", cpu=False)
    assert gpu.installed() == "stock"
    assert gpu.run(CHECK).stdout == "gpu\n"


def test_importing_it_is_light(tested: FakeVllm) -> None:
    code = "import sys, manylora_gateway.cpu_lora.plugin; print({'torch', 'vllm'} & {*sys.modules})"
    assert tested.run(code).stdout == "set()\n"
