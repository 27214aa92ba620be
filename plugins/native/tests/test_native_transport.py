"""The suite for transports, with one I/O thread and with three."""

from __future__ import annotations

from typing import ClassVar

import pytest

from dl_inference_core.testing import TransportConformance

NativeTransport = pytest.importorskip("dl_inference_native", exc_type=ImportError).NativeTransport


class TestOneIoThread(TransportConformance):
    reads_keys = True
    transport_class = NativeTransport
    options: ClassVar = {"threads": 1}


class TestThreeIoThreads(TransportConformance):
    reads_keys = True
    transport_class = NativeTransport
    options: ClassVar = {"threads": 3}
