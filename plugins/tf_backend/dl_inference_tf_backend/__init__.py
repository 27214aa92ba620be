"""TensorFlow models for dl-inference-core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.node.backend import Backend


@hookimpl
def dl_inference_register_backends() -> list[type[Backend]]:
    from dl_inference_tf_backend.backend import TensorFlowBackend

    return [TensorFlowBackend]
