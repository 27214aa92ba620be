"""Unix-domain sockets: as addresses, written "unix:/path", and private folders for those between our processes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dl_inference_core.errors import ConfigError

PREFIX = "unix:"
# What the kernel's `sun_path` holds, without the byte that ends it.
_LONGEST = 107
_FOLDER = "dl-inference-"
_LONGEST_FOLDER = 90
# Younger ones may belong to a server that has bound its sockets, and is about to listen.
_LEFT_AFTER_S = 60.0


def path_of(address: str) -> Path | None:
    """The absolute path that "unix:path" or "unix:///path" names; None for an address of another kind."""
    if not address.startswith(PREFIX):
        return None
    return Path(address.removeprefix(PREFIX).removeprefix("//")).absolute()


def claim(path: Path) -> None:
    """See that a server can listen at `path`: a socket that a server left there when it was killed is removed.

    Raises:
        ConfigError: a server listens there; something else lies there; it is not a path that a socket can have.
    """
    where = f"cannot listen on {PREFIX}{path}"
    if len(bytes(path)) > _LONGEST:
        raise ConfigError(f"{where}: the path has over {_LONGEST} bytes, more than a socket's can have")
    if not path.parent.is_dir():
        raise ConfigError(f"{where}: there is no folder {path.parent}")
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{where}: what lies there is no socket; it is left alone")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            found = probe.connect_ex(str(path))
        if found != errno.ECONNREFUSED:
            raise ConfigError(f"{where}: another server listens there")
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder for sockets with short names, which only this user can enter; removed at the end, and with it those
    that killed processes of this user left: where there are sockets, but nobody has listened to any for a minute."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    if len(bytes(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir="/tmp"))
    for other in folder.parent.glob(f"{_FOLDER}*"):
        remove_left(other, _LEFT_AFTER_S)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(folder: Path, after_s: float = 0.0) -> None:
    """Remove a private folder of this user's that nobody listens in any more, and that has not changed for `after_s`
    seconds."""
    with contextlib.suppress(OSError):  # it is being removed
        status = folder.lstat()
        ours = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode)
        if not ours or time.time() - status.st_mtime < after_s:
            return
        found = [path for path in folder.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]
        if found and all(_refuses(path) for path in found):
            shutil.rmtree(folder, ignore_errors=True)


def _refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
