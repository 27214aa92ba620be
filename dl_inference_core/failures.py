"""The only place that turns an exception into the status that a client gets."""

from __future__ import annotations

import logging
import uuid

from dl_inference_core.errors import HandlerFailed, InferenceError
from dl_inference_core.transport import Exchange

_log = logging.getLogger(__name__)


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


def _identified(exchange: Exchange, error: BaseException) -> HandlerFailed:
    given = next((value for key, value in exchange.metadata if key == "x-request-id"), None)
    request_id = given if isinstance(given, str) and given else uuid.uuid4().hex
    _log.error("request %s failed", request_id, exc_info=error)
    what = str(error) if isinstance(error, InferenceError) else f"unexpected {type(error).__name__}"
    failed = HandlerFailed(f"{what} (request id {request_id})")
    failed.trailers = error.trailers if isinstance(error, InferenceError) else ()
    return failed
