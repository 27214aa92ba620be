"""A small CNN on the handwritten digits that ship inside scikit-learn, trained in seconds and exported for serving."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from digits.handler import SIDE, pixels

EPOCHS = 12
TASK_ID = 69


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What the model has not seen.

    Attributes:
        pngs: pictures, each a PNG of 8x8 grey pixels.
        images: the same as the model takes them, float32 [n, 1, 8, 8].
        labels: the digits, int64 [n].
    """

    pngs: list[bytes]
    images: np.ndarray[Any, np.dtype[np.float32]]
    labels: np.ndarray[Any, np.dtype[np.int64]]


class Net(nn.Module):
    """image: float32 [n, 1, 8, 8] → scores: float32 [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (SIDE // 2) ** 2, 10),
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(image)}


def train(epoch_done: Callable[[], None]) -> tuple[Net, HeldOut]:
    """A trained model and what was held out. Calls `epoch_done` `EPOCHS` times; the same every time."""
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    pngs = [_png(digit) for digit in digits]
    images = np.concatenate([pixels(png) for png in pngs])
    learn, held = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    inputs, targets = torch.from_numpy(images[learn]), torch.from_numpy(labels[learn])
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(64):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch])["scores"], targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        epoch_done()
    held_out = HeldOut(pngs=[pngs[index] for index in held], images=images[held], labels=labels[held])
    return net.eval(), held_out


def accuracy(net: Net, held_out: HeldOut) -> float:
    """The share of held-out digits that `net` gets right, one at a time, as they are served."""
    with torch.inference_mode():
        right = [
            bool(net(torch.from_numpy(image[None]))["scores"].argmax() == label)
            for image, label in zip(held_out.images, held_out.labels, strict=True)
        ]
    return sum(right) / len(right)


def export(net: Net, models: Path) -> None:
    """Write `models/digits/1/model.pt2`, for any number of images at once, and `models/digits/model.toml`."""
    folder = models / "digits"
    (folder / "1").mkdir(parents=True)
    many = torch.export.Dim("many", min=1, max=1024)
    program = torch.export.export(net, (torch.zeros(2, 1, SIDE, SIDE),), dynamic_shapes={"image": {0: many}})
    torch.export.save(program, folder / "1" / "model.pt2")
    (folder / "model.toml").write_text(f'task_id = {TASK_ID}\nhandler = "digits"\n', encoding="utf-8")


def _png(digit: np.ndarray[Any, Any]) -> bytes:
    """One of scikit-learn's digits, 64 values from 0 to 16."""
    image = Image.fromarray((digit.reshape(SIDE, SIDE) * (255 / 16)).round().astype(np.uint8))
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()
