"""Unix-domain sockets, from the config to clients and to nodes."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dl_inference_core import config as configs
from dl_inference_core import sockets

Lab = Any  # tests/conftest.py


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path."""
    with tempfile.TemporaryDirectory(prefix="dl-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("unix:/run/x", Path("/run/x")),
        ("unix:///run/x", Path("/run/x")),
        ("unix:x/y", Path.cwd() / "x/y"),
        ("127.0.0.1:8500", None),
        ("unix-1:8500", None),
    ],
)
def test_an_address_of_a_socket_is_told_from_others(address: str, path: Path | None) -> None:
    assert sockets.path_of(address) == path


def test_the_path_is_taken_from_the_folder_of_the_config() -> None:
    assert configs.parse(b'socket_path = "run/x"', Path("/etc/dl/server.toml")).socket_path == Path("/etc/dl/run/x")


async def test_a_gateway_is_called_by_its_socket_and_calls_a_node_by_its(lab: Lab, folder: Path) -> None:
    node = await lab.node("a")
    near = await lab.gateway(lab.route(node), socket_path=folder / "near")
    far = await lab.front(f"unix:{folder / 'near'}", top=f'socket_path = "{folder / "far"}"\n')
    assert await far.call() == "a"
    assert (folder / "far").is_socket()
    await near.app.close()
    assert not (folder / "near").exists()
    code, said = await far.refusal()
    assert code.name == "UNAVAILABLE"
    assert re.search(rf"node unix:{folder / 'near'}", said)


# Private folders


def test_a_private_folder_goes_at_the_end_and_takes_along_what_was_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    left, young, listened, empty = (folder / f"dl-inference-{name}" for name in ("left", "young", "listened", "empty"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as living:
        for path in (left, young, listened, empty):
            path.mkdir()
            (path / "file").touch()
            if path is not empty:
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(str(path / "dead"))
            if path is listened:
                living.bind(str(path / "living"))
            if path is not young:
                os.utime(path, (0, 0))
        with sockets.private_folder() as private:
            assert private.stat().st_mode & 0o077 == 0
            assert set(folder.iterdir()) == {private, young, listened, empty}
    assert set(folder.iterdir()) == {young, listened, empty}


def test_a_private_folder_has_a_short_name_where_temporary_files_have_long_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with sockets.private_folder() as private:
        assert len(bytes(private)) <= 90
        assert list(long.iterdir()) == []
    assert not private.exists()
