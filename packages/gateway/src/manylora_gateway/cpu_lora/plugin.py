"""The vLLM plugin that puts our CPU LoRA kernels in the place of vLLM's.

vLLM calls `register` in each of its processes (API server, engine core, worker) through the entry
point `manylora_cpu_lora` of the group `vllm.general_plugins`. This module imports neither torch nor
vLLM until then, as vLLM may load it before it has chosen its platform.
"""

import logging
import os
from importlib.util import find_spec
from typing import Any, Literal

from manylora_gateway.errors import StartError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = frozenset({"0.32.0"})
"""The vLLM releases with whose LoRA layers the kernels were tested."""

SWITCH = "MANYLORA_CPU_LORA"
"""Environment variable: `grouped` (the default) for our kernels, `stock` for vLLM's own."""

WRAPPER = "manylora_gateway.cpu_lora.wrapper.GroupedLoRAWrapper"
ENTRY_POINT = "manylora_cpu_lora"

Kernels = Literal["grouped", "stock", "gpu"]


def register() -> None:
    """Installs the kernels on a CPU; called by vLLM, in one process any number of times.

    Where they refuse, it logs why and leaves vLLM as it is, so that an environment with this
    package can still run any vLLM; `check` makes the refusal an error for the gateway.
    """
    try:
        kernels = _kernels()
    except StartError as error:
        logger.warning("%s", error)
        return
    if kernels == "grouped":
        from vllm.platforms import current_platform

        platform: Any = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda _cls: WRAPPER)


def check() -> Kernels:
    """Which LoRA kernels an engine started from this environment uses.

    Returns:
        `grouped` (ours) or `stock` (vLLM's, asked for by the switch) on a CPU; `gpu` elsewhere,
        where vLLM's own are right.

    Raises:
        StartError: the kernels would be vLLM's own, on a CPU, without being asked for.
    """
    kernels = _kernels()
    allowed = os.environ.get("VLLM_PLUGINS")
    if kernels == "grouped" and allowed is not None and ENTRY_POINT not in allowed.split(","):
        raise StartError(
            f"VLLM_PLUGINS leaves out {ENTRY_POINT}, without which vLLM answers with wrong "
            f"adapters on a CPU: add it, or set {SWITCH}=stock to have it so."
        )
    return kernels


def _kernels() -> Kernels:
    if find_spec("vllm") is None:
        raise StartError("vLLM is not installed: install manylora-gateway[cpu] or [gpu].")
    from vllm import __version__
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "gpu"
    match os.environ.get(SWITCH, "grouped"):
        case "stock":
            return "stock"
        case "grouped":
            pass
        case other:
            raise StartError(f"{SWITCH} is {other!r}: it must be 'grouped' or 'stock'.")
    version = __version__.partition("+")[0]
    if version not in TESTED_VERSIONS:
        raise StartError(
            f"The CPU LoRA kernels were tested with vLLM {', '.join(sorted(TESTED_VERSIONS))}, not "
            f"with {version}: install a tested one, or set {SWITCH}=stock for vLLM's own kernels, "
            "which answer with wrong adapters in mixed batches."
        )
    return "grouped"
