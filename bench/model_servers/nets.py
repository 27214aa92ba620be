"""The networks, with random weights. `python -m bench.model_servers.nets NAME FOLDER` writes `FOLDER/NAME/1/model.pt`,
TorchScript that is frozen, the same file for every server, and prints what it makes of requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from digits.training import Net as Digits
from torch import nn

from bench import bodies
from bench.model_servers.models import MODELS, OUTPUT

EXPERTS, EXPERT_WIDTHS, TOWER_WIDTH, TASKS, FEATURES = 8, (64, 32), 16, 2, 62
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Of ResNet-50: the width of a block, how many there are, the stride of the first (He et al. 2015, table 1)."""
WIDER = 4


class Mmoe(nn.Module):
    """Experts that tasks share through a gate each, and a tower for each task (Ma et al. 2018).

    features: float32 [n, 62] → scores: float32 [n, 2], the odds of a click and of what follows.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second = EXPERT_WIDTHS
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
            for _ in range(EXPERTS)
        )
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, EXPERTS), nn.Softmax(dim=1)) for _ in range(TASKS))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(second, TOWER_WIDTH), nn.ReLU(), nn.Linear(TOWER_WIDTH, 1), nn.Sigmoid())
            for _ in range(TASKS)
        )

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        experts = torch.stack([expert(features) for expert in self.experts], dim=1)
        tasks = [
            tower((gate(features).unsqueeze(2) * experts).sum(dim=1))
            for gate, tower in zip(self.gates, self.towers)  # noqa: B905 - TorchScript knows no `strict`
        ]
        return {"scores": torch.cat(tasks, dim=1)}


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a short cut; the 3x3 has the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = width * WIDER
        self.layers = nn.Sequential(
            *_convolution(channels, width, 1),
            nn.ReLU(),
            *_convolution(width, width, 3, stride),
            nn.ReLU(),
            *_convolution(width, wide, 1),
        )
        same = channels == wide and stride == 1
        self.short_cut = nn.Identity() if same else nn.Sequential(*_convolution(channels, wide, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(x) + self.short_cut(x))


class ResNet50(nn.Module):
    """image: float32 [n, 3, 224, 224] → scores: float32 [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        channels, blocks = 64, list[nn.Module]()
        for width, count, stride in STAGES:
            for number in range(count):
                blocks.append(_Bottleneck(channels, width, stride if number == 0 else 1))
                channels = width * WIDER
        self.layers = nn.Sequential(
            *_convolution(3, 64, 7, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 1000),
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(image)}


def _convolution(channels: int, width: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(width)


NETS: dict[str, Callable[[], nn.Module]] = {"mmoe": Mmoe, "digits": Digits, "resnet50": ResNet50}


def write(name: str, folder: Path) -> list[list[float]]:
    """The same every time.

    Returns:
        its scores of the first requests of one row, as many as `Model.batch`.
    """
    torch.manual_seed(0)
    # Convolutions on a CPU are faster so, whatever the layout of their input.
    net = NETS[name]().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scripted = torch.jit.freeze(torch.jit.script(net))
    version = folder / name / "1"
    version.mkdir(parents=True)
    scripted.save(str(version / "model.pt"))
    with torch.inference_mode():
        model = MODELS[name]
        rows = np.concatenate(bodies.rows(model.shape)[: model.batch])
        scores: list[list[float]] = scripted(torch.from_numpy(rows))[OUTPUT].tolist()
    return scores


if __name__ == "__main__":
    print(json.dumps(write(sys.argv[1], Path(sys.argv[2]))))
