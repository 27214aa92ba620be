"""The only place that turns an exception into the status that a client gets."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from dl_inference_core import children
from dl_inference_core.errors import HandlerFailed, InferenceError, causes, text_of
from dl_inference_core.transport import Exchange, with_added

_log = logging.getLogger(__name__)

_WINDOW_S = 10.0
_TRACEBACKS, _LINES = 10, 200
"""In a window: tracebacks of one kind, and lines in all. A client that makes every request fail then writes some 200 KB
a minute; it wrote 21 MB before."""
_MOST_KINDS = 256


def fail(exchange: Exchange, error: BaseException) -> None:
    """End `exchange` with the status that belongs to `error`. Any thread.

    An InferenceError says its status itself. HandlerFailed, and every exception that is not an InferenceError, is
    logged with its traceback, under the request id that the client gets. The exchange keeps neither the traceback nor
    the causes of the error: their frames hold whole messages.
    """
    told = error
    if not isinstance(told, InferenceError) or isinstance(told, HandlerFailed):
        told = _identified(exchange, error)
    for each in (error, told):
        each.__cause__ = each.__context__ = None
        each.with_traceback(None)
    exchange.fail(told)


def do_all(actions: Iterable[Callable[[], object]]) -> None:
    """Do each of `actions`, which belong to different requests, whatever becomes of another. An Exception is logged.

    Raises:
        BaseException: an action raised it, by `sys.exit` in a forked child, say. The other actions are done first.
    """
    exiting: BaseException | None = None
    for action in actions:
        try:
            action()
        except Exception:
            _log.exception("a step of a request failed")
        except BaseException as raised:
            exiting = raised
    if exiting is not None:
        raise exiting


def request_id_of(exchange: Exchange) -> str:
    """The id of a request in logs, in handlers and in the client's error: the client's own `x-request-id`, or one that
    the exchange's metadata has from then on."""
    given = exchange.find_metadata("x-request-id")
    if isinstance(given, str) and given:
        return given
    request_id = uuid.uuid4().hex
    exchange.metadata = with_added(exchange.metadata, (("x-request-id", request_id),))
    return request_id


def as_inference_error(error: BaseException, what: str = "") -> InferenceError:
    """`error` as the client sees it: itself if it is an InferenceError; else HandlerFailed with a text that begins with
    `what`, even for a handler's SystemExit. A child process that a handler forked ends here."""
    children.end_child(error)
    if isinstance(error, InferenceError):
        return error
    failure = HandlerFailed(f"{what}{_in_short(error)}")
    failure.__cause__ = error
    return failure


def _in_short(error: BaseException) -> str:
    """The type and the first line of `error`, for a status message."""
    text = text_of(error).strip().partition("\n")[0]
    if len(text) > 200:
        text = f"{text[:199]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _identified(exchange: Exchange, error: BaseException) -> HandlerFailed:
    request_id = request_id_of(exchange)
    what = text_of(error) if isinstance(error, InferenceError) else f"unexpected {type(error).__name__}"
    _failure_log.write(f"request {request_id} failed", what, error)
    failed = HandlerFailed(f"{what} (request id {request_id})")
    failed.trailers = error.trailers if isinstance(error, InferenceError) else ()
    return failed


class FailureLog:
    """Writes what clients can trigger, within limits. Any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._ends = 0.0
        self._lines = 0
        self._unwritten = 0
        self._tracebacks: dict[tuple[str, str, int], int] = {}
        """In this window, by the type of the error and the line of code that raised it."""

    def write(self, line: str, what: str, error: BaseException) -> None:
        """Write `line`: with the traceback of `error`, if few were written of its type and the line of code that raised
        it; else with `what`, if few lines were written; else count it, and write how many when the window has ended."""
        with self._lock:
            now, unwritten = self._now(), 0
            if now >= self._ends:
                unwritten, self._unwritten = self._unwritten, 0
                self._ends, self._lines = now + _WINDOW_S, 0
                self._tracebacks.clear()
            kind = _raised_at(error)
            known = kind in self._tracebacks or len(self._tracebacks) < _MOST_KINDS
            with_traceback = known and self._tracebacks.get(kind, 0) < _TRACEBACKS
            if known:
                self._tracebacks[kind] = self._tracebacks.get(kind, 0) + 1
            self._lines += 1
            writes = self._lines <= _LINES
            self._unwritten += not writes
        if unwritten:
            _log.error("%d requests more failed, and were not written to the log", unwritten)
        if writes and with_traceback:
            _log.error("%s", line, exc_info=error)
        elif writes:
            _log.error("%s: %s", line, what)


def _raised_at(error: BaseException) -> tuple[str, str, int]:
    *_, error = causes(error)
    name, traceback = type(error).__qualname__, error.__traceback__
    if traceback is None:
        return name, "", 0
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return name, traceback.tb_frame.f_code.co_filename, traceback.tb_lineno


_failure_log = FailureLog()
