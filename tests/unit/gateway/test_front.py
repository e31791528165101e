"""The ports are the gateway's own."""

import socket

import pytest

from manylora_gateway.config import ListenConfig
from manylora_gateway.errors import StartError
from manylora_gateway.front import Front


@pytest.mark.parametrize("field", ["inference", "admin"])
async def test_a_taken_port_is_known_before_anything_starts(field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listen = ListenConfig.model_validate(
            {"inference": "127.0.0.1:0", "admin": "127.0.0.1:0", field: address}
        )
        with pytest.raises(StartError, match=f"listen.{field}: {address}"):
            Front(listen)


async def test_two_gateways_do_not_share_a_port() -> None:
    first = Front(ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0"))
    with pytest.raises(StartError):
        Front(ListenConfig(inference=first.inference_address, admin="127.0.0.1:0"))
