"""HTTP, gRPC and codecs in Rust; HTTP and gRPC on I/O threads of their own."""

from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.transport import Transport
from dl_inference_core.wire.codecs import Codecs
from dl_inference_native.codecs import NativeCodecs
from dl_inference_native.transport import NativeTransport

__all__ = ["NativeCodecs", "NativeTransport"]


@hookimpl
def dl_inference_register_transports() -> list[type[Transport]]:
    return [NativeTransport]


@hookimpl
def dl_inference_register_codecs() -> list[type[Codecs]]:
    return [NativeCodecs]
