"""The methods that infer or transform, by path: the core's and those of the APIs of this repository."""

from __future__ import annotations

from collections.abc import Mapping

from dl_inference_tfserving.api import TfServingApi

from dl_inference_core.wire import protocol
from dl_inference_core.wire.protocol import Protocol

METHODS: Mapping[str, Protocol] = {**protocol.METHODS, **TfServingApi.protocols}
