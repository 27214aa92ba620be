"""Exchanges that a coroutine answers: work that waits for files, models or the clock, away from inference."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from dl_inference_core.errors import AttemptCancelled
from dl_inference_core.failures import fail
from dl_inference_core.transport import Answer, Exchange, Message

UnaryHandler: TypeAlias = Callable[[Exchange], Awaitable[Message | Answer]]
"""The answer to an exchange; may raise an InferenceError. Cancelled when the client leaves or the deadline passes."""

StreamHandler: TypeAlias = Callable[[Exchange, AsyncIterator[Message]], AsyncIterator[Message]]
"""The answers to a client's messages; may raise an InferenceError. Cancelled likewise."""


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Have `function` called on `loop`, unless that is closed: then nobody waits. Any thread."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


class Coroutines:
    """Runs coroutines that answer exchanges, on one event loop. Any thread may call `answer` and `answer_stream`."""

    def __init__(self) -> None:
        """On the event loop that is to run them."""
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, exchange: Exchange, handler: UnaryHandler) -> None:
        """Have `handler` answer a unary exchange."""
        self._loop.call_soon_threadsafe(self._run, exchange, _answer(exchange, handler))

    def answer_stream(self, exchange: Exchange, handler: StreamHandler) -> None:
        """Have `handler` answer a streaming exchange."""
        self._loop.call_soon_threadsafe(self._run, exchange, _answer_stream(exchange, handler))

    def _run(self, exchange: Exchange, work: Awaitable[None]) -> None:
        task = self._loop.create_task(_failing(exchange, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        exchange.on_cancel(partial(self._loop.call_soon_threadsafe, task.cancel))


async def _failing(exchange: Exchange, work: Awaitable[None]) -> None:
    try:
        await work
    except asyncio.CancelledError:
        exchange.fail(AttemptCancelled("the work on the request was cancelled"))  # nothing, if the client has left
        raise
    except Exception as error:
        fail(exchange, error)


async def _answer(exchange: Exchange, handler: UnaryHandler) -> None:
    answer = await handler(exchange)
    if isinstance(answer, Answer):
        exchange.reply(answer.message, answer.trailers)
    else:
        exchange.reply(answer)


async def _answer_stream(exchange: Exchange, handler: StreamHandler) -> None:
    loop = asyncio.get_running_loop()
    async for message in handler(exchange, _messages(exchange)):
        if not exchange.send(message):
            room = loop.create_future()
            exchange.on_writable(_settling(loop, room))
            await room
    exchange.finish()


async def _messages(exchange: Exchange) -> AsyncIterator[Message]:
    """The client's messages, one after another as they are asked for."""
    loop = asyncio.get_running_loop()
    while True:
        coming: asyncio.Future[Message | None] = loop.create_future()
        exchange.on_message(_settling(loop, coming))
        message = await coming
        if message is None:
            return
        yield message


def _settling(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> Callable[..., None]:
    """What settles `future` from any thread."""

    def settle(value: Any) -> None:
        if not future.done():
            future.set_result(value)

    def soon(value: Any = None) -> None:
        loop.call_soon_threadsafe(settle, value)

    return soon
