"""What the gateway wants of the machine it runs on."""

import ctypes

import pytest

from manylora_gateway.environment import require_libnuma
from manylora_gateway.errors import StartError


def test_a_machine_without_libnuma_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL

    def linked(name: str) -> ctypes.CDLL:
        return real(name.replace("libnuma", "libnuma-that-is-not-there"))

    monkeypatch.setattr(ctypes, "CDLL", linked)
    with pytest.raises(StartError, match=r"needs libnuma .*apt-get install libnuma1"):
        require_libnuma()
