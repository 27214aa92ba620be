"""Which nodes may be chosen: judged from what requests meet, and by probes of those that failed.

A node that cannot be reached is left out at once. One that times out or fails five times running is suspect, and left
out only if a probe fails too. Whoever is left out is probed until it answers: after 0.1 s, then ever later, up to 1 s;
the pauses start again from 0.1 s only once a request has succeeded, so that a node which answers probes but no requests
gets few of them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from dl_inference_core.errors import Code, InferenceError, NodeUnreachable
from dl_inference_core.transport import Call, Connection

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_PROBE_TIMEOUT_S = 0.5
_FAILURES_TO_SUSPECT = 5
_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


class Health:
    """What is known of one endpoint. Event loop only."""

    __slots__ = ("_changed", "_connection", "_failures", "_pause_s", "_probing", "usable")

    def __init__(self, connection: Connection, changed: Callable[[], None]) -> None:
        """Args:
        changed: called whenever `usable` changes.
        """
        self._connection = connection
        self._changed = changed
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._probing: asyncio.Task[None] | None = None
        self.usable = True

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S

    def failed(self, error: InferenceError) -> None:
        """An attempt ended by the node's fault."""
        self._failures += 1
        if isinstance(error, NodeUnreachable):
            self._leave_out()
        elif self._failures >= _FAILURES_TO_SUSPECT and self._probing is None:
            self._failures = 0
            self._probing = asyncio.ensure_future(self._verify())

    async def check(self) -> None:
        """Probe once; leave the node out if it does not answer."""
        if not await self._answers():
            self._leave_out()

    async def close(self) -> None:
        """Stop probing."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def _leave_out(self) -> None:
        if self.usable:
            self.usable = False
            self._changed()
        if self._probing is None:
            self._probing = asyncio.ensure_future(self._bring_back())

    async def _verify(self) -> None:
        answers = await self._answers()
        if self.usable:  # not left out meanwhile
            if answers:
                self._probing = None
                return
            self.usable = False
            self._changed()
        await self._bring_back()

    async def _bring_back(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s * random.uniform(0.75, 1))  # noqa: S311 - jitter
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            if await self._answers():
                break
        self._probing = None
        self._failures = 0
        self.usable = True
        self._changed()

    async def _answers(self) -> bool:
        """Whether the node says SERVING to a grpc.health.v1 check, or answers that it knows no such check."""
        probe = Call(method=_CHECK, request=b"", deadline=time.monotonic() + _PROBE_TIMEOUT_S, background=True)
        try:
            return await self._connection.call(probe) == _SERVING
        except InferenceError as error:
            return error.code is Code.UNIMPLEMENTED
