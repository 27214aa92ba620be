"""The example's handler, by the suite that every handler must pass and by pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from digits.handler import Digits, pixels
from PIL import Image

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request
from dl_inference_core.testing import FakeModel, HandlerConformance


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def test_pixels_are_light_from_0_to_1() -> None:
    image = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    given = pixels(png(image))
    assert given.shape == (1, 1, 8, 8)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given[0, 0].ravel(), np.arange(0, 256, 4) / 255, rtol=1e-6)
    np.testing.assert_allclose(pixels(png(image), invert=True), 1 - given, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_size_and_mode_is_a_picture(mode: str) -> None:
    given = pixels(png(Image.new("L", (24, 32), 255).convert(mode)))
    np.testing.assert_array_equal(given, np.ones((1, 1, 8, 8)))


@pytest.mark.parametrize("content", [b"", b"no picture", png(Image.new("L", (8, 8)))[:40]])
def test_what_is_no_picture_is_the_clients_fault(content: bytes) -> None:
    with pytest.raises(BadRequest, match="expected the bytes of a PNG"):
        Digits(Digits.Options()).preprocess(Request(payload=content, form=Form.BYTES))


def test_scores_become_a_digit_and_a_confidence() -> None:
    scores = np.log(np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32))
    answer: Any = Digits(Digits.Options()).postprocess({"scores": scores}, Request(payload=b"", form=Form.BYTES))
    np.testing.assert_array_equal(answer["digit"], [1, 0])
    np.testing.assert_allclose(answer["confidence"], [0.7, 0.5], rtol=1e-5)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(ValueError, match="inverted"):
        Digits.Options.model_validate({"inverted": True})


class Scores(FakeModel):
    """A model that is sure of a 3, whatever it sees."""

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Any]:
        return {"scores": np.tile(np.where(np.arange(10) == 3, 0.0, -np.inf), (len(inputs["image"]), 1))}


class TestDigits(HandlerConformance):
    handler_class = Digits
    samples = (
        (
            Request(payload=png(Image.new("L", (8, 8))), form=Form.BYTES),
            {"digit": np.array([3]), "confidence": np.array([1.0])},
        ),
        (
            Request(payload={"image": np.zeros((2, 1, 8, 8), np.float32)}, form=Form.TENSORS),
            {"digit": np.array([3, 3]), "confidence": np.array([1.0, 1.0])},
        ),
    )
    rejected = (
        Request(payload=b"no picture", form=Form.BYTES),
        Request(payload="text", form=Form.TEXT),
        Request(payload={"picture": np.zeros((1, 1, 8, 8), np.float32)}, form=Form.TENSORS),
    )

    @pytest.fixture
    def model(self) -> FakeModel:
        image = TensorSpec(name="image", dtype=np.dtype(np.float32), shape=(None, 1, 8, 8))
        return Scores(signature=Signature(inputs=(image,)))
