"""Unix-domain sockets as addresses, written "unix:/path"."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path

from dl_inference_core.errors import ConfigError

PREFIX = "unix:"
# What the kernel's `sun_path` holds, without the byte that ends it.
_LONGEST = 107


def path_of(address: str) -> Path | None:
    """The absolute path that "unix:path" or "unix:///path" names; None for an address of another kind."""
    if not address.startswith(PREFIX):
        return None
    return Path(address.removeprefix(PREFIX).removeprefix("//")).absolute()


def claim(path: Path) -> None:
    """See that a server can listen at `path`: a socket that a server left there when it was killed is removed.

    Raises:
        ConfigError: a server listens there; something else lies there; it is no path that a socket can have.
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
