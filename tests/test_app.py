"""What one process is built of."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl_inference_core import app
from dl_inference_core.app import App
from dl_inference_core.config import Config, ModelsConfig
from dl_inference_core.plugins import Plugins


@pytest.mark.parametrize(("workers", "share"), [(1, 0), (2, 3), (4, 1), (9, 1)])
def test_workers_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, share: int) -> None:
    monkeypatch.setattr(app, "cores", lambda: 6)
    served = App(Config(models=ModelsConfig(directory=tmp_path), workers=workers), Plugins())
    assert served.repository is not None
    backends = served.repository._loader.backends
    assert backends
    assert {backend.cores for backend in backends.values()} == {share}
