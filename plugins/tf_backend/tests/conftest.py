"""SavedModels for the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dl_inference_tf_backend.testing import SavedModelMaker

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="session")
def make_saved() -> SavedModelMaker:
    return SavedModelMaker()


@pytest.fixture(scope="session")
def saved(make_saved: SavedModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a SavedModel by the name of the maker's method; made once."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str) -> Path:
        path = root / kind / "1"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            getattr(make_saved, kind)(path)
        return path

    return folder
