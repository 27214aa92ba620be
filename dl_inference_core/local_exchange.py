"""Exchanges that this process begins itself: REST's, and those of tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from dl_inference_core.errors import Code, InferenceError
from dl_inference_core.transport import Answer, Message, Metadata, Service, Trailers, UnaryExchange


class LocalExchange(UnaryExchange):
    """A unary exchange without a socket. Its maker waits for `outcome`.

    Attributes:
        answer: how it was answered; None before, and where it has failed.
        error: how it has failed; None before, where it was answered, and once `outcome` has raised it.
    """

    __slots__ = ("_left", "_lock", "_loop", "_on_cancel", "_on_end", "_open", "_service", "answer", "error")

    def __init__(
        self,
        method: str,
        message: Message = b"",
        metadata: Metadata = (),
        deadline: float | None = None,
        *,
        service: Service | None = None,
    ) -> None:
        """Args:
        service: is told when it has ended.
        """
        super().__init__(method, message, metadata, deadline)
        self._service = service
        self.answer: Answer | None = None
        self.error: InferenceError | None = None
        self._open = [True]
        """Empty once it has ended. The thread that pops the item has ended it: `pop` is atomic."""
        self._left = False
        self._lock = threading.Lock()
        """Of `_left` and `_on_cancel`."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_cancel: list[Callable[[], object]] = []
        self._on_end: Callable[[], object] | None = None

    async def outcome(self) -> Message:
        """The answer's bytes. Cancelling it is the client's leaving.

        Raises:
            InferenceError: it has failed.
        """
        self._loop = loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():
                ended.set_result(None)

        self._on_end = lambda: loop.call_soon_threadsafe(settle)
        if not self._open:
            settle()
        try:
            await ended
        except asyncio.CancelledError:
            self.leave()
            raise
        if self.error is not None:
            error, self.error = self.error, None  # its traceback will lead here
            try:
                raise error
            finally:
                del error
        assert self.answer is not None
        return self.answer.message

    def leave(self) -> None:
        """End it as a client does that leaves."""
        if not self._end():
            return
        with self._lock:
            self._left = True
            callbacks, self._on_cancel = self._on_cancel, []
        self._ended(Code.CANCELLED)
        for callback in callbacks:
            callback()

    def _end(self) -> bool:
        try:
            return self._open.pop()
        except IndexError:
            return False

    def _ended(self, code: Code) -> None:
        with self._lock:
            self._on_cancel = []  # callbacks lead back here: the message would be garbage
        if self._service is not None:
            self._service.ended(self, code)
        if self._on_end is not None:
            self._on_end()

    def reply(self, message: Message, trailers: Trailers = ()) -> None:
        if self._end():
            self.answer = Answer(message, trailers)
            self._ended(Code.OK)

    def fail(self, error: InferenceError) -> None:
        if self._end():
            self.error = error
            self._ended(error.code)

    def on_cancel(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._left:
                self._on_cancel.append(callback)
                return
        assert self._loop is not None, "only `outcome` has it left"
        self._loop.call_soon_threadsafe(callback)
