"""Weights of models that are unloaded, or could not be loaded, go back to the system."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from dl_inference_torch_backend.backend import TorchBackend

from dl_inference_core.node.handling import Handler
from dl_inference_core.node.repository import Repository

pytestmark = pytest.mark.usefixtures("no_collector")

WIDTH, ROWS = 1024, 16 * 1024
SIZE_MB = WIDTH * ROWS * 4 / 2**20
NET = f"""
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear({WIDTH}, {ROWS}, bias=False)
        self.part.__dict__["owner"] = self

    def forward(self, x):
        return self.part(x)

def create_model():
    return Net()
"""


def used_mb() -> float:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


async def until_below(most_mb: float) -> None:
    """The threads of a version that is gone may still have to end."""
    for _ in range(100):
        if used_mb() < most_mb:
            return
        await asyncio.sleep(0.1)
    assert used_mb() < most_mb


def circular(folder: Path, **weights: torch.Tensor) -> None:
    """A module with a part that refers to it."""
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(NET)
    torch.save(weights, folder / "weights.pt")


def exported(folder: Path) -> None:
    folder.mkdir(parents=True)
    program = torch.export.export(
        torch.nn.Linear(WIDTH, ROWS, bias=False).eval(),
        (torch.zeros(2, WIDTH),),
        dynamic_shapes=({0: torch.export.Dim("rows")},),
    )
    torch.export.save(program, folder / "model.pt2")


@pytest.fixture(params=["circular", "exported"])
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A version of 64 MB."""
    folder = tmp_path / "store" / "1"
    if request.param == "circular":
        circular(folder, **{"part.weight": torch.zeros(ROWS, WIDTH)})
    else:
        exported(folder)
    gc.collect()
    return folder


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Repository]:
    backend = TorchBackend(TorchBackend.Options())
    served = Repository(directory, backends={"torch": backend}, handlers={"default": Handler}, poll_interval_s=3600)
    try:
        await served.start()
        yield served
    finally:
        await served.close()


async def look_twice(served: Repository) -> None:
    await served.look()
    await served.look()
    await served.settle()


def test_versions_that_are_replaced_or_removed_give_their_memory_back(tmp_path: Path, version: Path) -> None:
    models = tmp_path / "models"
    (models / "m").mkdir(parents=True)
    (models / "m" / "model.toml").write_text("keep_versions = 1\n")

    async def main() -> None:
        async with serving(models) as served:
            shutil.copytree(version, models / "m" / "1")
            await look_twice(served)
            one = used_mb()
            for number in range(2, 6):
                shutil.copytree(version, models / "m" / str(number))
                await look_twice(served)
                assert set(served.models["m"].loaded) == {number}
            await until_below(one + 1.5 * SIZE_MB)
            gc.collect()  # what the loads have left, apart from weights
            gc.freeze()
            last = used_mb()
            shutil.rmtree(models / "m")
            await look_twice(served)
            await until_below(last - 0.5 * SIZE_MB)

    asyncio.run(main())


def test_versions_that_fail_to_load_give_their_memory_back(tmp_path: Path) -> None:
    used: list[float] = []

    async def main() -> None:
        async with serving(tmp_path) as served:
            for number in range(5):
                weights = {"part.weight": torch.ones(ROWS, WIDTH), "part.bias": torch.ones(ROWS)}
                circular(tmp_path / "m" / str(number), **weights)
                del weights
                await look_twice(served)
                assert "part.bias" in served.models["m"].versions[number].error
                used.append(used_mb())

    asyncio.run(main())
    assert used[-1] < used[0] + 1.5 * SIZE_MB
