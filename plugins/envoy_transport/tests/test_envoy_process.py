"""The process that Envoy hosts, as the supervisor and an operator see it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def wait_for(look: Callable[[], object], within_s: float = 15.0) -> None:
    end = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Served:
    """`dl-inference-core serve` as a supervisor with one process of Envoy's; temporary files go to a folder of ours."""

    def __init__(self, folder: Path, *arguments: str, transport: str = "envoy") -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.log = folder / "log"
        self.config = folder / "server.toml"
        self.config.write_text(f'port = 0\ntransport = "{transport}"\n[[routes]]\nname = "m"\nnodes = ["{dead()}"]\n')
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(self.config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    @property
    def envoy(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def text(self) -> str:
        return self.log.read_text()

    def folders(self) -> list[Path]:
        """The supervisor's, and Envoy's."""
        return sorted(self.temporary.glob("dl-inference-*"), key=lambda folder: (folder / "admin.sock").exists())

    def running(self) -> None:
        """Waits until Envoy listens: the route has no living node, so that it does not say that it serves."""
        wait_for(lambda: "not serving yet" in self.text())

    def end(self) -> None:
        pids = [self.process.pid, *children(self.process.pid)]
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        wait_for(lambda: not any(map(alive, pids)))


def dead() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.end()


def test_its_files_are_private_and_go_with_it(served: Served) -> None:
    served.running()
    other, folder = served.folders()
    assert other.stat().st_mode & 0o077 == 0
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("admin.sock", "control.sock"):
        assert (folder / name).is_socket()
        assert (folder / name).stat().st_mode & 0o077 == 0
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(15) == 0
    assert served.folders() == []


def test_it_ends_by_itself_and_leaves_nothing_if_the_supervisor_is_killed(served: Served) -> None:
    served.running()
    envoy = served.envoy
    served.process.kill()
    served.process.wait(10)
    wait_for(lambda: not alive(envoy))
    assert served.folders() == []


def test_what_it_left_when_all_were_killed_goes_at_the_next_start(served: Served) -> None:
    served.running()
    folders = served.folders()
    for pid in (served.process.pid, served.envoy):
        os.kill(pid, signal.SIGKILL)
    served.process.wait(10)
    assert served.folders() == folders
    (served.temporary / "dl-inference-other").mkdir()
    for folder in (*folders, served.temporary / "dl-inference-other"):
        os.utime(folder, (0, 0))
    again = Served(served.temporary.parent)
    try:
        again.running()
        assert [folder.name for folder in again.folders() if folder.stat().st_mtime < 60] == ["dl-inference-other"]
        assert len(again.folders()) == 3
    finally:
        again.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_process_that_crashes_before_it_serves_ends_it(served: Served, number: signal.Signals) -> None:
    served.running()
    os.kill(served.envoy, number)
    assert served.process.wait(15) != 0
    assert served.folders() == []


def test_what_a_terminal_sends_reaches_the_supervisor_alone(served: Served) -> None:
    served.running()
    assert os.getpgid(served.envoy) != os.getpgid(served.process.pid)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(15) == 0


def test_a_process_of_envoys_starts_others_with_the_environment_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import json, os, subprocess, sys\n"
        "async def ask(arguments):\n"
        "    code = 'import json, os, sys; print(json.dumps([sys.prefix, dict(os.environ)]))'\n"
        "    print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n"
        "    print(json.dumps([sys.prefix, arguments]), flush=True)\n"
        "    return 7\n"
    )
    given = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import os, subprocess, sys\n"
        "from dl_inference_envoy_transport.transport import EnvoyTransport\n"
        "with EnvoyTransport(EnvoyTransport.Options()).program(['a b'], entry='asks:ask') as program:\n"
        "    environment = {**os.environ, **program.environment}\n"
        "    sys.exit(subprocess.run(program.command, env=environment).returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 7, done.stderr
    child, here = (json.loads(line) for line in done.stdout.splitlines() if line)
    assert child[0] == here[0] == sys.prefix
    assert here[1] == ["a b"]
    names = {"PYTHONHOME", "PYTHONPATH", "LD_PRELOAD"}
    assert {name: child[1].get(name) for name in names} == {name: given.get(name) for name in names}


def test_an_option_that_is_unknown_or_out_of_bounds_is_told_so(tmp_path: Path) -> None:
    for option in ("streams = 3", "header_kb = 0", "stream_window_bytes = 100"):
        file = tmp_path / "server.toml"
        file.write_text(
            f'transport = "envoy"\ntransport_options = {{{option}}}\n[[routes]]\nname = "m"\nnodes = ["{dead()}"]\n'
        )
        done = subprocess.run(
            [sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(file)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert option.split()[0] in line


def test_two_servers_never_share_a_port_unless_they_are_workers_of_one(tmp_path: Path, served: Served) -> None:
    served.running()
    port = next(
        int(line.split()[1].rpartition(":")[2], 16)
        for line in Path(f"/proc/{served.envoy}/net/tcp").read_text().splitlines()[1:]
        if line.split()[9] in inodes(served.envoy) and line.split()[3] == "0A"
    )
    (tmp_path / "other").mkdir()
    other = Served(tmp_path / "other", "--port", str(port))
    try:
        assert other.process.wait(15) == 2
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in other.text()
    finally:
        other.end()


def inodes(pid: int) -> set[str]:
    """Of the sockets of a process."""
    links = (str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    return {link[8:-1] for link in links if link.startswith("socket:[")}
