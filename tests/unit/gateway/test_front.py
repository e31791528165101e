"""The ports are the gateway's own."""

import socket

import httpx
import pytest

from manylora_gateway.config import ListenConfig
from manylora_gateway.errors import StartError
from manylora_gateway.front import Front


@pytest.mark.parametrize("field", ["inference", "admin", "http", "health"])
async def test_a_taken_port_is_known_before_anything_starts(field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listen = ListenConfig.model_validate(
            {"inference": "127.0.0.1:0", "admin": "127.0.0.1:0", field: address}
        )
        with pytest.raises(StartError, match=f"listen.{field}: {address}"):
            Front(listen)


async def probed(front: Front, path: str) -> int:
    async with httpx.AsyncClient() as http:
        return (await http.get(f"http://{front.addresses['health']}{path}")).status_code


async def test_probes_are_answered_while_the_engine_is_still_loading() -> None:
    front = Front(ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0", health="127.0.0.1:0"))
    await front.answer_probes()
    assert (await probed(front, "/live"), await probed(front, "/health")) == (200, 503)
    await front.announce(serving=True)
    assert await probed(front, "/health") == 200
    await front.announce(serving=False)
    assert (await probed(front, "/live"), await probed(front, "/health")) == (200, 503)
    await front.stop()


async def test_two_gateways_do_not_share_a_port() -> None:
    first = Front(ListenConfig(inference="127.0.0.1:0", admin="127.0.0.1:0"))
    with pytest.raises(StartError):
        Front(ListenConfig(inference=first.inference_address, admin="127.0.0.1:0"))
