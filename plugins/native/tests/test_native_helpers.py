"""What the I/O threads ask of the core: errors of statuses, and statuses of errors."""

from __future__ import annotations

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
