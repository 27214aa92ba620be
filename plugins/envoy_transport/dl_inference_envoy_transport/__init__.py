"""The calls of dl-inference on Envoy's network stack: the transport "envoy"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.transport import Transport


@hookimpl
def dl_inference_register_transports() -> list[type[Transport]]:
    from dl_inference_envoy_transport.transport import EnvoyTransport

    return [EnvoyTransport]
