"""How nodes of each kind are asked."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core.errors import BadRequest, Code, InferenceError
from dl_inference_core.gateway.probing import Prober, Verdict
from dl_inference_core.testing.loopback import CoroutineService, free_port
from dl_inference_core.transport import Answer, Connection, Exchange, Limits, Message

Lab = Any  # tests/conftest.py

CHECK = "/grpc.health.v1.Health/Check"
READY = "/inference.GRPCInferenceService/ServerReady"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
SELDON = "/seldon.protos.Model/Predict"
YES, NO = b"\x08\x01", b"\x08\x02"


class Server:
    """A model server of some kind.

    Attributes:
        answers: by method what it answers; None never does.
        asked: the methods that were called, in order.
    """

    def __init__(self, answers: dict[str, bytes | InferenceError | None]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def handlers(self) -> dict[str, Any]:
        def handler(method: str) -> Any:
            async def answer(_: Exchange) -> bytes:
                self.asked.append(method)
                result = self.answers[method]
                if result is None:
                    await asyncio.Event().wait()
                if isinstance(result, InferenceError):
                    raise result
                assert result is not None
                return result

            return answer

        return {method: handler(method) for method in self.answers}


@asynccontextmanager
async def probing(
    lab: Lab, server: Server, kind: str = "auto", timeout_s: float = 5.0, address: str = "127.0.0.1:0"
) -> AsyncIterator[Prober]:
    transport = lab.make_transport()
    listening = await transport.serve(CoroutineService(server.handlers()), (address,), Limits())
    if listening.ports:
        address = f"127.0.0.1:{listening.ports[0]}"
    connection = transport.connect(address, Limits())
    try:
        yield Prober(address, connection, kind, timeout_s)
    finally:
        await connection.close()
        await listening.drain(0)


async def test_grpc_health_is_asked_first_and_alone(lab: Lab) -> None:
    server = Server({CHECK: YES, READY: b"", STATUS: b""})
    async with probing(lab, server) as prober:
        assert [await prober.ask() for _ in range(3)] == [Verdict.WELL] * 3
        server.answers[CHECK] = NO
        assert await prober.ask() is Verdict.NOT_SERVING
    assert server.asked == [CHECK] * 4


async def test_a_server_of_the_open_inference_protocol_is_asked_whether_it_is_ready(lab: Lab) -> None:
    server = Server({READY: YES, STATUS: b""})
    async with probing(lab, server) as prober:
        assert await prober.ask() is Verdict.WELL
        server.answers[READY] = b""  # proto3 has no other way to say false
        assert await prober.ask() is Verdict.NOT_SERVING
    assert server.asked == [READY] * 2


@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.OK])
async def test_tensorflow_serving_is_well_however_it_refuses(lab: Lab, code: Code) -> None:
    server = Server({STATUS: lab.error(code) if code else b"\x0a\x00"})
    async with probing(lab, server) as prober:
        assert [await prober.ask() for _ in range(2)] == [Verdict.WELL] * 2
    assert server.asked == [STATUS] * 2


async def test_a_server_that_knows_no_question_is_well(lab: Lab) -> None:
    """As a node of seldon-core's is."""
    async with probing(lab, Server({SELDON: b""})) as prober:
        assert [await prober.ask() for _ in range(2)] == [Verdict.WELL] * 2
        assert len(prober._known) == 1


async def test_what_it_knows_is_asked_again_once_it_may_be_another_server(lab: Lab) -> None:
    server = Server({CHECK: lab.error(Code.UNIMPLEMENTED), READY: YES})
    async with probing(lab, server) as prober:
        await prober.ask()
        server.answers |= {CHECK: NO, READY: lab.error(Code.UNIMPLEMENTED)}
        assert await prober.ask() is Verdict.WELL
        prober.forget()
        assert await prober.ask() is Verdict.NOT_SERVING
    assert server.asked == [CHECK, READY, READY, CHECK]


@pytest.mark.parametrize(("kind", "method"), [("grpc", CHECK), ("openinference", READY), ("tfserving", STATUS)])
async def test_a_kind_that_is_configured_is_the_only_one(lab: Lab, kind: str, method: str) -> None:
    server = Server({CHECK: YES, READY: YES, STATUS: BadRequest("which model?")})
    async with probing(lab, server, kind) as prober:
        assert await prober.ask() is Verdict.WELL
        assert server.asked == [method]
        server.answers[method] = lab.error(Code.UNIMPLEMENTED)
        assert await prober.ask() is Verdict.WELL
        server.answers[method] = lab.error(Code.INTERNAL)
        assert await prober.ask() is Verdict.FAILED
        server.answers[method] = lab.error(Code.CANCELLED)
        assert await prober.ask() is Verdict.FAILED
        server.answers[method] = lab.error(Code.UNAVAILABLE)
        assert await prober.ask() is Verdict.UNREACHABLE
    assert server.asked == [method] * 5


async def test_all_questions_together_take_no_longer_than_one_may(lab: Lab) -> None:
    server = Server({CHECK: lab.error(Code.UNIMPLEMENTED), READY: None})
    async with probing(lab, server, timeout_s=0.3) as prober:
        async with asyncio.timeout(2):
            assert await prober.ask() is Verdict.FAILED
        server.answers[CHECK] = YES
        assert await prober.ask() is Verdict.WELL
    assert server.asked == [CHECK, READY, CHECK]


async def test_by_tcp_it_is_enough_that_it_listens(lab: Lab) -> None:
    server = Server({CHECK: NO})
    async with probing(lab, server, "tcp") as prober:
        assert await prober.ask() is Verdict.WELL
    assert await prober.ask() is Verdict.UNREACHABLE
    assert server.asked == []


async def test_by_tcp_a_unix_socket_is_connected_to_as_well(lab: Lab, tmp_path: Path) -> None:
    async with probing(lab, Server({CHECK: NO}), "tcp", address=f"unix:{tmp_path}/s") as prober:
        assert await prober.ask() is Verdict.WELL
    assert await prober.ask() is Verdict.UNREACHABLE


class Raises(Connection):
    async def call(self, method: str, message: Message, **_: Any) -> Answer:
        raise ZeroDivisionError("x")

    async def close(self) -> None: ...


async def test_a_connection_that_breaks_its_contract_is_told_of_once_and_probed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prober = Prober("10.0.0.1:1", Raises(), "auto", 5.0)
    assert [await prober.ask() for _ in range(3)] == [Verdict.FAILED] * 3
    (record,) = caplog.records
    assert record.getMessage() == "a probe of node 10.0.0.1:1 failed by a fault of this gateway"
    assert record.exc_info is not None


@pytest.mark.parametrize("address", ["a..b:1", f"{'a' * 64}.example:1"])
async def test_by_tcp_what_is_no_name_is_unreachable(caplog: pytest.LogCaptureFixture, address: str) -> None:
    assert await Prober(address, Raises(), "tcp", 5.0).ask() is Verdict.UNREACHABLE
    assert caplog.records == []


async def test_by_tcp_a_want_of_our_own_says_nothing_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_connection(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    assert await Prober("127.0.0.1:1", Raises(), "tcp", 5.0).ask() is Verdict.FAILED


async def test_who_is_not_there_is_unreachable(lab: Lab) -> None:
    address = f"127.0.0.1:{free_port()}"
    connection = lab.make_transport().connect(address, Limits())
    assert await Prober(address, connection, "auto", 5.0).ask() is Verdict.UNREACHABLE
    await connection.close()
