"""The handwritten digits that ship inside scikit-learn: as pictures, and as models take them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from digits.handler import SIDE, pixels

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What no model has seen.

    Attributes:
        pngs: pictures, each a PNG of 8x8 grey pixels.
        images: the same as models take them, float32 [n, 1, 8, 8].
        labels: the digits, int64 [n].
    """

    pngs: list[bytes]
    images: Floats
    labels: Integers

    def accuracy(self, answers: Integers) -> float:
        """The share of `answers`, int64 [n], that are right."""
        return float((answers == self.labels).mean())


@dataclass(frozen=True, kw_only=True)
class Data:
    """All of them.

    Attributes:
        images: what models learn from, float32 [n, 1, 8, 8].
        labels: the digits, int64 [n].
    """

    images: Floats
    labels: Integers
    held_out: HeldOut


def load() -> Data:
    """The same every time; three in ten are held out."""
    digits, labels = load_digits(return_X_y=True)
    pngs = [_png(digit) for digit in digits]
    images = np.concatenate([pixels(png) for png in pngs])
    learn, held = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    held_out = HeldOut(pngs=[pngs[index] for index in held], images=images[held], labels=labels[held])
    return Data(images=images[learn], labels=labels[learn], held_out=held_out)


def _png(digit: np.ndarray[Any, Any]) -> bytes:
    """One of scikit-learn's digits, 64 values from 0 to 16."""
    image = Image.fromarray((digit.reshape(SIDE, SIDE) * (255 / 16)).round().astype(np.uint8))
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()
