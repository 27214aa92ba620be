"""What the I/O threads ask of the core: errors of statuses, and statuses of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptCancelled,
    BadRequest,
    Code,
    HandlerFailed,
    InferenceError,
    NodeUnreachable,
)

native = pytest.importorskip("dl_inference_native.transport", exc_type=ImportError)
pages = pytest.importorskip("dl_inference_native.pages", exc_type=ImportError)

TRAILERS = (("x-note", "a"), ("x-bytes-bin", b"\0"))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(100, AttemptCancelled), (101, AnswerMalformed), (Code.UNAVAILABLE, NodeUnreachable)],
)
def test_a_code_becomes_the_error_of_its_kind_with_the_trailers(code: int, kind: type[InferenceError]) -> None:
    error = native._Helpers.error_of(int(code), "said", TRAILERS)
    assert type(error) is kind
    assert "said" in str(error)
    assert error.trailers == TRAILERS


def test_an_error_becomes_its_status() -> None:
    error = BadRequest("x" * 10_000)
    error.trailers = TRAILERS
    code, message, trailers = native._Helpers.status_of(error)
    assert (code, trailers) == (Code.INVALID_ARGUMENT, TRAILERS)
    assert "x" * 1000 in message
    assert len(message) < 10_000, "a header has no room for more"


def test_what_a_function_raises_is_its_error_or_a_failed_handler(caplog: pytest.LogCaptureFixture) -> None:
    def raised(error: BaseException) -> Any:
        try:
            raise error
        except BaseException as caught:
            return native._Helpers.raised(caught)

    ours = BadRequest("no")
    assert raised(ours) is ours
    assert ours.__traceback__ is None, "or the message would live as long as the error"
    assert not caplog.records
    failed = raised(ValueError("secret"))
    assert type(failed) is HandlerFailed
    assert "ValueError" in str(failed)
    assert "secret" not in str(failed), "that is for the log"
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("given", "options", "ignored"),
    [
        ({"grpc.max_connection_idle_ms": 2**31 - 1}, {"idle_timeout_s": 0}, ()),
        ({"grpc.max_connection_age_ms": 1500}, {"connection_age_s": 2}, ()),
        ({"grpc.keepalive_timeout_ms": -1}, {}, ("grpc.keepalive_timeout_ms",)),
        ({"grpc.keepalive_time_ms": "soon"}, {}, ("grpc.keepalive_time_ms",)),
    ],
)
def test_channel_arguments_in_their_units(given: dict[str, Any], options: dict[str, int], ignored: Any) -> None:
    assert native.NativeTransport.of_channel_arguments(given) == (options, ignored)


class Held:
    """An exchange that says what was replied. On the event loop, so that nothing depends on when an I/O thread runs."""

    verb, path, query, headers, raw_headers, version, body = "GET", "/page", "", {}, [], "1.1", b""

    def __init__(self) -> None:
        self.replies: list[int] = []
        self.leave: Any = None

    def on_cancel(self, callback: Any) -> None:
        self.leave = callback

    def reply(self, status: int, headers: Any, body: bytes) -> None:
        self.replies.append(status)


async def test_a_page_whose_client_has_left_is_not_asked_for_and_gives_its_room_back() -> None:
    asked: list[str] = []
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    refused = pages.Count()
    served = pages.Pages(app, "http", refused)
    gone = Held()
    served.begin(gone)
    gone.leave()
    await asyncio.sleep(0.05)
    assert asked == []
    stay = [Held() for _ in range(101)]
    for exchange in stay:
        served.begin(exchange)
    assert (refused.value, stay[-1].replies) == (1, [503]), "one hundred have room"
    release.set()
    async with asyncio.timeout(20):
        while not all(exchange.replies for exchange in stay):  # noqa: ASYNC110 - replies are a list
            await asyncio.sleep(0.01)
    assert {exchange.replies[0] for exchange in stay[:-1]} == {200}
