"""Virtual environments for peers, below bench/out: one for each, as their dependencies do not go together."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "out" / "peers"
_INSTALL_S = 1800
_TORCH = ("torch==2.13.0", "numpy")


class NotInstalled(Exception):
    """A peer cannot be had here; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where a peer lives.

    Attributes:
        package: what pip installs, the peer itself; `requirements` are what it wants beside that, with torch.
        pythons: interpreters, by path or by version, the best first.
    """

    package: str
    release: str
    pythons: tuple[str, ...] = ("3.11",)
    requirements: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.package

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))

    @property
    def wanted(self) -> tuple[str, ...]:
        """As pip takes them."""
        return (f"{self.package}=={self.release}", *_TORCH, *self.requirements)

    def install(self) -> None:
        """Make it, if it is not there yet as it should be. Takes minutes.

        Raises:
            NotInstalled: there is no such interpreter, or a package cannot be had.
        """
        done = self.folder / "installed.txt"
        wanted = "\n".join(self.wanted)
        if done.is_file() and done.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        _run(next(self._interpreters(), None), "-m", "venv", str(self.folder))
        _run(self.python, "-m", "pip", "install", "--quiet", *self.wanted)
        done.write_text(wanted)

    def made_of(self) -> str:
        """The Python and the torch that it has."""
        code = "import platform; from importlib.metadata import version as v; "
        code += "print(f'Python {platform.python_version()}, torch {v(\"torch\")}')"
        return _run(self.python, "-c", code).strip()

    def _interpreters(self) -> Iterator[str]:
        for wanted in self.pythons:
            if wanted.startswith("/"):
                found = [Path(wanted)]
            else:
                found = [Path(path) for path in (shutil.which(f"python{wanted}"),) if path]
                found += sorted(Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"))
            # One that a version manager stands in for may not be there.
            yield from (str(path) for path in found if path.is_file() and _works(path))


def _works(python: Path) -> bool:
    return subprocess.run([str(python), "-m", "venv", "--help"], capture_output=True, check=False).returncode == 0


def _run(program: str | None, *arguments: str) -> str:
    if program is None:
        raise NotInstalled("none of its interpreters is here")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_INSTALL_S, check=True)
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:] or [f"status {error.returncode}"]
        raise NotInstalled(last[0]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    return done.stdout


SELDON_CORE = Environment(
    package="seldon-core",
    release="1.17.1",
    # With a later Python its protobuf 3.20 is pure Python.
    pythons=("3.10", "3.11"),
    requirements=("setuptools<80", "numpy<2"),
)
MLSERVER = Environment(package="mlserver", release="1.7.1")
# Its Python backend embeds an interpreter, whose standard library must be no later.
TRITON = Environment(
    package="nvidia-pytriton",
    release="0.7.0",
    pythons=("/usr/bin/python3", "3.11"),
    requirements=("tritonclient[grpc]",),
)
TRITON_RELEASE = "2.51"
"""Triton's own release in that package."""
LITSERVE = Environment(package="litserve", release="0.2.19")
BENTOML = Environment(package="bentoml", release="1.4.40")
