"""Listening sockets of the addresses that a server has."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

from dl_inference_core import sockets
from dl_inference_core.errors import ConfigError

_BACKLOG = 1024
"""Connections that wait to be accepted; Linux takes no more than `net.core.somaxconn`, 4,096 by default."""


class Listening:
    """Sockets that listen on `addresses`, until `detach` hands them over.

    Attributes:
        ports: of those that have one, in the order of the addresses.
    """

    def __init__(self, addresses: Sequence[str], *, share_port: bool) -> None:
        """Raises:
        ConfigError: an address cannot be listened on; nothing listens then.
        """
        self._sockets: list[socket.socket] = []
        self._paths: list[tuple[Path, tuple[int, int]]] = []
        try:
            for address in addresses:
                path = sockets.path_of(address)
                self._sockets.append(_on_port(address, share_port) if path is None else self._on_path(path))
        except BaseException:
            for each in self._sockets:
                each.close()
            self.remove_paths()
            raise
        self.ports = tuple(each.getsockname()[1] for each in self._sockets if each.family != socket.AF_UNIX)

    def _on_path(self, path: Path) -> socket.socket:
        sockets.claim(path)
        listening = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(str(path))
            listening.listen(_BACKLOG)
            listening.setblocking(False)
            self._paths.append((path, _identity(path)))
        except OSError as error:
            listening.close()
            raise ConfigError(f"cannot listen on {sockets.PREFIX}{path}: {error.strerror or error}") from error
        return listening

    def detach(self) -> list[tuple[int, bool]]:
        """The descriptors, which belong to the caller from now on; and whether each is a Unix-domain socket's."""
        return [(each.detach(), is_unix) for each, is_unix in [(s, s.family == socket.AF_UNIX) for s in self._sockets]]

    def remove_paths(self) -> None:
        """Remove the files of Unix-domain sockets, unless another server has put its own there."""
        for path, identity in self._paths:
            with contextlib.suppress(FileNotFoundError):
                if _identity(path) == identity:
                    path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _on_port(address: str, share_port: bool) -> socket.socket:
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if not colon:
            raise ValueError("expected host:port")
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, int(port)))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except (OSError, ValueError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    return listening
