"""Nobody gets in who is not named, nobody gets more than is theirs, and nothing secret is told."""

import asyncio
import ipaddress
import logging
import os
import re
import ssl
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_client import (
    AsyncClient,
    InvalidInputError,
    PermissionDeniedError,
    UnreachableError,
    tls_credentials,
)
from manylora_gateway.access import token_digest
from manylora_gateway.config import TlsConfig
from manylora_gateway.errors import StartError
from manylora_gateway.logs import FIELDS
from manylora_gateway.tls import ServerTls
from manylora_registry import Version
from tests.unit.gateway.certificates import HOUR, Authority, PrivateKey
from tests.unit.gateway.conftest import Start
from tests.unit.gateway.in_process import BASE_NAME, RunningGateway
from tests.unit.gateway.test_errors import SAY, refused, told
from tests.unit.gateway.test_observing import scraped

TENANTS = f"""
tenants:
  - name: reader
    tokens: ["{token_digest("reader-token")}"]
    certificates: [reader.example.org]
    adapters: [red]
  - name: operator
    tokens: ["{token_digest("operator-token")}"]
    certificates: [operator]
    adapters: ["*"]
    roles: [admin]
"""


def write(path: Path, text: str) -> None:
    path.write_text(text)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


READER, OPERATOR = bearer("reader-token"), bearer("operator-token")
RED = pb.GenerateRequest(adapter="red", text="hi")


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(TENANTS)
    return path


async def test_every_call_must_say_who_calls(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    async with start(tenants=tenants) as gateway:
        for metadata in ((), bearer("wrong"), (("authorization", "Basic x"),)):
            for call in (
                gateway.inference.Generate(RED, metadata=metadata),
                gateway.inference.CountTokens(pb.CountTokensRequest(text="hi"), metadata=metadata),
                gateway.inference.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata),
                gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest(), metadata=metadata),
            ):
                assert told(await refused(call)) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
            streams: tuple[Any, ...] = (
                gateway.inference.GenerateStream(RED, metadata=metadata),
                gateway.inference.BatchGenerate(
                    pb.BatchGenerateRequest(requests=[RED]), metadata=metadata
                ),
            )
            for stream in streams:
                assert told(await refused(stream.read()))[0] == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reflected(gateway.front.inference_address, metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reply = await gateway.inference.Generate(RED, metadata=READER)
        assert reply.adapter.name == "red"
        assert await reflected(gateway.front.inference_address, READER)


async def test_a_refused_call_keeps_its_name(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    async with start(tenants=tenants) as gateway:
        for said, told_back in (("mine-1", "mine-1"), ("not a name", "")):
            named = ("x-request-id", said)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await gateway.inference.Generate(RED, metadata=(named,))
            ids = [dict(caught.value.trailing_metadata() or ())["x-request-id"]]
            async with httpx.AsyncClient(timeout=60) as http:
                url = f"{gateway.http}/v1/chat/completions"
                ids.append((await http.post(url, headers=dict([named]))).headers["x-request-id"])
            for request_id in ids:
                assert request_id == told_back if told_back else len(request_id) == 32


async def test_what_is_refused_before_it_is_admitted_is_counted_and_logged(
    served: dict[str, Version],
    start: Start,
    tenants: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "manylora_gateway.requests")
    wrong = pb.GenerateRequest(adapter="red", text="")
    async with start(tenants=tenants) as gateway, httpx.AsyncClient(timeout=60) as http:
        inference, admin = gateway.inference, gateway.admin
        url = f"{gateway.http}/v1/completions"
        key = {"authorization": "Bearer reader-token"}
        await refused(inference.Generate(RED))
        await http.post(url, headers={"x-request-id": "mine"})
        await refused(admin.ListReplicas(admin_pb2.ListReplicasRequest(), metadata=READER))
        await refused(
            inference.Generate(pb.GenerateRequest(adapter="blue", text="hi"), metadata=READER)
        )
        await refused(inference.Generate(wrong, metadata=READER))
        await refused(cast("Any", inference.GenerateStream(wrong, metadata=READER)).read())
        await refused(inference.CountTokens(pb.CountTokensRequest(), metadata=READER))
        batch = pb.BatchGenerateRequest(requests=[RED, wrong])
        assert len([reply async for reply in inference.BatchGenerate(batch, metadata=READER)]) == 2
        empty: Any = inference.BatchGenerate(pb.BatchGenerateRequest(), metadata=READER)
        await refused(empty.read())
        await http.post(url, headers=key, json={"model": "red", "prompt": ""})
        await http.post(url, headers=key, json={"model": "blue", "prompt": "hi"})
        async with grpc.aio.insecure_channel(gateway.front.inference_address) as channel:
            raw: Any = channel.unary_unary("/manylora.inference.v1.InferenceService/Generate")
            await refused(raw(b"\x0a\x01\xff", metadata=READER))
        await refused(inference.Generate(RED, metadata=(*READER, ("x-request-id", "a b"))))
        await http.post(url, headers=key | {"x-request-id": "a b"}, json={"model": "red"})
        text = scraped(gateway.metrics).splitlines()
    for reason, count in (("UNAUTHENTICATED", 2), ("PERMISSION_DENIED", 3), ("INVALID_REQUEST", 9)):
        assert f'manylora_rejections_total{{reason="{reason}"}} {count}.0' in text
    ends: list[dict[str, Any]] = [vars(record)[FIELDS] for record in caplog.records]
    assert len(ends) == 15
    assert ("mine", "UNAUTHENTICATED") in {(end["request_id"], end["code"]) for end in ends}
    assert {end["tenant"] for end in ends} == {"", "reader"}


async def test_bytes_that_are_no_message_keep_their_name(gateway: RunningGateway) -> None:
    """As of a client that sends half of a character, which protobuf does not read."""
    async with grpc.aio.insecure_channel(gateway.front.inference_address) as channel:
        call = channel.unary_unary("/manylora.inference.v1.InferenceService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\x01\xff", metadata=(("x-request-id", "mine-1"),))
    assert dict(caught.value.trailing_metadata() or ())["x-request-id"] == "mine-1"
    assert "UTF-8" in str(caught.value.details())


async def reflected(address: str, metadata: Any) -> list[str]:
    """The services that reflection tells."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([ask]), metadata=metadata):
            return [entry.name for entry in reply.list_services_response.service]
    raise AssertionError("no reply")


async def test_health_is_open(served: dict[str, Version], start: Start, tenants: Path) -> None:
    async with start(tenants=tenants) as gateway:
        for address in (gateway.front.inference_address, gateway.front.admin_address):
            async with grpc.aio.insecure_channel(address) as channel:
                checks: Any = health_pb2_grpc.HealthStub(channel)
                health = await checks.Check(health_pb2.HealthCheckRequest())
                assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with httpx.AsyncClient(timeout=60) as http:
            assert (await http.get(f"{gateway.http}/health")).status_code == 200


async def test_each_role_has_its_port(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    async with start(tenants=tenants) as gateway:
        replicas = gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest(), metadata=READER)
        assert told(await refused(replicas)) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert told(await refused(gateway.inference.Generate(RED, metadata=OPERATOR)))[0] == (
            "PERMISSION_DENIED"
        )
        assert await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest(), metadata=OPERATOR)


@pytest.mark.parametrize("adapter", ["green", "green@1", "nobody", ""])
async def test_what_is_not_ones_own_is_denied_whether_it_exists_or_not(
    served: dict[str, Version], start: Start, tenants: Path, adapter: str
) -> None:
    async with start(tenants=tenants) as gateway:
        request = pb.GenerateRequest(adapter=adapter, text="hi")
        status = await refused(gateway.inference.Generate(request, metadata=READER))
        assert told(status)[0] == "PERMISSION_DENIED"
        batch = gateway.inference.BatchGenerate(
            pb.BatchGenerateRequest(requests=[request, RED]), metadata=READER
        )
        results = {result.index: result async for result in batch}
        assert results[0].error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
        assert results[1].response.adapter.name == "red"
        assert set(gateway.engine.loads) == {version.engine_name for version in served.values()}


async def test_lists_have_only_what_is_ones_own(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    async with start(tenants=tenants) as gateway:
        listing = await gateway.inference.ListAdapters(pb.ListAdaptersRequest(), metadata=READER)
        assert [adapter.name for adapter in listing.adapters] == ["red"]
        client = openai.AsyncOpenAI(base_url=f"{gateway.http}/v1", api_key="reader-token")
        assert [model.id async for model in client.models.list()] == ["red"]
        for hidden in ("green", BASE_NAME):
            with pytest.raises(openai.PermissionDeniedError):
                await client.models.retrieve(hidden)


async def test_http_asks_for_the_same_token(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    ask: Any = {"messages": [{"role": "user", "content": "hi"}]}
    async with start(tenants=tenants) as gateway:
        base_url = f"{gateway.http}/v1"
        reader = openai.AsyncOpenAI(base_url=base_url, api_key="reader-token")
        assert (await reader.chat.completions.create(model="red", **ask)).model == "red@1"
        with pytest.raises(openai.PermissionDeniedError):
            await reader.chat.completions.create(model="green", **ask)
        with pytest.raises(openai.AuthenticationError):
            await openai.AsyncOpenAI(base_url=base_url, api_key="wrong").models.list()
        with pytest.raises(openai.PermissionDeniedError):
            await openai.AsyncOpenAI(base_url=base_url, api_key="operator-token").models.list()
        async with httpx.AsyncClient(timeout=60) as http:
            reply = await http.get(f"{base_url}/models")
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["type"] == "authentication_error"


async def test_a_token_taken_away_is_refused_from_then_on(
    served: dict[str, Version], start: Start, tenants: Path
) -> None:
    async with start(tenants=tenants) as gateway:
        await gateway.inference.Generate(RED, metadata=READER)
        write(tenants, TENANTS.replace(token_digest("reader-token"), token_digest("another")))
        status = await refused(gateway.inference.Generate(RED, metadata=READER))
        assert told(status)[0] == "UNAUTHENTICATED"
        await gateway.inference.Generate(RED, metadata=bearer("another"))


async def test_no_token_is_ever_logged(
    served: dict[str, Version], start: Start, tenants: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with start(tenants=tenants) as gateway:
            gateway.engine.tokenize = None  # type: ignore[assignment]
            status = await refused(gateway.inference.Generate(RED, metadata=READER))
            assert told(status)[0] == "INTERNAL"
            await refused(gateway.inference.Generate(RED, metadata=bearer("wrong-token")))
            write(tenants, "tenants: reader-token")
            await refused(gateway.inference.Generate(SAY, metadata=READER))
    said = "".join(
        f"{record.getMessage()}{record.exc_text or ''}"
        for record in caplog.records
        if record.name.startswith("manylora")
    )
    assert "reader-token" not in said
    assert "wrong-token" not in said


async def test_tls_is_spoken_on_every_port(
    served: dict[str, Version], start: Start, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()
    tls = TlsConfig(certificate=pair.certificate, key=pair.key)
    async with start(tls=tls) as gateway:
        trusting = tls_credentials(authority.certificate)
        async with AsyncClient(gateway.front.inference_address, credentials=trusting) as client:
            assert (await client.generate("hi", "red")).adapter is not None
        async with grpc.aio.secure_channel(gateway.front.admin_address, trusting) as channel:
            checks: Any = health_pb2_grpc.HealthStub(channel)
            await checks.Check(health_pb2.HealthCheckRequest())
        address = gateway.front.addresses["http"]
        context = ssl.create_default_context(cafile=str(authority.certificate))
        async with httpx.AsyncClient(verify=context, timeout=60) as http:
            assert (await http.get(f"https://{address}/v1/models")).status_code == 200
        stranger = tls_credentials(Authority(tmp_path, "stranger").certificate)
        for credentials in (None, stranger):
            async with AsyncClient(
                gateway.front.inference_address, credentials=credentials, timeout=60
            ) as client:
                with pytest.raises(UnreachableError, match="check whether it speaks TLS"):
                    await client.generate("hi", "red")


async def test_a_certificate_says_who_calls(
    served: dict[str, Version], start: Start, tenants: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()
    tls = TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=authority.certificate)
    named = authority.issue("somebody", x509.DNSName("reader.example.org"))
    unnamed = authority.issue("unnamed")
    forged = Authority(tmp_path, "forger").issue("operator")
    async with start(tls=tls, tenants=tenants) as gateway:
        address, web = gateway.front.inference_address, gateway.front.addresses["http"]

        def client(*files: Path) -> AsyncClient:
            credentials = tls_credentials(authority.certificate, *files)
            return AsyncClient(address, credentials=credentials, timeout=60)

        async with client(named.certificate, named.key) as reader:
            assert (await reader.generate("hi", "red")).adapter is not None
            with pytest.raises(PermissionDeniedError):
                await reader.generate("hi", "green")
        async with client(unnamed.certificate, unnamed.key) as nobody:
            with pytest.raises(Exception, match="Say who you are"):
                await nobody.generate("hi", "red")
        for files in ((), (forged.certificate, forged.key)):
            async with client(*files) as outside:
                with pytest.raises(UnreachableError, match="whether it asks for yours"):
                    await outside.generate("hi", "red")

        context = ssl.create_default_context(cafile=str(authority.certificate))
        async with httpx.AsyncClient(verify=context, timeout=60) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(f"https://{web}/health")
        context.load_cert_chain(named.certificate, named.key)
        async with httpx.AsyncClient(verify=context, timeout=60) as http:
            listing = (await http.get(f"https://{web}/v1/models")).json()
            assert [model["id"] for model in listing["data"]] == ["red"]
            wrong = {"authorization": "Bearer wrong"}
            reply = await http.get(f"https://{web}/v1/models", headers=wrong)
            assert reply.status_code == 401


async def test_every_kind_of_alternative_name_counts_on_both_ports(
    served: dict[str, Version], start: Start, tenants: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()
    tls = TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=authority.certificate)
    shown: list[tuple[str, x509.GeneralName]] = [
        ("web.example.org", x509.DNSName("web.example.org")),
        ("spiffe://example.org/web", x509.UniformResourceIdentifier("spiffe://example.org/web")),
        ("web@example.org", x509.RFC822Name("web@example.org")),
        ("192.0.2.7", x509.IPAddress(ipaddress.ip_address("192.0.2.7"))),
        ("2001:db8::7", x509.IPAddress(ipaddress.ip_address("2001:db8::7"))),
    ]
    names = ", ".join(f'"{name}"' for name, _ in shown)
    write(tenants, TENANTS.replace("reader.example.org", names))
    async with start(tls=tls, tenants=tenants) as gateway:
        for name, alternative in shown:
            files = authority.issue("somebody", alternative)
            credentials = tls_credentials(authority.certificate, files.certificate, files.key)
            address = gateway.front.inference_address
            async with AsyncClient(address, credentials=credentials, timeout=60) as client:
                assert (await client.generate("hi", "red")).adapter is not None
            context = ssl.create_default_context(cafile=str(authority.certificate))
            context.load_cert_chain(files.certificate, files.key)
            async with httpx.AsyncClient(verify=context, timeout=60) as http:
                url = f"https://{gateway.front.addresses['http']}/v1/models"
                assert (await http.get(url)).status_code == 200, name


async def test_replaced_certificates_count_from_the_next_connection_on(
    served: dict[str, Version],
    start: Start,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair, trusted = old.server(), tmp_path / "trusted.pem"
    write(trusted, old.certificate.read_text())
    ours = old.issue("ours")
    mine = {old: ours, new: new.issue("theirs")}
    async with start(
        tls=TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=trusted)
    ) as gateway:
        address, web = gateway.front.inference_address, gateway.front.addresses["http"]

        async def reached(authority: Authority) -> tuple[bool, bool]:
            """Whether a new client of `authority` is answered over gRPC and over HTTPS."""
            files = mine[authority]
            credentials = tls_credentials(authority.certificate, files.certificate, files.key)
            async with AsyncClient(address, credentials=credentials, timeout=60) as client:
                try:
                    await client.generate("hi", "red")
                    grpc_answers = True
                except UnreachableError:
                    grpc_answers = False
            context = ssl.create_default_context(cafile=str(authority.certificate))
            context.load_cert_chain(files.certificate, files.key)
            async with httpx.AsyncClient(verify=context, timeout=60) as http:
                try:
                    https_answers = (await http.get(f"https://{web}/health")).status_code == 200
                except httpx.TransportError:
                    https_answers = False
            return grpc_answers, https_answers

        assert await reached(old) == (True, True)
        credentials = tls_credentials(old.certificate, ours.certificate, ours.key)
        async with AsyncClient(address, credentials=credentials, timeout=60) as standing:
            await standing.generate("hi", "red")
            # The certificate without its key: half of a replacement.
            half = new.server()
            key = half.key.read_text()
            write(half.key, ours.key.read_text())
            assert await reached(old) == (True, True)
            assert "TLS as before" in caplog.text
            write(half.key, key)
            write(trusted, new.certificate.read_text())
            assert await reached(new) == (True, True)
            assert await reached(old) == (False, False)
            assert (await standing.generate("hi", "red")).adapter is not None


def shaken(context: ssl.SSLContext, server: ServerTls, session: ssl.SSLSession | None) -> Any:
    """The client's side of an HTTPS connection on which something has come."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    served = server.context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, served, client, served):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    served.write(b".")
    assert client.read(1) == b"."
    return client


def test_no_session_outlives_the_authority_of_its_client(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair, ours, trusted = old.server(), old.issue("ours"), tmp_path / "trusted.pem"
    write(trusted, old.certificate.read_text())
    server = ServerTls(TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=trusted))
    client = ssl.create_default_context(cafile=str(old.certificate))
    client.load_cert_chain(ours.certificate, ours.key)
    session = shaken(client, server, None).session
    write(trusted, new.certificate.read_text())
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shaken(client, server, session)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"UNSUPPORTED_PROTOCOL|VERSION"):
        shaken(client, server, None)


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """By the gateway and by its clients, who would go on with gRPC's own list or fail later."""
    authority = Authority(tmp_path)
    one, other = authority.server(), authority.issue("other")
    empty, damaged, locked = (tmp_path / name for name in ("empty", "damaged", "locked"))
    empty.touch()
    damaged.write_text(authority.certificate.read_text().replace("M", "!", 1) * 2)
    locked.write_bytes(encrypted(one.key))
    weak = authority.issue("weak", key=rsa.generate_private_key(65537, 1024))
    missing = tmp_path / "missing"
    cases = [
        (authority.certificate, weak.certificate, weak.key, "cannot be used: ee key too small"),
        (authority.certificate, one.certificate, other.key, f"{other.key} is not the key of"),
        (authority.certificate, one.certificate, locked, f"{locked} holds no plain private key"),
        (authority.certificate, one.certificate, empty, f"{empty} holds no plain private key"),
        (authority.certificate, one.key, one.key, f"{one.key} holds no certificates"),
        (authority.certificate, missing, one.key, str(missing)),
        (empty, one.certificate, one.key, f"{empty} holds no certificates"),
        (damaged, one.certificate, one.key, f"{damaged} holds no certificates"),
        (one.key, one.certificate, one.key, f"{one.key} holds no certificates"),
    ]
    for ca, certificate, key, said in cases:
        with pytest.raises(StartError, match=said):
            ServerTls(TlsConfig(certificate=certificate, key=key, client_ca=ca))
        with pytest.raises(InvalidInputError, match=said):
            tls_credentials(ca, certificate, key)


@pytest.mark.parametrize(
    "key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())]
)
def test_a_key_that_grpc_cannot_use_is_refused(tmp_path: Path, key: PrivateKey) -> None:
    """HTTPS may take it, and while every gRPC client was refused nothing said why."""
    authority = Authority(tmp_path)
    good, odd = authority.server(), authority.issue("odd", key=key)
    with pytest.raises(StartError, match=r"odd.pem cannot be used for gRPC: make its key an RSA"):
        ServerTls(TlsConfig(certificate=odd.certificate, key=odd.key))
    server = ServerTls(TlsConfig(certificate=good.certificate, key=good.key))
    ends = server.end()
    odd.key.replace(good.key)
    odd.certificate.replace(good.certificate)
    assert server.end() == ends


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())]
)
async def test_keys_beside_those_on_p_256_serve_grpc(
    served: dict[str, Version], start: Start, tmp_path: Path, key: PrivateKey
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("localhost", x509.DNSName("localhost"), key=key)
    async with start(tls=TlsConfig(certificate=pair.certificate, key=pair.key)) as gateway:
        target = gateway.front.inference_address.replace("127.0.0.1", "localhost")
        trusting = tls_credentials(authority.certificate)
        async with AsyncClient(target, credentials=trusting) as client:
            assert (await client.generate("hi", "red")).adapter is not None


@pytest.mark.parametrize(
    ("begins", "told_of"),
    [
        (-3 * HOUR, "clients refuse .*gateway.pem: certificate has expired"),
        (HOUR, "clients refuse .*gateway.pem: certificate is not yet valid"),
        (-HOUR, "gateway.pem is valid until .* GMT"),
    ],
)
def test_the_log_says_how_long_a_certificate_is_valid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, begins: timedelta, told_of: str
) -> None:
    caplog.set_level(logging.INFO, "manylora_gateway")
    authority = Authority(tmp_path)
    pair = authority.issue("gateway", begins=begins)
    tls = ServerTls(
        TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=authority.certificate)
    )
    assert bool(tls.end()) == ("until" in told_of)
    (said,) = caplog.records
    assert re.search(told_of, said.getMessage())
    assert (said.levelno == logging.WARNING) == ("refuse" in told_of)


def test_files_that_are_not_used_are_told_of_by_what_is_wrong_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.certificate.read_bytes())
    tls = ServerTls(TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=trusted))
    caplog.set_level(logging.INFO, "manylora_gateway")
    trusted.write_text("no certificate")
    tls.end()
    (said,) = caplog.messages
    assert "TLS as before" in said


async def test_metrics_tell_when_the_certificate_ends(
    served: dict[str, Version], start: Start, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()

    def told_end(text: str) -> float:
        (line,) = re.findall(r"^manylora_certificate_end_seconds (.+)$", text, re.MULTILINE)
        return float(line)

    async with start(tls=TlsConfig(certificate=pair.certificate, key=pair.key)) as gateway:
        assert 0 < told_end(scraped(gateway.metrics)) - time.time() <= HOUR.total_seconds()
        # Nobody need connect for what replaces it to be seen.
        replaced = authority.issue("fresh", begins=-3 * HOUR)
        replaced.key.replace(pair.key)
        replaced.certificate.replace(pair.certificate)
        assert told_end(scraped(gateway.metrics)) == 0


def encrypted(key: Path) -> bytes:
    """A private key's PEM file with a password."""
    return serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


async def test_without_tenants_everybody_may_do_everything(gateway: RunningGateway) -> None:
    assert (await gateway.inference.Generate(SAY)).text
    assert await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())


async def test_the_rollout_verb_says_who_asks(
    served: dict[str, Version], start: Start, tenants: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.server()
    tls = TlsConfig(certificate=pair.certificate, key=pair.key)

    async def show(**variables: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "manylora_cli", "rollout", "show", "red", "--json"),
            *("--admin", gateway.front.admin_address),
            env={**os.environ, "MANYLORA_TLS_CA": str(authority.certificate), **variables},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, problem = await process.communicate()
        return process.returncode, problem.decode()

    async with start(tls=tls, tenants=tenants) as gateway:
        assert await show(MANYLORA_TOKEN="operator-token") == (0, "")
        for token in ("", "reader-token"):
            status, problem = await show(MANYLORA_TOKEN=token)
            assert status == 1
            assert "Traceback" not in problem
