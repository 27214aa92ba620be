"""Exceptions become statuses in one place, and nothing of them stays."""

from __future__ import annotations

import asyncio
import logging
import weakref

import pytest

from dl_inference_core.coroutines import Coroutines
from dl_inference_core.errors import AttemptCancelled, BadRequest, Code, HandlerFailed
from dl_inference_core.failures import FailureLog, fail, request_id_of
from dl_inference_core.testing.memory import MemoryExchange


def test_an_expected_error_is_told_as_it_is_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    exchange = MemoryExchange("/m")
    fail(exchange, BadRequest("no such input"))
    assert type(exchange.error) is BadRequest
    assert str(exchange.error) == "no such input"
    assert caplog.records == []


@pytest.mark.parametrize("given", ["r-1", ""])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HandlerFailed("preprocess failed"), "preprocess failed"),
        (ZeroDivisionError("secret"), "unexpected ZeroDivisionError"),
    ],
)
def test_others_are_logged_under_the_request_id_that_the_client_gets(
    caplog: pytest.LogCaptureFixture, error: Exception, said: str, given: str
) -> None:
    exchange = MemoryExchange("/m", metadata=(("x-request-id", given),) if given else ())
    fail(exchange, error)
    assert exchange.error is not None
    assert exchange.error.code is Code.INTERNAL
    message, _, request_id = str(exchange.error).removesuffix(")").partition(" (request id ")
    assert message == said
    assert request_id == given or (not given and len(request_id) == 32)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, f"request {request_id} failed")


def test_a_request_has_one_id() -> None:
    given = MemoryExchange("/m", metadata=(("x-request-id", "r-1"),))
    assert request_id_of(given) == "r-1"
    exchange = MemoryExchange("/m", metadata=(("x-request-id", ""),))
    request_id = request_id_of(exchange)
    assert len(request_id) == 32
    fail(exchange, HandlerFailed("as told"))
    assert request_id in str(exchange.error)


def raised(kind: type[Exception], number: int) -> Exception:
    try:
        if number:
            raise kind("one")
        raise kind("other")
    except Exception as error:
        return error


def test_what_a_client_can_trigger_is_written_within_limits(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = FailureLog(lambda: now)
    for number in range(1000):
        log.write(f"request {number} failed", "it divides by zero", raised(ZeroDivisionError, 1))
    records = caplog.records
    assert [record.exc_info is not None for record in records] == [True] * 10 + [False] * 190
    assert records[10].getMessage() == "request 10 failed: it divides by zero"
    caplog.clear()
    now += 11
    log.write("request a failed", "it divides by zero", raised(ZeroDivisionError, 1))
    assert [record.getMessage() for record in caplog.records] == [
        "800 requests more failed, and were not written to the log",
        "request a failed",
    ]
    assert caplog.records[1].exc_info is not None


def test_a_flood_of_one_failure_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(lambda: 100.0)
    for _ in range(50):
        log.write("request a failed", "", raised(ZeroDivisionError, 1))
    for error in (raised(ZeroDivisionError, 0), raised(ValueError, 1)):
        log.write("request b failed", "", error)
        assert caplog.records[-1].exc_info is not None


def test_an_error_that_is_its_own_cause_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """As `raise error from error` makes it."""
    error = raised(ZeroDivisionError, 1)
    error.__cause__ = error
    exchange = MemoryExchange("/m")
    fail(exchange, error)
    assert str(exchange.error).startswith("unexpected ZeroDivisionError (request id ")
    assert caplog.records[0].exc_info is not None


def test_an_error_that_cannot_say_what_it_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(HandlerFailed):
        def __str__(self) -> str:
            raise ValueError("no words")

    exchange = MemoryExchange("/m")
    fail(exchange, Mute())
    assert type(exchange.error) is HandlerFailed
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", [BadRequest, HandlerFailed, ZeroDivisionError])
def test_nothing_that_a_frame_of_the_error_held_stays(kind: type[Exception], no_collector: None) -> None:
    class Message:
        pass

    def handle(exchange: MemoryExchange) -> weakref.ref[Message]:
        message = Message()
        kept: list[Exception] = []
        try:
            raise ValueError
        except ValueError as cause:
            try:
                raise kind("as told") from cause
            except Exception as error:
                kept.append(error)  # as a future does that a frame leads to
                fail(exchange, error)
        return weakref.ref(message)

    exchange = MemoryExchange("/m")
    logging.disable()  # the test's own handlers keep what is logged
    try:
        held = handle(exchange)
    finally:
        logging.disable(logging.NOTSET)
    assert exchange.error is not None
    assert held() is None


def test_a_coroutine_that_somebody_else_cancels_ends_its_exchange() -> None:
    async def main() -> None:
        waiting = asyncio.get_running_loop().create_future()

        async def wait(_: object) -> bytes:
            return bytes(await waiting)

        exchange = MemoryExchange("/m")
        Coroutines().answer(exchange, wait)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(AttemptCancelled):
            await asyncio.wait_for(exchange.outcome(), 5)

    asyncio.run(main())
