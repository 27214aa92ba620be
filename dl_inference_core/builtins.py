"""What the core itself brings, through the same door as any plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.gateway.balancing import Balancer
    from dl_inference_core.node.handling import Handler
    from dl_inference_core.transport import Transport
    from dl_inference_core.wire.codecs import Codecs


@hookimpl
def dl_inference_register_handlers() -> list[type[Handler]]:
    from dl_inference_core.node.handling import Handler
    from dl_inference_core.node.processor import Processor

    return [Handler, Processor]


@hookimpl
def dl_inference_register_balancers() -> list[type[Balancer]]:
    from dl_inference_core.gateway.balancing import RoundRobin

    return [RoundRobin]


@hookimpl
def dl_inference_register_transports() -> list[type[Transport]]:
    from dl_inference_core.grpcio_transport import GrpcioTransport

    return [GrpcioTransport]


@hookimpl
def dl_inference_register_codecs() -> list[type[Codecs]]:
    from dl_inference_core.wire.codecs import CoreCodecs

    return [CoreCodecs]
