"""HTTP/2 and gRPC in Rust, on I/O threads of its own."""

from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.transport import Transport
from dl_inference_native.transport import NativeTransport

__all__ = ["NativeTransport"]


@hookimpl
def dl_inference_register_transports() -> list[type[Transport]]:
    return [NativeTransport]
