"""What the business model does before and after the model call."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest
from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Form, Payload, Request

SIDE = 8


class Digits(Handler):
    """A PNG, or tensors as the model takes them, in; `digit` (int64 [n]) and `confidence` (float32 [n]) out."""

    name = "digits"
    shares_calls = True

    class Options(PluginOptions):
        """Attributes:
        invert: whether pictures show dark digits on light paper; the model has learned light on dark.
        """

        invert: bool = False

    options: Options

    def preprocess(self, request: Request) -> Any:
        if request.form is not Form.BYTES:
            return super().preprocess(request)
        assert isinstance(request.payload, bytes)
        return {"image": pixels(request.payload, invert=self.options.invert)}

    def postprocess(self, outputs: Any, request: Request) -> Payload:
        scores = outputs["scores"]
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return {"digit": scores.argmax(axis=1), "confidence": odds.max(axis=1) / odds.sum(axis=1)}


def pixels(png: bytes, *, invert: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A picture of any size and colour as the model takes it: float32 [1, 1, 8, 8] from 0 (dark) to 1 (light).

    Raises:
        BadRequest: the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(png)) as image:
            grey = image.convert("L")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"expected the bytes of a PNG: {error}") from error
    if grey.size != (SIDE, SIDE):
        grey = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    light = np.asarray(grey, dtype=np.float32)[None, None] / np.float32(255)
    return np.float32(1) - light if invert else light
