"""Requests, and the loops that send them through a gateway or to a node. All figures are CPU µs per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from bench.core.transport import MemoryTransport
from dl_inference_core.tensors import Form, Request
from dl_inference_core.transport import Message
from dl_inference_core.wire.protocol import PROTOCOLS

MODEL = "m"
PROTOCOL = PROTOCOLS["openinference"]
FEATURES = 128
"""Columns of the one row of a request: 512 of its bytes."""
MESSAGE_BYTES = 600
_VALUES = 64
"""Different rows. Ids are never the same twice, as with real clients: a cache of whole messages would gain nothing."""
_WARM_UP = 0.1
"""The share of a load that is sent before it is measured."""


def make_requests(count: int) -> list[bytes]:
    """`count` ModelInferRequests of `MESSAGE_BYTES` bytes, each with an id of its own."""
    rows = np.random.default_rng(1).random((_VALUES, 1, FEATURES), np.float32)
    bare = len(_encode(rows[0], ""))
    width = MESSAGE_BYTES - bare - 2  # an id that is not empty has a tag and a length
    placeholder = "x" * width
    parts = [_encode(row, placeholder).partition(placeholder.encode()) for row in rows]
    requests = []
    for number in range(count):
        head, _, tail = parts[number % _VALUES]
        requests.append(b"%s%0*d%s" % (head, width, number, tail))
    return requests


def _encode(row: Any, id_: str) -> bytes:
    return PROTOCOL.codec.encode_request(Request(payload={"x": row}, form=Form.TENSORS_RAW, model=MODEL, id=id_))


def call(function: Callable[[], object], count: int) -> float:
    """CPU of this thread for one call. The loop is part of it: 0.02 µs."""
    for _ in repeat(None, round(count * _WARM_UP)):
        function()
    begun = time.thread_time()
    for _ in repeat(None, count):
        function()
    return (time.thread_time() - begun) / count * 1e6


def forward(transport: MemoryTransport, messages: Sequence[bytes], at_once: int) -> float:
    """CPU of this thread: the service begins `at_once` requests in one call, then all of their attempts end well.

    Raises:
        InferenceError: a request failed.
        RuntimeError: a request was not forwarded once.
    """
    groups = [messages[start : start + at_once] for start in range(0, len(messages), at_once)]
    method = PROTOCOL.node_method

    def send(groups: Sequence[Sequence[bytes]]) -> int:
        ended = 0
        for group in groups:
            transport.begin(method, group)
            ended += transport.end_attempts()
        return ended

    send(groups[: round(len(groups) * _WARM_UP)])
    begun = time.thread_time()
    ended = send(groups)
    seconds = time.thread_time() - begun
    transport.take()
    if ended != len(messages):
        raise RuntimeError(f"{len(messages)} requests had {ended} attempts; expected one for each")
    return seconds / ended * 1e6


async def answer(transport: MemoryTransport, messages: Sequence[bytes], in_flight: int) -> float:
    """CPU of this process in a closed loop: an answered request is followed by the next one. The requests that follow
    the answers of one turn of the event loop are begun in one call.

    Raises:
        InferenceError: a request failed.
    """
    await _send_all(transport, messages[: max(round(len(messages) * _WARM_UP), in_flight)], in_flight)
    begun = time.process_time()
    await _send_all(transport, messages, in_flight)
    return (time.process_time() - begun) / len(messages) * 1e6


async def ask(transport: MemoryTransport) -> None:
    """One request to a node whose model gives back its inputs.

    Raises:
        InferenceError: the request failed.
        RuntimeError: the answer is not the input.
    """
    (message,) = make_requests(1)
    response = PROTOCOL.codec.decode_response(bytes(await _send_all(transport, (message,), 1)))
    sent, came = PROTOCOL.codec.decode_request(message).payload, response.payload
    if not (isinstance(sent, Mapping) and isinstance(came, Mapping) and np.array_equal(sent["x"], came["x"])):
        raise RuntimeError("the node's answer differs from the input; expected the same, as the model is an echo")


async def _send_all(transport: MemoryTransport, messages: Sequence[bytes], in_flight: int) -> Message:
    """The last answer."""
    finished: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    method = PROTOCOL.node_method
    sent = min(in_flight, len(messages))
    answered = 0

    def go_on() -> None:
        nonlocal sent, answered
        try:
            answers = transport.take()
        except Exception as error:
            if not finished.done():
                finished.set_exception(error)
            return
        if not answers:  # two threads have woken the loop, and the first time took all
            return
        answered += len(answers)
        if following := messages[sent : sent + len(answers)]:
            sent += len(following)
            transport.begin(method, following)
        elif answered == len(messages):
            finished.set_result(answers[-1])

    transport.on_end = go_on
    transport.begin(method, messages[:sent])
    return await finished
