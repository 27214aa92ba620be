from __future__ import annotations

from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.testing import TransportConformance


class TestGrpcioTransport(TransportConformance):
    transport_class = GrpcioTransport
