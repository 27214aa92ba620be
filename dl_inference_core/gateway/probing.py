"""How a node is asked how it is: by grpc.health.v1, by what model servers have in its place, or by connecting to it."""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from dl_inference_core import sockets
from dl_inference_core.coroutines import call_soon
from dl_inference_core.errors import Blame, Code, InferenceError, NodeGaveUp, NodeUnreachable
from dl_inference_core.transport import Connection
from dl_inference_core.wire.protocol import VERSIONS

_log = logging.getLogger(__name__)


class Verdict(enum.Enum):
    """What one probe says of a node."""

    WELL = "well"
    NOT_SERVING = "not serving"  # it says so itself
    UNREACHABLE = "unreachable"  # it refused or dropped the connection, or said UNAVAILABLE
    FAILED = "failed"  # no answer in time, or an error that is the node's fault


@dataclass(frozen=True, slots=True)
class _Question:
    """Attributes:
    method: asked with an empty request.
    ready: the one answer by which the node is well; None is any.
    """

    method: str
    ready: bytes | None


_TRUE = b"\x08\x01"  # HealthCheckResponse{status: SERVING}; ServerReadyResponse{ready: true}
_CHECK = _Question("/grpc.health.v1.Health/Check", _TRUE)
_READY = _Question("/inference.GRPCInferenceService/ServerReady", _TRUE)
# Without a model's name a server refuses to answer; a refusal is an answer.
_STATUS = _Question(VERSIONS.node_method, None)
_QUESTIONS = {
    "auto": (_CHECK, _READY, _STATUS),
    "grpc": (_CHECK,),
    "openinference": (_READY,),
    "tfserving": (_STATUS,),
    "tcp": (),
}
# Statuses that only a server gives which is there and at work.
_ALIVE = (Blame.CLIENT, Blame.NODE_SOFTLY)
_OUR_OWN_WANT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Prober:
    """Asks one node. Event loop only, but for `forget`: any thread.

    Of several questions the one that the node knows is remembered. A node that knows none, as Seldon's, is well: it
    answers gRPC.
    """

    __slots__ = ("_address", "_complained", "_connection", "_known", "_questions", "_timeout_s")

    def __init__(self, address: str, connection: Connection, kind: str, timeout_s: float) -> None:
        """Args:
        kind: as `HealthConfig.probe`.
        timeout_s: for all the questions of one probe together.
        """
        self._address = address
        self._connection = connection
        self._questions = self._known = _QUESTIONS[kind]
        self._timeout_s = timeout_s
        self._complained = False

    def forget(self) -> None:
        """Forget which question the node knows: it may come back as another server."""
        self._known = self._questions

    async def ask(self) -> Verdict:
        """Probe once. Lets nothing through that a connection raises: who is not probed any more never comes back."""
        try:
            return await self._ask()
        except Exception:
            if not self._complained:
                self._complained = True
                _log.exception("a probe of node %s failed by a fault of this gateway", self._address)
            return Verdict.FAILED

    async def _ask(self) -> Verdict:
        if not self._questions:
            return await self._connect()
        deadline = time.monotonic() + self._timeout_s
        for question in self._known:
            try:
                answer, _ = await self._connection.call(question.method, b"", timeout_s=deadline - time.monotonic())
            except InferenceError as error:
                if error.code is Code.UNIMPLEMENTED:
                    continue
                if isinstance(error, NodeUnreachable):
                    return Verdict.UNREACHABLE
                if error.blame not in _ALIVE or isinstance(error, NodeGaveUp):
                    return Verdict.FAILED
                well = True
            else:
                well = question.ready in (None, answer)
            self._known = (question,)
            return Verdict.WELL if well else Verdict.NOT_SERVING
        self._known = self._known[:1]
        return Verdict.WELL

    async def _connect(self) -> Verdict:
        path = sockets.path_of(self._address)
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(self._timeout_s):
                if path is not None:
                    _, writer = await asyncio.open_unix_connection(path)
                else:
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except TimeoutError:
            return Verdict.FAILED
        except OSError as error:
            return Verdict.FAILED if error.errno in _OUR_OWN_WANT else Verdict.UNREACHABLE
        except ValueError:  # no name that could be looked up
            return Verdict.UNREACHABLE
        writer.close()
        return Verdict.WELL


class BackgroundProbes:
    """Runs the probes of one node on the event loop on which it was made. `settled` and `close`: event loop only."""

    __slots__ = ("_closed", "_loop", "_now", "_prober", "_task")

    def __init__(self, prober: Prober, now: Callable[[], float]) -> None:
        """Args:
        now: the clock of when a probe began.
        """
        self._prober = prober
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def begin(self, ended: Callable[[Verdict, float], None]) -> None:
        """As `health.Probes.begin`. Any thread; not while a probe is under way."""
        call_on_loop(self._loop, lambda: self._begin(ended))

    def forget(self) -> None:
        """As `health.Probes.forget`. Any thread."""
        self._prober.forget()

    async def settled(self) -> None:
        """Wait for the probe that is under way, if one is."""
        if self._task is not None:
            await asyncio.wait((self._task,))

    async def close(self) -> None:
        """End the probe that is under way, of which nobody is told, and begin none any more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _begin(self, ended: Callable[[Verdict, float], None]) -> None:
        if not self._closed:
            self._task = self._loop.create_task(self._run(ended))

    async def _run(self, ended: Callable[[Verdict, float], None]) -> None:
        began = self._now()
        try:
            verdict = await self._prober.ask()
        except asyncio.CancelledError:
            if self._task is None or self._task.cancelling():  # by `close`, or the event loop ends
                raise
            verdict = Verdict.FAILED  # the connection was closed
        finally:
            self._task = None
        ended(verdict, began)


def call_on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call `function` on the thread of `loop`: at once if that is this one, else soon; not if `loop` is closed. Any
    thread."""
    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:
        here = False
    if here:
        function()
    else:
        call_soon(loop, function)
