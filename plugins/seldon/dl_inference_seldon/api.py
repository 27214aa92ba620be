"""What Seldon's clients call by REST. The core answers their gRPC calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.api import Api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import Route

    from dl_inference_core.dispatcher import Dispatcher
    from dl_inference_core.introspection import Readiness
    from dl_inference_core.rest.answering import Local
    from dl_inference_seldon.rest import SeldonRest


class SeldonApi(Api):
    """Seldon's REST API: predictions, transformations, metadata and health."""

    name = "seldon"

    def rest(self, local: Local, dispatcher: Dispatcher, *, cors: bool) -> SeldonRest:
        from dl_inference_seldon.rest import SeldonRest

        return SeldonRest(local, dispatcher, cors=cors)

    def pages(self, readiness: Readiness) -> Sequence[Route]:
        from dl_inference_seldon.rest import pages

        return pages(readiness)
