"""C1 and C2: what may happen to a node file, to a gateway under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Any  # tests/conftest.py

CONFIG = '[gateway]\nnodefile = "nodefile.txt"\npoll_interval_ms = 10\n'


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dl_inference_core.gateway.reloading"]


@contextlib.asynccontextmanager
async def load(gateway: Any, *tasks: str) -> AsyncIterator[None]:
    """Requests for `tasks` meanwhile, none of which may fail."""
    stopping = False
    sent = 0

    async def send(task: str) -> None:
        nonlocal sent
        while not stopping:
            await gateway.call(task)
            sent += 1

    senders = [asyncio.ensure_future(send(task)) for task in tasks]
    try:
        yield
    finally:
        stopping = True
        await asyncio.gather(*senders)
    assert sent >= len(tasks)


GARBAGE = {
    "NUL bytes": (b"\0\0\0\n", "line 2: "),
    "UTF-16": ("2=9000,h:1\n".encode("utf-16-le"), "line 2: "),
    "no timeout": (b"2=\n", 'line 2: task 2: "" is no timeout'),
    "no nodes": (b"2=9000\n", "line 2: task 2 has no nodes"),
    "a port over 65535": (b"2=9000,h:70000\n", "line 2: "),
    "a task twice": (b"1=9000,h:1\n2=9000,NODE\n", "line 2: task 1 stands twice"),
    "a node twice": (b"2=9000,h:1,h:1\n", "line 2: task 2: node h:1 stands twice"),
    "10 MB": (b"2=" + b"9" * 10_000_000 + b"\n", "line 2: task 2: "),
    "10 MB of lines": (b"2=x\n" + b"# and more of it\n" * 600_000, "line 2: task 2: "),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_c1_good_lines_apply_and_of_the_bad_one_is_warned_once(lab: Lab, caplog: Any, kind: str) -> None:
    a, b = await lab.nodes("ab")
    path = lab.folder / "nodefile.txt"
    path.write_text(f"1=9000,{a.address}\r\n2=9000,{a.address}\r\n")
    gateway = await lab.gateway(CONFIG)
    garbage, said = GARBAGE[kind]
    content = f"1=9000,{b.address}\r\n".encode() + garbage.replace(b"NODE", a.address.encode())
    async with load(gateway, "1", "2"):
        path.write_bytes(content + f"3=9000,{b.address}\r\n".encode())
        await lab.until(lambda: gateway.forwarder(1).pool.nodes[0].address == b.address)
    assert [await gateway.call("1"), await gateway.call("2")] == ["b", "a"]
    (warning,) = warnings(caplog)
    assert f"{path}: {said}" in warning
    assert len(warning) < 1000


# Each in one step, or a look may fall between two and there is something else to warn of.


def a_folder(path: Path) -> None:
    folder, link = path.with_name("folder"), path.with_name("to the folder")
    folder.mkdir()
    link.symlink_to(folder)
    link.replace(path)


def a_pipe(path: Path) -> None:
    pipe = path.with_name("pipe")
    os.mkfifo(pipe)
    pipe.replace(path)


def unreadable(path: Path) -> None:
    """For root as well, who may read whatever has a mode."""
    link = path.with_name("unreadable")
    link.symlink_to("/proc/self/mem" if Path("/proc/self/mem").exists() else path.parent / "none")
    link.replace(path)


@pytest.mark.parametrize("break_it", [Path.unlink, a_folder, a_pipe, unreadable])
async def test_c2_what_cannot_be_read_changes_nothing_and_reloading_works_after_it(
    lab: Lab, caplog: Any, break_it: Callable[[Path], None]
) -> None:
    a, b = await lab.nodes("ab")
    path = lab.folder / "nodefile.txt"
    path.write_text(f"1=9000,{a.address}\n")
    gateway = await lab.gateway(CONFIG)
    async with load(gateway, "1", "1"):
        break_it(path)
        await lab.until(lambda: warnings(caplog))
        assert await gateway.call("1") == "a"
        real, link = path.with_name("real"), path.with_name("link")
        real.write_text(f"1=9000,{b.address}\n")
        link.symlink_to(real)
        link.replace(path)
        await lab.until(lambda: gateway.forwarder(1).pool.nodes[0].address == b.address)
    assert await gateway.call("1") == "b"
    assert len(warnings(caplog)) == 1
