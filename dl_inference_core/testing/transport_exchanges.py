"""The suite for transports: the contract of exchanges, and of messages that are forwarded to nodes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest

from dl_inference_core.coroutines import UnaryHandler, call_soon
from dl_inference_core.errors import (
    AnswerMalformed,
    AttemptCancelled,
    BadRequest,
    Code,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    NodeFailed,
    NodeUnreachable,
)
from dl_inference_core.testing.loopback import (
    ECHO,
    HOLD,
    LOOPBACK,
    DirectService,
    Hold,
    LoopbackConformance,
    Recorder,
    ask,
    asynchronous,
    by_key,
    connected,
    echo,
    error_of,
    free_port,
    official,
    serving,
)
from dl_inference_core.transport import (
    Answer,
    Attempt,
    Connection,
    Exchange,
    Extras,
    Limits,
    Message,
    Sink,
    Trailers,
    Transport,
)
from dl_inference_core.transport import Ended as AttemptEnded

MESSAGE = b"\x0a\x05hello"
"""A well-formed protobuf message."""


class Told:
    """A callback that notes what it was told, on which thread; and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._called = asyncio.Event()

    def __call__(self, *values: Any) -> None:
        self.calls.append(values)
        self.threads.append(threading.get_ident())
        call_soon(self._loop, self._called.set)

    def called_here(self) -> bool:
        """Whether this thread has called it. Right after a registration, that was inside of it; another thread may."""
        return threading.get_ident() in self.threads

    async def called(self, within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            await self._called.wait()

    async def once(self, within_s: float = 5.0) -> tuple[Any, ...]:
        """The values of the only call so far."""
        await self.called(within_s)
        await asyncio.sleep(0.05)
        assert len(self.calls) == 1
        return self.calls[0]


class Ended(Told):
    """A `Done`. `calls` has the error, the trailers and the seconds of each attempt; `contexts` its context."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[object] = []

    def __call__(self, ended: Sequence[AttemptEnded]) -> None:
        for context, *outcome in ended:
            self.contexts.append(context)
            super().__call__(*outcome)


class Rig:
    """A gateway's server and its nodes.

    Attributes:
        address: of the server.
        front: an official channel to it.
        service: of the server.
    """

    def __init__(self, transport: Transport, service: DirectService, address: str, front: Any) -> None:
        self.transport = transport
        self.service = service
        self.address = address
        self.front = front

    def call(self, message: bytes = MESSAGE, **how: Any) -> Any:
        """A call under way, of `grpc.aio`."""
        return self.front.unary_unary(ECHO)(message, **{"timeout": 10, **how})

    async def refusal(self, message: bytes = MESSAGE, **how: Any) -> tuple[Code, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.call(message, **how)
        return Code(error.value.code().value[0]), error.value.details() or ""

    async def ended(self, *codes: Code) -> None:
        """Wait until the service was told that exchanges have ended so."""
        async with asyncio.timeout(5):
            await self.service.has_ended(len(codes))
        assert [code for _, code in self.service.endings] == list(codes)


@asynccontextmanager
async def fronted(
    transport: Transport, begin: Callable[[Exchange], object], *, streaming: bool = False
) -> AsyncIterator[Rig]:
    """A server whose exchanges `begin` is told of."""
    service = DirectService(begin, streaming=streaming)
    server = await transport.serve(service, LOOPBACK, Limits())
    address = f"127.0.0.1:{server.ports[0]}"
    try:
        async with official(address) as channel:
            yield Rig(transport, service, address, channel)
    finally:
        await server.drain(0)


@asynccontextmanager
async def gateway(
    transport: Transport, handler: UnaryHandler, done: Callable[..., object], **how: Any
) -> AsyncIterator[tuple[Rig, Connection]]:
    """A server that forwards each exchange to a node whose method HOLD is `handler`."""
    async with (
        serving(transport, {HOLD: handler}) as address,
        connected(transport, address) as connection,
        fronted(
            transport,
            lambda exchange: exchange.forward(connection, HOLD, done, **how),
        ) as rig,
    ):
        yield rig, connection


class ExchangeConformance(LoopbackConformance):
    """Exchanges are begun and answered by calls, from any thread; the transport forwards their messages."""

    # Answers

    @asynchronous
    async def test_an_exchange_may_be_answered_while_it_begins(self, transport: Transport) -> None:
        async with fronted(transport, lambda exchange: exchange.reply(b"at once", (("x-load", "1"),))) as rig:
            call = rig.call()
            assert await call == b"at once"
            assert ("x-load", "1") in [tuple(pair) for pair in await call.trailing_metadata()]
            await rig.ended(Code.OK)

    @asynchronous
    async def test_an_answer_may_be_a_view(self, transport: Transport) -> None:
        async with fronted(transport, lambda exchange: exchange.reply(memoryview(b"a view")[2:])) as rig:
            assert await rig.call() == b"view"
            await rig.ended(Code.OK)

    @asynchronous
    async def test_any_thread_may_answer_or_fail(self, transport: Transport) -> None:
        def begin(exchange: Exchange) -> None:
            threading.Thread(target=self._answer_from_here, args=(exchange,)).start()

        async with fronted(transport, begin) as rig:
            assert await rig.call(b"ok") == b"ok"
            assert await rig.refusal(b"fail") == (Code.INVALID_ARGUMENT, "as told")
            await rig.ended(Code.OK, Code.INVALID_ARGUMENT)

    @staticmethod
    def _answer_from_here(exchange: Exchange) -> None:
        if exchange.message == b"fail":
            exchange.fail(BadRequest("as told"))
        else:
            exchange.reply(exchange.message)

    @asynchronous
    async def test_many_exchanges_are_answered_together_from_another_thread(self, transport: Transport) -> None:
        waiting: list[Exchange] = []

        def begin(exchange: Exchange) -> None:
            waiting.append(exchange)
            if len(waiting) == 50:
                replies = [(each, b"answer to " + bytes(each.message), ()) for each in waiting]
                threading.Thread(target=type(exchange).reply_all, args=(replies,)).start()

        async with fronted(transport, begin) as rig:
            answers = await asyncio.gather(*(rig.call(b"%d" % number) for number in range(50)))
        assert answers == [b"answer to %d" % number for number in range(50)]

    @asynchronous
    async def test_exchanges_of_many_connections_are_answered_together(self, transport: Transport) -> None:
        """A transport may have a thread for some of the connections, and begin exchanges on several threads at once."""
        waiting: list[Exchange] = []

        def begin(exchange: Exchange) -> None:
            waiting.append(exchange)
            if len(waiting) == 60:
                replies = [(each, b"answer to " + bytes(each.message), ()) for each in waiting]
                threading.Thread(target=type(exchange).reply_all, args=(replies,)).start()

        async with fronted(transport, begin) as rig, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(official(rig.address)) for _ in range(12)]
            calls = [clients[number % 12].unary_unary(ECHO)(b"%d" % number, timeout=10) for number in range(60)]
            assert [await call for call in calls] == [b"answer to %d" % number for number in range(60)]
            await rig.ended(*[Code.OK] * 60)

    @asynchronous
    async def test_the_first_end_wins_and_later_calls_do_nothing(self, transport: Transport) -> None:
        kept: list[Exchange] = []

        def begin(exchange: Exchange) -> None:
            kept.append(exchange)
            exchange.reply(b"first")
            exchange.reply(b"second")
            exchange.fail(BadRequest("third"))
            exchange.on_cancel(never)

        never = Told()
        async with fronted(transport, begin) as rig:
            assert await rig.call() == b"first"
            kept[0].reply(b"fourth")
            kept[0].fail(BadRequest("fifth"))
            assert await rig.call() == b"first"
            await rig.ended(Code.OK, Code.OK)
        assert never.calls == []

    @asynchronous
    async def test_an_error_that_was_answered_is_not_kept(self, transport: Transport) -> None:
        """Nor its traceback, whose frames hold messages."""
        import gc
        import weakref

        class Kept(BadRequest):
            pass

        seen: list[weakref.ref[Kept]] = []

        def begin(exchange: Exchange) -> None:
            try:
                raise Kept("as told")
            except Kept as error:
                seen.append(weakref.ref(error))
                exchange.fail(error.with_traceback(None))

        async with fronted(transport, begin) as rig:
            gc.disable()
            try:
                for _ in range(5):
                    assert (await rig.refusal())[0] is Code.INVALID_ARGUMENT
                await rig.ended(*[Code.INVALID_ARGUMENT] * 5)
                await asyncio.sleep(0.05)
                assert [each() for each in seen] == [None] * 5
            finally:
                gc.enable()

    # The client leaves

    @asynchronous
    async def test_a_client_that_leaves_is_told_once_and_never_inside_the_registration(
        self, transport: Transport
    ) -> None:
        begun, first, second = Told(), Told(), Told()
        inside: list[bool] = []

        def begin(exchange: Exchange) -> None:
            exchange.on_cancel(first)
            begun(exchange)

        async with fronted(transport, begin) as rig:
            call = rig.call()
            (exchange,) = await begun.once()
            call.cancel()
            await first.once(self.prompt_s)
            exchange.on_cancel(second)  # the event has happened already
            inside.append(second.called_here())
            await second.once(self.prompt_s)
            exchange.reply(b"nobody hears it")
            await rig.ended(Code.CANCELLED)
        assert inside == [False]
        assert len(first.calls) == len(second.calls) == 1

    @asynchronous
    async def test_a_deadline_that_passes_is_the_clients_leaving(self, transport: Transport) -> None:
        cancelled = Told()
        async with fronted(transport, lambda exchange: exchange.on_cancel(cancelled)) as rig:
            began = time.monotonic()
            assert (await rig.refusal(timeout=0.3))[0] is Code.DEADLINE_EXCEEDED
            assert 0.25 < time.monotonic() - began < 0.3 + self.prompt_s
            await cancelled.once(self.prompt_s)
            await rig.ended(Code.CANCELLED)

    @asynchronous
    async def test_a_timer_runs_its_function_once_unless_it_is_cancelled(self, transport: Transport) -> None:
        async with fronted(transport, lambda exchange: exchange.reply(b"")):
            fires, cancelled, from_a_thread = Told(), Told(), Told()
            began = time.monotonic()
            transport.call_later(0.1, fires)
            transport.call_later(0.05, cancelled).cancel()
            threading.Thread(target=transport.call_later, args=(0.1, from_a_thread)).start()
            await fires.once()
            assert time.monotonic() - began >= 0.1
            await from_a_thread.once()
            assert cancelled.calls == []

    # Streams

    @asynchronous
    async def test_a_stream_is_read_no_faster_than_it_is_asked_for(self, transport: Transport) -> None:
        """What the service does not read is not taken in: the client's writes wait."""
        opened, message = Told(), bytes(64 * 1024)
        async with fronted(transport, opened, streaming=True) as rig:
            call = rig.front.stream_stream(ECHO)(timeout=20)
            writing = asyncio.ensure_future(self._write(call, message, 400))
            (exchange,) = await opened.once()
            await asyncio.sleep(0.5)
            assert not writing.done(), "25 MB were taken in that nobody has asked for"
            for number in range(401):
                read = Told()
                exchange.on_message(read)
                await read.called()
                assert read.calls == ([(message,)] if number < 400 else [(None,)])
            exchange.finish((("x-load", "1"),))
            assert await call.code() is grpc.StatusCode.OK
            assert ("x-load", "1") in [tuple(pair) for pair in await call.trailing_metadata()]
            await writing

    @staticmethod
    async def _write(call: Any, message: bytes, count: int) -> None:
        for _ in range(count):
            await call.write(message)
        await call.done_writing()

    @asynchronous
    async def test_a_stream_says_when_the_client_reads_too_slowly_and_when_there_is_room(
        self, transport: Transport
    ) -> None:
        opened, message = Told(), bytes(64 * 1024)
        async with fronted(transport, opened, streaming=True) as rig:
            call = rig.front.stream_stream(ECHO)(timeout=20)
            await call.done_writing()
            (exchange,) = await opened.once()
            sent, writable = 0, Told()
            while sent < 1000:
                sent += 1
                if not exchange.send(message):
                    writable = Told()
                    exchange.on_writable(writable)
                    await asyncio.sleep(0.3)  # until what the connection itself takes in is full
                    if not writable.calls:
                        break
            assert sent < 1000, "64 MB were taken that nobody reads"
            read = 0
            while read < sent:
                assert len(await call.read()) == len(message)
                read += 1
            await writable.once()
            exchange.reply(b"last")
            assert await call.read() == b"last"
            assert await call.read() is grpc.aio.EOF
            await rig.ended(Code.OK)

    @asynchronous
    async def test_a_stream_may_end_while_the_client_still_writes(self, transport: Transport) -> None:
        def begin(exchange: Exchange) -> None:
            exchange.on_message(lambda _: exchange.fail(BadRequest("enough")))

        async with fronted(transport, begin, streaming=True) as rig:
            call = rig.front.stream_stream(ECHO)(timeout=10)
            await call.write(b"one")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.value.details() == "enough"
            await rig.ended(Code.INVALID_ARGUMENT)

    @asynchronous
    async def test_another_threads_message_comes_before_the_end_that_follows_it(self, transport: Transport) -> None:
        def begin(exchange: Exchange) -> None:
            def answer(_: Message | None) -> None:
                sender = threading.Thread(target=exchange.send, args=(b"last",))
                sender.start()
                sender.join()
                exchange.finish()

            exchange.on_message(answer)

        async with fronted(transport, begin, streaming=True) as rig:
            call = rig.front.stream_stream(ECHO)(iter((MESSAGE,)), timeout=10)
            assert [message async for message in call] == [b"last"]
            await rig.ended(Code.OK)

    @asynchronous
    async def test_a_client_that_leaves_a_stream_which_it_does_not_read_is_told_of(self, transport: Transport) -> None:
        opened, cancelled = Told(), Told()
        async with fronted(transport, opened, streaming=True) as rig:
            call = rig.front.stream_stream(ECHO)(timeout=20)
            await call.done_writing()
            (exchange,) = await opened.once()
            exchange.on_cancel(cancelled)
            for _ in range(100):
                exchange.send(bytes(64 * 1024))
            await asyncio.sleep(0.2)  # the transport is in the midst of a write
            call.cancel()
            await cancelled.once(self.prompt_s)
            await rig.ended(Code.CANCELLED)

    # Forwarding

    @asynchronous
    async def test_a_message_goes_to_a_node_and_its_answer_to_the_client(self, transport: Transport) -> None:
        done = Ended()
        sent: Trailers = (("x-load", "0.5"), ("x-private", "1"), ("x-report-bin", b"\0\xff"))
        seen = Recorder()

        async def answer(exchange: Exchange) -> Answer:
            await seen(exchange)
            return Answer(MESSAGE + MESSAGE, sent)

        metadata = (("x-tag", "one"), ("trace-bin", b"\0\1"))
        own = (("x-own", "goes on"), ("x-own", "both"), ("x-tag", "replaced"), ("own-bin", b"\xff"))
        context = object()
        async with gateway(transport, answer, done, context=context, metadata=metadata, timeout_s=5.0) as (rig, _):
            call = rig.call(metadata=own)
            assert await call == MESSAGE + MESSAGE
            trailers = [tuple(pair) for pair in await call.trailing_metadata()]
            assert by_key(trailers) == by_key(pair for pair in sent if pair[0] != "x-private")
            error, told, seconds = await done.once()
            await rig.ended(Code.OK)
        assert error is None
        assert done.contexts == [context]
        assert by_key(told) == by_key(sent)
        assert 0 < seconds < 5
        (at_node,) = seen.calls
        assert (at_node.method, at_node.message) == (HOLD, MESSAGE)
        assert by_key(at_node.metadata) == by_key((*metadata, *(pair for pair in own if pair[0] != "x-tag")))
        assert at_node.deadline is not None
        assert at_node.deadline - time.monotonic() < 5.1

    @asynchronous
    async def test_what_is_no_answer_reaches_the_service_alone(self, transport: Transport) -> None:
        async def fail(exchange: Exchange) -> bytes:
            if exchange.message == b"\x08\x01":
                error = NodeFailed("broken")
                error.trailers = (("x-load", "0.9"),)
                raise error
            return b"" if exchange.message == b"\x08\x02" else b"\xff no protobuf"

        cases = {b"\x08\x01": NodeFailed, b"\x08\x02": AnswerMalformed, b"": AnswerMalformed}
        begun, done = Told(), Ended()

        def begin(connection: Connection, exchange: Exchange) -> None:
            begun(exchange)
            exchange.forward(connection, HOLD, done)

        async with (
            serving(transport, {HOLD: fail}) as address,
            connected(transport, address) as connection,
            fronted(transport, partial(begin, connection)) as rig,
        ):
            for message, expected in cases.items():
                begun, done = Told(), Ended()
                call = rig.call(message)
                (exchange,) = await begun.once()
                error, trailers, _ = await done.once()
                assert type(error) is expected
                assert by_key(trailers) == ([("x-load", "0.9")] if expected is NodeFailed else [])
                assert not call.done()
                exchange.reply(b"the service answers")
                assert await call == b"the service answers"

    @asynchronous
    async def test_an_empty_answer_is_good_where_the_service_says_so(self, transport: Transport) -> None:
        async def empty(_: Exchange) -> bytes:
            return b""

        done = Ended()
        async with gateway(transport, empty, done, allow_empty=True) as (rig, _):
            assert await rig.call() == b""
            assert (await done.once())[0] is None

    @asynchronous
    async def test_an_attempt_that_failed_may_be_followed_by_another_from_its_callback(
        self, transport: Transport
    ) -> None:
        dead = f"127.0.0.1:{free_port()}"
        errors: list[InferenceError | None] = []
        first, second = object(), Ended()

        async with (
            serving(transport, {HOLD: echo}) as address,
            connected(transport, dead) as bad,
            connected(transport, address) as good,
        ):

            def begin(exchange: Exchange) -> None:
                def retry(ended: Sequence[AttemptEnded]) -> None:
                    ((context, error, _, _),) = ended
                    assert context is first
                    errors.append(error)
                    exchange.forward(good, HOLD, second)

                exchange.forward(bad, HOLD, retry, first, timeout_s=5.0)

            async with fronted(transport, begin) as rig:
                assert await rig.call() == MESSAGE
                assert isinstance(errors[0], NodeUnreachable)
                assert (await second.once())[0] is None
                await rig.ended(Code.OK)

    @asynchronous
    async def test_any_thread_may_forward(self, transport: Transport) -> None:
        done = Ended()
        async with serving(transport, {HOLD: echo}) as address, connected(transport, address) as connection:

            def begin(exchange: Exchange) -> None:
                threading.Thread(target=exchange.forward, args=(connection, HOLD, done)).start()

            async with fronted(transport, begin) as rig:
                assert await rig.call() == MESSAGE
                assert (await done.once())[0] is None
                await rig.ended(Code.OK)

    @pytest.mark.parametrize("first_is_quicker", [True, False])
    @asynchronous
    async def test_the_quicker_of_two_attempts_answers_and_the_other_is_cancelled(
        self, transport: Transport, first_is_quicker: bool
    ) -> None:
        hold, slow, quick = Hold(), Ended(), Ended()
        attempts = [(HOLD, slow), (ECHO, quick)]
        async with (
            serving(transport, {HOLD: hold, ECHO: echo}) as address,
            connected(transport, address) as connection,
        ):

            def begin(exchange: Exchange) -> None:
                for method, done in attempts[::-1] if first_is_quicker else attempts:
                    exchange.forward(connection, method, done)

            async with fronted(transport, begin) as rig:
                assert await rig.call() == MESSAGE
                assert (await quick.once())[0] is None
                assert isinstance((await slow.once())[0], AttemptCancelled)
                await rig.ended(Code.OK)
            if hold.entered.is_set():
                await hold.was_cancelled(self.prompt_s)

    @asynchronous
    async def test_an_attempt_that_the_service_cancels_leaves_the_exchange_open(self, transport: Transport) -> None:
        hold, done, begun = Hold(), Ended(), Told()

        async with serving(transport, {HOLD: hold}) as address, connected(transport, address) as connection:

            def begin(exchange: Exchange) -> None:
                begun(exchange, exchange.forward(connection, HOLD, done))

            async with fronted(transport, begin) as rig:
                call = rig.call()
                await hold.was_entered()
                exchange, attempt = await begun.once()
                assert isinstance(attempt, Attempt)
                threading.Thread(target=attempt.cancel).start()
                assert isinstance((await done.once())[0], AttemptCancelled)
                await hold.was_cancelled(self.prompt_s)
                attempt.cancel()  # does nothing
                assert not call.done()
                exchange.fail(BadRequest("given up"))
                with pytest.raises(grpc.aio.AioRpcError, match="given up"):
                    await call
                await rig.ended(Code.INVALID_ARGUMENT)

    @asynchronous
    async def test_a_client_that_leaves_cancels_the_attempt_at_the_node(self, transport: Transport) -> None:
        hold, done = Hold(), Ended()
        async with gateway(transport, hold, done) as (rig, _):
            call = rig.call()
            await hold.was_entered()
            call.cancel()
            assert isinstance((await done.once(self.prompt_s))[0], AttemptCancelled)
            await hold.was_cancelled(self.prompt_s)
            await rig.ended(Code.CANCELLED)

    @asynchronous
    async def test_an_attempt_has_a_timeout_of_its_own(self, transport: Transport) -> None:
        hold, done = Hold(), Ended()
        async with gateway(transport, hold, done, timeout_s=0.3) as (rig, _):
            call = rig.call()
            error, _, seconds = await done.once()
            assert isinstance(error, DeadlineExceeded)
            assert 0.25 < seconds < 0.3 + self.prompt_s
            assert not call.done()
            await hold.was_cancelled(self.prompt_s)
            call.cancel()

    @asynchronous
    async def test_an_attempt_after_the_end_sends_nothing_and_says_so(self, transport: Transport) -> None:
        hold, done = Hold(), Ended()
        async with serving(transport, {HOLD: hold}) as address, connected(transport, address) as connection:

            def begin(exchange: Exchange) -> None:
                exchange.reply(b"ended")
                exchange.forward(connection, HOLD, done)
                assert not done.called_here(), "a callback never runs inside the call that registers it"

            async with fronted(transport, begin) as rig:
                assert await rig.call() == b"ended"
                assert isinstance((await done.once())[0], AttemptCancelled)
        assert not hold.entered.is_set()

    @asynchronous
    async def test_functions_may_change_the_request_and_the_answer(self, transport: Transport) -> None:
        done, note = Ended(), Recorder()
        extras = Extras(
            change_request=lambda message: memoryview(b"\x10\x07" + bytes(message)),
            change_answer=lambda message: bytes(message)[2:] + b"\x18\x09",
        )
        async with gateway(transport, note, done, extras=extras) as (rig, _):
            assert await rig.call() == MESSAGE + b"\x18\x09"
            assert (await done.once())[0] is None
        assert note.calls[0].message == b"\x10\x07" + MESSAGE

    @pytest.mark.parametrize("which", ["change_request", "change_answer"])
    @asynchronous
    async def test_a_function_that_raises_ends_the_attempt_alone(self, transport: Transport, which: str) -> None:
        async with serving(transport, {HOLD: echo}) as address, connected(transport, address) as connection:
            for raised, expected in ((BadRequest("not so"), BadRequest), (ZeroDivisionError(), HandlerFailed)):
                done, begun = Ended(), Told()

                def change(_: Message, raised: Exception = raised) -> Message:
                    raise raised

                def begin(exchange: Exchange, done: Ended = done, begun: Told = begun, change: Any = change) -> None:
                    begun(exchange)
                    exchange.forward(connection, HOLD, done, extras=Extras(**{which: change}))

                async with fronted(transport, begin) as rig:
                    call = rig.call()
                    assert type((await done.once())[0]) is expected
                    (exchange,) = await begun.once()
                    exchange.reply(b"the service answers")
                    assert await call == b"the service answers"

    @asynchronous
    async def test_a_sink_has_copies_and_drops_what_does_not_fit(self, transport: Transport) -> None:
        sink = Sink(2 * len(MESSAGE) + 1)
        async with gateway(transport, echo, lambda *_: None, extras=Extras(sink=sink)) as (rig, _):
            for _ in range(3):
                assert await rig.call() == MESSAGE
            await rig.ended(*[Code.OK] * 3)
            await asyncio.sleep(0.05)
            assert sink.take() == (MESSAGE, MESSAGE)
            assert sink.take() is None
            assert sink.dropped == 2
            assert await rig.call() == MESSAGE
            await rig.ended(*[Code.OK] * 4)
            await asyncio.sleep(0.05)
            assert sink.take() == (MESSAGE, MESSAGE)

    @asynchronous
    async def test_300_exchanges_are_forwarded_at_once(self, transport: Transport) -> None:
        ended = 0

        def done(attempts: Sequence[AttemptEnded]) -> None:
            nonlocal ended
            assert all(error is None for _, error, _, _ in attempts)
            ended += len(attempts)

        async with gateway(transport, echo, done) as (rig, _):
            messages = [MESSAGE + b"\x10" + bytes([number % 100]) for number in range(300)]
            assert await asyncio.gather(*(rig.call(message) for message in messages)) == messages
            await rig.ended(*[Code.OK] * 300)
        assert ended == 300

    @asynchronous
    async def test_a_large_metadata_value_ends_no_other_call(self, transport: Transport) -> None:
        """One of 70 KB, over the 64 KB that HTTP/2 libraries take: it is refused alone."""
        hold = Hold()
        async with serving(transport, {HOLD: hold, ECHO: echo}) as address, connected(transport, address) as connection:
            staying = asyncio.ensure_future(ask(connection, HOLD, b"stays"))
            await hold.was_entered()
            for _ in range(3):
                await error_of(ask(connection, metadata=(("x-large", "x" * 70_000),), timeout_s=5))
            assert await ask(connection, ECHO, b"next") == b"next"
            hold.release.set()
            assert await staying == b"stays"
