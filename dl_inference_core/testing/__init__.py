"""For plugin authors: a conformance suite per kind of plugin, and fakes of what a plugin is given.

A suite is a class of pytest tests: subclass it in a test file, as its docstring shows, and the tests run against
your class.
"""

from __future__ import annotations

import pytest

# Before they are imported, so that a failed assertion shows its values.
pytest.register_assert_rewrite(
    *(f"dl_inference_core.testing.{name}" for name in ("plugin", "balancer", "backend", "handler", "transport"))
)

from dl_inference_core.testing.backend import BackendConformance  # noqa: E402
from dl_inference_core.testing.balancer import BalancerConformance  # noqa: E402
from dl_inference_core.testing.fakes import FakeBackend, FakeModel, FakeNode  # noqa: E402
from dl_inference_core.testing.handler import HandlerConformance  # noqa: E402
from dl_inference_core.testing.transport import TransportConformance  # noqa: E402

__all__ = [
    "BackendConformance",
    "BalancerConformance",
    "FakeBackend",
    "FakeModel",
    "FakeNode",
    "HandlerConformance",
    "TransportConformance",
]
