"""What the I/O threads ask of the core for HTTP requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dl_inference_core.errors import InferenceError
from dl_inference_core.http_exchange import Refused, not_gzip, too_large, took_too_long, unknown_encoding
from dl_inference_core.transport import Http
from dl_inference_native.pages import Count, Pages


class NativeHttp:
    """`Http` in the form that `_native` reads: the requests that are exchanges go to the service, others to the
    application. Its functions are called on the I/O threads."""

    def __init__(self, http: Http, scheme: str, refused_pages: Count) -> None:
        """On the event loop that is to run the application.

        Args:
            scheme: "http" or "https".
            refused_pages: counts the requests for pages that find no room.
        """
        service = http.service
        self.paths: Sequence[str] = service.paths
        self.body_bytes = service.body_bytes
        self.timeout_s = service.timeout_s
        # An exchange of Rust is registered as the seam's, which a type checker does not see.
        self.begin: Callable[[Any], None] = service.begin_http
        self.begin_page: Callable[[Any], None] = Pages(http.app, scheme, refused_pages).begin
        self._fail: Callable[[Any, InferenceError], None] = service.fail_http
        self._errors: dict[str, Callable[[str], InferenceError]] = {
            "too_large": lambda _: too_large(self.body_bytes),
            "unknown_encoding": unknown_encoding,
            "not_gzip": lambda _: not_gzip("it is damaged, or does not end where its gzip ends"),
            "no_room": lambda _: Refused("the server holds as many bytes of requests as it may", 503),
            "took_too_long": lambda _: took_too_long(self.timeout_s),
        }

    def fail(self, exchange: Any, refusal: str, detail: str) -> None:
        """Have the service answer that a request has failed."""
        self._fail(exchange, self._errors[refusal](detail))
