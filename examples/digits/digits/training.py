"""A small CNN in torch, trained on the digits in seconds and exported for serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from digits.data import Data, HeldOut, Integers
from digits.handler import SIDE

EPOCHS = 12
TASK_ID = 69


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


def train(data: Data, epoch_done: Callable[[], None]) -> Net:
    """A trained model. Calls `epoch_done` `EPOCHS` times; the same every time. From now on torch has one thread."""
    # Two take twice as long for a network as small as this, and twenty times as long where others want the cores.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, targets = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(64):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[batch])["scores"], targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        epoch_done()
    return net.eval()


def answers(net: Net, held_out: HeldOut) -> Integers:
    """What `net` takes each held-out digit for, int64 [n]; asked one at a time, as they are served."""
    with torch.inference_mode():
        return np.array([int(net(torch.from_numpy(image[None]))["scores"].argmax()) for image in held_out.images])


def export(net: Net, models: Path) -> None:
    """Write `models/digits/1/model.pt2`, for any number of images at once, and `models/digits/model.toml`."""
    folder = models / "digits"
    (folder / "1").mkdir(parents=True)
    many = torch.export.Dim("many", min=1, max=1024)
    program = torch.export.export(net, (torch.zeros(2, 1, SIDE, SIDE),), dynamic_shapes={"image": {0: many}})
    torch.export.save(program, folder / "1" / "model.pt2")
    (folder / "model.toml").write_text(f'task_id = {TASK_ID}\nhandler = "digits"\n', encoding="utf-8")
