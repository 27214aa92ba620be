"""Codecs in Rust for Open Inference, TensorFlow Serving's Predict and Seldon."""

from __future__ import annotations

from dl_inference_core.hookspecs import hookimpl
from dl_inference_core.wire.codecs import Codecs
from dl_inference_native_codecs.codecs import NativeCodecs

__all__ = ["NativeCodecs"]


@hookimpl
def dl_inference_register_codecs() -> list[type[Codecs]]:
    return [NativeCodecs]
