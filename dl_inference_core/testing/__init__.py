"""For plugin authors: a conformance suite per kind of plugin, and fakes of what a plugin is given.

A suite is a class of pytest tests: subclass it in a test file, and the tests run against your class. Its docstring and
attributes say what else it can be told.

A balancing strategy::

    class TestAnyOne(BalancerConformance):
        balancer_class = AnyOne
        weighs = True

A backend, with a model whose answers are known::

    class TestTorch(BackendConformance):
        backend_class = TorchBackend
        inputs = {"x": np.ones((2, 3), np.float32)}
        outputs = {"y": np.full((2, 3), 2, np.float32)}

        @pytest.fixture
        def directory(self, tmp_path):
            return write_a_model_that_doubles(tmp_path / "model")

A handler, with requests and what answers them; the model is a `FakeModel` unless the fixture `model` gives another::

    class TestSentiment(HandlerConformance):
        handler_class = Sentiment
        samples = [(Request(payload="good", form=Form.TEXT), {"score": np.array([0.9], np.float32)})]
        rejected = [Request(payload=b"\\x00", form=Form.BYTES)]

An API::

    class TestLoud(ApiConformance):
        api_class = Loud

A transport (its tests need the package trustme)::

    class TestGrpcioTransport(TransportConformance):
        transport_class = GrpcioTransport
"""

from __future__ import annotations

import pytest

# Before they are imported, so that a failed assertion shows its values.
pytest.register_assert_rewrite(
    *(f"dl_inference_core.testing.{name}" for name in ("plugin", "fakes", "balancer", "backend", "handler", "api")),
    *(
        f"dl_inference_core.testing.{name}"
        for name in (
            *("loopback", "transport_exchanges", "transport_servers", "transport_tls", "transport_http"),
            "transport",
        )
    ),
)

from dl_inference_core.testing.api import ApiConformance  # noqa: E402
from dl_inference_core.testing.backend import BackendConformance  # noqa: E402
from dl_inference_core.testing.balancer import BalancerConformance  # noqa: E402
from dl_inference_core.testing.fakes import EXCHANGE, FakeBackend, FakeModel, FakeNode  # noqa: E402
from dl_inference_core.testing.handler import HandlerConformance  # noqa: E402
from dl_inference_core.testing.transport import TransportConformance  # noqa: E402

__all__ = [
    "EXCHANGE",
    "ApiConformance",
    "BackendConformance",
    "BalancerConformance",
    "FakeBackend",
    "FakeModel",
    "FakeNode",
    "HandlerConformance",
    "TransportConformance",
]
