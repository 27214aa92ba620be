"""The distributions: built, and put together as their users would."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import dl_inference_core

ROOT = Path(__file__).parents[1]
PROJECTS = sorted(
    [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("examples/*/pyproject.toml")]
)


def project(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return table


def test_all_distributions_share_the_version_of_the_core() -> None:
    assert {project(path)["version"] for path in PROJECTS} == {dl_inference_core.__version__}


@pytest.mark.parametrize("path", [path for path in PROJECTS if path.parent != ROOT], ids=lambda path: path.parent.name)
def test_a_plugin_needs_the_core_of_its_own_version(path: Path) -> None:
    major, minor, _ = dl_inference_core.__version__.split(".")
    assert f"dl-inference-core~={major}.{minor}.0" in project(path)["dependencies"]


@pytest.mark.packages
@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_a_wheel_holds_the_package_its_types_and_its_entry_points(path: Path, tmp_path: Path) -> None:
    if (path.parent / "Cargo.toml").exists() and not (shutil.which("cargo") and find_spec("maturin")):
        pytest.skip("needs cargo and maturin: make setup")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            path.parent,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "[dl_inference_core]" in archive.read(entry_points).decode()
    top = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert len(top) == 1, "one wheel, one package"
    (package,) = top
    assert f"{package}/py.typed" in names
    if package == "dl_inference_core":
        assert "dl_inference_core/wire/messages.binpb" in names
    assert not any("/tests/" in name or name.endswith(".pth") for name in names)
