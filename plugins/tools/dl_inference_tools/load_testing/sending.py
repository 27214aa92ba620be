"""One process of the load: it sends on an event loop of its own, and measures.

Coordinated omission is what a load tester does that sends the next request only after a slow answer: the requests that
users would have sent meanwhile are not there, and neither are their latencies. So in an open loop requests go out when
they are due whatever became of others, and latency counts from then (Gil Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import selectors
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc.aio

from dl_inference_tools.load_testing.request import Message, Target
from dl_inference_tools.load_testing.results import Load, Row, encoded, histogram

_TELL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process does of one load.

    Attributes:
        load: the part of it.
        first, step: of a load whose requests are due evenly: this process sends number `first`, `first` + `step`, ….
        start_ns: when it begins, its warm-up included, on the clock of `time.monotonic_ns`.
    """

    load: Load
    first: int
    step: int
    start_ns: int


def work(pipe: Connection, target: Target, message: Message, connections: int, open_loop: bool) -> None:
    """The process: connects, says so by a None, then takes `Part`s, says how many requests it has done, and at the end
    of each part sends a `Row`. It ends when the pipe does, even amid a part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    with contextlib.suppress(EOFError, ConnectionError), asyncio.Runner(loop_factory=_loop(open_loop)) as runner:
        calls = runner.run(_connected(target, message, connections))
        pipe.send(None)
        while True:
            sender = _Sender(pipe.recv(), message, calls, target.timeout_s)
            pipe.send(runner.run(sender.run(pipe.send)))


def _loop(open_loop: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    if open_loop:
        # The others, uvloop among them, wake to the millisecond; this one, within the tenth of it.
        return lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop

        return new_event_loop
    return asyncio.new_event_loop


async def _connected(target: Target, message: Message, connections: int) -> list[Any]:
    """A way to send on each of the connections, all of which stand."""
    channels = [target.channel(grpc.aio) for _ in range(connections)]
    async with asyncio.timeout(target.timeout_s):
        for channel in channels:
            await channel.channel_ready()
    return [channel.unary_unary(message.method) for channel in channels]


class _Sender:
    """One part of a load, sent and measured. Event loop only."""

    def __init__(self, part: Part, message: Message, calls: Sequence[Any], timeout_s: float) -> None:
        self._part = part
        self._load = part.load
        self._message = message
        self._calls = calls
        self._timeout_s = timeout_s
        self._begin = part.start_ns + round(self._load.warm_up_s * 1e9)
        # Where requests are counted, the end is when the last of them has its answer.
        counted = self._load.requests is not None
        self._end = sys.maxsize if counted else self._begin + round(self._load.duration_s * 1e9)
        self._left = self._load.requests if self._load.requests is not None else sys.maxsize
        self._latency, self._behind = histogram(), histogram()
        self._failed: Counter[str] = Counter()
        self._said: dict[str, str] = {}
        self._answered = self._done = self._unsent = 0

    async def run(self, tell: Callable[[int], None]) -> Row:
        while (left_ns := self._part.start_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - a sleep may end early
            await asyncio.sleep(left_ns / 1e9)
        cpu_s, began_s = time.thread_time(), time.monotonic()
        sending = asyncio.create_task(self._closed() if self._load.rate is None else self._open())
        telling = asyncio.create_task(self._tell(tell))
        done, _ = await asyncio.wait({sending, telling}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises if nobody hears it any more
        cpu_s, took_s = time.thread_time() - cpu_s, time.monotonic() - began_s
        telling.cancel()
        return Row(
            load=self._load,
            seconds=max(0.0, min(self._end, time.monotonic_ns()) - self._begin) / 1e9,
            answered=self._answered,
            failed=dict(self._failed),
            said=self._said,
            unsent=self._unsent,
            busy=cpu_s / took_s if took_s else 0.0,
            latency=encoded(self._latency),
            behind=encoded(self._behind),
        )

    async def _tell(self, tell: Callable[[int], None]) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            tell(self._done)

    async def _closed(self) -> None:
        calls = itertools.islice(itertools.cycle(self._calls), self._load.in_flight)
        await asyncio.gather(*(self._one_by_one(call) for call in calls))

    async def _one_by_one(self, call: Any) -> None:
        while (now := time.monotonic_ns()) < self._end and self._left > 0:
            if now >= self._begin:
                self._left -= 1
            await self._send(call, now)

    async def _open(self) -> None:
        sending: set[asyncio.Task[None]] = set()
        for due, call in zip(self._due(), itertools.cycle(self._calls), strict=False):
            if due >= self._end or self._left <= 0:
                break
            if due >= self._begin:
                self._left -= 1
            # One turn of the loop at the least, so that answers are taken as they come.
            await asyncio.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            if time.monotonic_ns() >= self._end:
                self._unsent += due >= self._begin
                continue
            task = asyncio.create_task(self._send_due(call, due))
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.gather(*sending)

    def _due(self) -> Iterator[int]:
        """When requests are due, by `time.monotonic_ns`."""
        rate = self._load.rate
        assert rate is not None
        start = self._part.start_ns
        if self._load.poisson:
            gaps = random.Random(self._part.first)  # noqa: S311 - the same in each run
            due = float(start)
            while True:
                due += gaps.expovariate(rate) * 1e9
                yield round(due)
        for number in itertools.count(self._part.first, self._part.step):
            yield start + round(number * 1e9 / (rate * self._part.step))

    async def _send_due(self, call: Any, due: int) -> None:
        if self._begin <= due:
            self._behind.record_value(max(1, (time.monotonic_ns() - due) // 1000))
        await self._send(call, due)

    async def _send(self, call: Any, due: int) -> None:
        failed = said = ""
        try:
            answer = await call(self._message.body, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            failed, said = error.code().name, error.details() or ""
        else:
            said = self._message.failure(answer)
            failed = "FAILURE" if said else ""
        now = time.monotonic_ns()
        self._answered += not failed and self._begin <= now < self._end
        if not self._begin <= due < self._end:
            return
        self._done += 1
        if failed:
            self._failed[failed] += 1
            self._said.setdefault(failed, said)
        else:
            self._latency.record_value(max(1, (now - due) // 1000))
