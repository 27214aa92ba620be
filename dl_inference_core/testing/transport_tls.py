"""Of the suite for transports, what is about TLS: whom each side trusts, what it shows, and certificates that change.

Its certificates are made by the package trustme, which must be installed.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import ConfigError, NodeUnreachable
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    LOOPBACK,
    CoroutineService,
    Hold,
    LoopbackConformance,
    Recorder,
    ask,
    asynchronous,
    connected,
    echo,
    error_of,
    free_port,
    official,
    reached,
    serving,
    warm,
)
from dl_inference_core.transport import Connection, Limits, Transport

_TAKEN_UP_S = 5.0
"""Seconds within which files that have changed are in use."""


@dataclass(frozen=True, slots=True)
class Issued:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path

    def server(self, clients: Authority | None = None) -> ServerTls:
        """Shows it; asks for certificates of `clients`, if given."""
        client_ca = None if clients is None else clients.file
        return ServerTls(certificate=self.certificate, key=self.key, client_ca=client_ca)

    def become(self, other: Issued) -> None:
        """Replaces the files by those of another certificate, one after the other."""
        other.certificate.replace(self.certificate)
        other.key.replace(self.key)

    def official(self) -> tuple[bytes, bytes]:
        """Key and certificate, in the order that grpcio takes them."""
        return self.key.read_bytes(), self.certificate.read_bytes()


class Authority:
    """A certificate authority of a test's own; its files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        import trustme

        folder.mkdir()
        self._authority = trustme.CA()
        self._folder = folder
        self._count = 0
        self.file = folder / "ca.pem"
        self.file.write_bytes(self._authority.cert_pem.bytes())

    def issue(self, name: str = "127.0.0.1", *, expired: bool = False) -> Issued:
        """A certificate for `name`, in files of its own."""
        until = datetime.now(UTC) - timedelta(hours=1) if expired else None
        made = self._authority.issue_cert(name, not_after=until)
        self._count += 1
        issued = Issued(self._folder / f"{self._count}.pem", self._folder / f"{self._count}.key")
        issued.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        issued.key.write_bytes(made.private_key_pem.bytes())
        return issued

    def copy(self) -> Path:
        """Its own certificate once more, in another file."""
        self._count += 1
        return Path(shutil.copy(self.file, self._folder / f"{self._count}-ca.pem"))

    def client(self, shown: Issued | None = None, server_name: str | None = None) -> ClientTls:
        """Trusts it, and shows a certificate, if given."""
        files = {} if shown is None else {"certificate": shown.certificate, "key": shown.key}
        return ClientTls(ca=self.file, server_name=server_name, **files)

    def official(self, shown: Issued | None = None) -> grpc.ChannelCredentials:
        """The same for grpcio's own channels."""
        return grpc.ssl_channel_credentials(self.file.read_bytes(), *(() if shown is None else shown.official()))


class TlsConformance(LoopbackConformance):
    """TLS and mutual TLS."""

    @pytest.fixture
    def ours(self, tmp_path: Path) -> Authority:
        return Authority(tmp_path / "ours")

    @pytest.fixture
    def other(self, tmp_path: Path) -> Authority:
        return Authority(tmp_path / "other")

    # What is served

    @asynchronous
    async def test_tls_is_spoken_with_connections_and_with_official_clients(
        self, transport: Transport, ours: Authority
    ) -> None:
        message = bytes(range(256)) * 4096
        async with (
            serving(transport, {ECHO: echo}, tls=ours.issue().server()) as address,
            connected(transport, address, tls=ours.client()) as connection,
            official(address, ours.official()) as channel,
        ):
            assert await ask(connection, ECHO, message) == message
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message

    @pytest.mark.parametrize(
        ("version", "ciphers", "spoken"),
        [
            (ssl.TLSVersion.TLSv1_3, "DEFAULT", True),
            (ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM", True),
            (ssl.TLSVersion.TLSv1_2, "AESGCM+kRSA", False),
            (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA", False),
            (ssl.TLSVersion.TLSv1_1, "DEFAULT:@SECLEVEL=0", False),
        ],
        ids=["TLS 1.3", "TLS 1.2", "no forward secrecy", "CBC", "TLS 1.1"],
    )
    @asynchronous
    async def test_versions_and_ciphers_are_those_of_mozillas_intermediate_profile(
        self, transport: Transport, ours: Authority, version: ssl.TLSVersion, ciphers: str, spoken: bool
    ) -> None:
        """https://wiki.mozilla.org/Security/Server_Side_TLS, version 5."""
        context = ssl.create_default_context(cafile=ours.file)
        context.set_alpn_protocols(["h2"])
        context.set_ciphers(ciphers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TLS 1.1 is
            context.minimum_version = context.maximum_version = version
        async with serving(transport, {ECHO: echo}, tls=ours.issue().server()) as address:
            host, _, port = address.rpartition(":")
            connecting = asyncio.open_connection(host, int(port), ssl=context)
            if spoken:
                _, writer = await connecting
                assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
                writer.close()
            else:
                with pytest.raises((ssl.SSLError, ConnectionResetError)) as caught:
                    await connecting
                by_the_server = isinstance(caught.value, ConnectionResetError) or "ALERT" in str(caught.value)
                assert by_the_server, caught.value

    @asynchronous
    async def test_a_client_that_speaks_plaintext_is_refused(self, transport: Transport, ours: Authority) -> None:
        note = Recorder()
        async with serving(transport, {ECHO: note}, tls=ours.issue().server()) as address:
            async with connected(transport, address) as connection:
                await unreachable(connection)
            async with official(address) as channel:
                await refused(channel)
        assert not note.calls

    @asynchronous
    async def test_where_client_authorities_are_named_a_certificate_of_theirs_must_be_shown(
        self, transport: Transport, ours: Authority, other: Authority
    ) -> None:
        note = Recorder()
        async with serving(transport, {ECHO: note}, tls=ours.issue().server(clients=other)) as address:
            for wrong in (None, ours.issue("client")):
                async with connected(transport, address, tls=ours.client(wrong)) as connection:
                    await unreachable(connection)
                async with official(address, ours.official(wrong)) as channel:
                    await refused(channel)
            async with official(address, ours.official(other.issue("client", expired=True))) as channel:
                await refused(channel)
            assert not note.calls
            right = other.issue("client")
            async with connected(transport, address, tls=ours.client(right)) as connection:
                await warm(connection)
            async with official(address, ours.official(right)) as channel:
                assert await channel.unary_unary(ECHO)(b"ours", timeout=10) == b"ours"

    # Whom a connection trusts

    @pytest.mark.parametrize("wrong", ["authority", "name", "date"])
    @asynchronous
    async def test_a_node_with_a_wrong_certificate_is_unreachable(
        self, transport: Transport, ours: Authority, other: Authority, wrong: str
    ) -> None:
        authority = other if wrong == "authority" else ours
        name = "elsewhere.test" if wrong == "name" else "127.0.0.1"
        issued = authority.issue(name, expired=wrong == "date")
        async with (
            official_server(issued) as (address, calls),
            connected(transport, address, tls=ours.client()) as connection,
        ):
            for _ in range(3):
                await unreachable(connection)
        assert not calls

    @asynchronous
    async def test_the_name_that_a_certificate_must_have_can_be_told(
        self, transport: Transport, ours: Authority
    ) -> None:
        async with official_server(ours.issue("node.test")) as (address, calls):
            async with connected(transport, address, tls=ours.client(server_name="node.test")) as connection:
                assert await ask(connection, ECHO, b"named") == b"named"
            async with connected(transport, address, tls=ours.client(server_name="nodes.test")) as connection:
                await unreachable(connection)
        assert calls == [b"named"]

    @asynchronous
    async def test_a_node_that_speaks_plaintext_is_unreachable(self, transport: Transport, ours: Authority) -> None:
        note = Recorder()
        async with (
            serving(transport, {ECHO: note}) as address,
            connected(transport, address, tls=ours.client()) as connection,
        ):
            await unreachable(connection)
        assert not note.calls

    @asynchronous
    async def test_nothing_is_ever_sent_in_plaintext(self, transport: Transport, ours: Authority) -> None:
        received: list[bytes] = []

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.append(await reader.read(1000))
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with connected(transport, address, tls=ours.client()) as connection:
            for _ in range(3):
                await unreachable(connection)
        server.close()
        assert received
        assert {sent[:2] for sent in received} == {b"\x16\x03"}, "each begins as a TLS handshake does"

    @asynchronous
    async def test_a_node_that_comes_back_is_reached_in_1500_ms(self, transport: Transport, ours: Authority) -> None:
        address = f"127.0.0.1:{free_port()}"
        methods, tls = CoroutineService({ECHO: echo}), ours.issue().server()
        async with connected(transport, address, tls=ours.client()) as connection:
            for _ in range(2):
                await unreachable(connection)
                server = await transport.serve(methods, (address,), Limits(), tls=tls)
                await reached(connection, 1.5)
                await server.drain(0)

    # Files that cannot be used

    @pytest.mark.parametrize("wrong", ["certificate", "key", "client_ca"])
    @asynchronous
    async def test_a_server_whose_file_cannot_be_used_is_a_config_error_and_leaves_no_port_taken(
        self, transport: Transport, ours: Authority, wrong: str
    ) -> None:
        good = ours.issue().server(clients=ours)
        address = f"127.0.0.1:{free_port()}"
        for file in (ours.file.with_name("missing"), empty(ours.file.with_name("empty"))):
            bad = good.model_copy(update={wrong: file})
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                await transport.serve(CoroutineService({ECHO: echo}), (address,), Limits(), tls=bad)
        server = await transport.serve(CoroutineService({ECHO: echo}), (address,), Limits(), tls=good)
        await server.drain(0)

    @pytest.mark.parametrize("wrong", ["ca", "certificate", "key"])
    @asynchronous
    async def test_a_connection_whose_file_cannot_be_used_is_a_config_error(
        self, transport: Transport, ours: Authority, wrong: str
    ) -> None:
        for file in (ours.file.with_name("missing"), empty(ours.file.with_name("empty"))):
            bad = ours.client(ours.issue()).model_copy(update={wrong: file})
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                transport.connect(LOOPBACK[0], Limits(), bad)

    @asynchronous
    async def test_a_key_that_is_not_the_certificates_and_one_that_has_expired_are_config_errors(
        self, transport: Transport, ours: Authority
    ) -> None:
        misfit = Issued(ours.issue().certificate, ours.issue().key)
        expired = ours.issue(expired=True)
        for issued, file in ((misfit, misfit.key), (expired, expired.certificate)):
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                await transport.serve(CoroutineService({}), LOOPBACK, Limits(), tls=issued.server())
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                transport.connect(LOOPBACK[0], Limits(), ours.client(issued))

    # Files that change

    @asynchronous
    async def test_a_new_certificate_is_shown_to_new_connections_and_calls_in_flight_go_on(
        self, transport: Transport, ours: Authority, other: Authority
    ) -> None:
        hold, issued = Hold(), ours.issue()
        methods = CoroutineService({ECHO: echo, HOLD: hold})
        server = await transport.serve(methods, LOOPBACK * 2, Limits(), tls=issued.server())
        addresses = [f"127.0.0.1:{port}" for port in server.ports]
        try:
            async with connected(transport, addresses[0], tls=ours.client()) as old:
                call = asyncio.ensure_future(ask(old, HOLD, b"goes on"))
                await hold.was_entered()
                issued.become(other.issue())
                for address in addresses:
                    async with connected(transport, address, tls=other.client()) as new:
                        await reached(new, _TAKEN_UP_S)
                    async with connected(transport, address, tls=ours.client()) as late:
                        await unreachable(late)
                hold.release.set()
                assert await call == b"goes on"
        finally:
            await server.drain(0)

    @asynchronous
    async def test_new_client_authorities_hold_for_new_connections(
        self, transport: Transport, ours: Authority, other: Authority
    ) -> None:
        trusted = ours.copy()
        tls = ours.issue().server().model_copy(update={"client_ca": trusted})
        async with (
            serving(transport, {ECHO: echo}, tls=tls) as address,
            connected(transport, address, tls=ours.client(other.issue("client"))) as connection,
        ):
            await unreachable(connection)
            other.copy().replace(trusted)
            await reached(connection, _TAKEN_UP_S)
            async with connected(transport, address, tls=ours.client(ours.issue("client"))) as late:
                await unreachable(late)

    @asynchronous
    async def test_a_connection_shows_a_new_certificate_and_calls_in_flight_go_on(
        self, transport: Transport, ours: Authority, other: Authority
    ) -> None:
        hold, shown = Hold(), ours.issue("client")
        async with (
            serving(transport, {ECHO: echo}, tls=ours.issue().server(clients=other)) as strict,
            serving(transport, {ECHO: echo, HOLD: hold}, tls=ours.issue().server()) as lenient,
            connected(transport, strict, tls=ours.client(shown)) as refused,
            connected(transport, lenient, tls=ours.client(shown)) as taken,
        ):
            await unreachable(refused)
            call = asyncio.ensure_future(ask(taken, HOLD, b"goes on"))
            await hold.was_entered()
            shown.become(other.issue("client"))
            await reached(refused, _TAKEN_UP_S)
            for _ in range(10):
                await warm(taken)
                await asyncio.sleep(0.02)
            hold.release.set()
            assert await call == b"goes on"

    @asynchronous
    async def test_a_connection_trusts_new_authorities(
        self, transport: Transport, ours: Authority, other: Authority
    ) -> None:
        trusted = ours.copy()
        async with (
            serving(transport, {ECHO: echo}, tls=other.issue().server()) as address,
            connected(transport, address, tls=ClientTls(ca=trusted)) as connection,
        ):
            await unreachable(connection)
            other.copy().replace(trusted)
            await reached(connection, _TAKEN_UP_S)

    @asynchronous
    async def test_a_connection_made_while_files_cannot_be_used_has_what_was_good(
        self, transport: Transport, ours: Authority
    ) -> None:
        trust = ClientTls(ca=ours.copy())
        assert trust.ca is not None
        async with (
            serving(transport, {ECHO: echo}, tls=ours.issue().server()) as address,
            connected(transport, address, tls=trust) as first,
        ):
            await warm(first)
            empty(trust.ca)
            async with connected(transport, address, tls=trust) as second:
                await warm(second)

    @pytest.mark.parametrize("bad", ["empty", "misfit", "missing"])
    @asynchronous
    async def test_what_cannot_be_used_changes_nothing_and_is_told_of_once(
        self,
        transport: Transport,
        ours: Authority,
        other: Authority,
        bad: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        issued = ours.issue()

        def told() -> int:
            return sum(str(issued.key) in record.getMessage() for record in caplog.records)

        async with serving(transport, {ECHO: echo}, tls=issued.server()) as address:
            if bad == "empty":
                empty(issued.key)
            elif bad == "misfit":
                other.issue().key.replace(issued.key)
            else:
                issued.key.unlink()
            async with asyncio.timeout(2 * _TAKEN_UP_S):
                while not told():
                    async with connected(transport, address, tls=ours.client()) as connection:
                        await warm(connection)
                    await asyncio.sleep(0.1)
            issued.become(other.issue())
            async with connected(transport, address, tls=other.client()) as connection:
                await reached(connection, _TAKEN_UP_S)
        assert told() == 1


@asynccontextmanager
async def official_server(issued: Issued) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server of the grpcio package's own that answers with what it was sent: its address, and what that was."""
    calls: list[bytes] = []

    async def answer(request: bytes, _: Any) -> bytes:
        calls.append(request)
        return request

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc is untyped
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_secure_port(LOOPBACK[0], grpc.ssl_server_credentials([issued.official()]))
    await server.start()
    try:
        yield f"127.0.0.1:{port}", calls
    finally:
        await server.stop(None)


async def unreachable(connection: Connection) -> None:
    """A call is not answered, and soon."""
    async with asyncio.timeout(5):
        error = await error_of(ask(connection, ECHO, b"secret"))
    assert isinstance(error, NodeUnreachable), repr(error)


async def refused(channel: Any) -> None:
    """A call on an official channel is not answered."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(ECHO)(b"secret", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def empty(path: Path) -> Path:
    """A file with nothing in it."""
    path.write_bytes(b"")
    return path
