"""Certificates for the I/O threads, kept up with their files by a task of the event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from dl_inference_core.certificates import Credentials, Watched
from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import ConfigError
from dl_inference_native import _native

_log = logging.getLogger(__name__)


class Followed:
    """What one side of TLS shows, and whom it trusts, as its files have it while anybody uses it.

    Attributes:
        native: the same for the I/O threads.
    """

    def __init__(self, tls: ServerTls | ClientTls) -> None:
        """Raises:
        ConfigError: a file cannot be used; it names the file.
        """
        self._watched = Watched(tls)
        self._known = self._watched.current()
        make: Any = _native.ServerTls if isinstance(tls, ServerTls) else _native.ClientTls
        try:
            self.native: Any = make(*_arguments(self._known))
        except ValueError as error:
            raise ConfigError(f"{_name(tls)}: it cannot be used for TLS: {error}") from error
        self._users = 0
        self._following: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Somebody uses it: a server or a connection. Event loop only."""
        self._update(self._watched.current())
        self._users += 1
        if self._following is None:
            self._following = asyncio.create_task(self._follow(), name="watch the certificates")

    def end(self) -> None:
        """One who used it does not any more."""
        self._users -= 1
        if not self._users and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self) -> None:
        async for credentials in self._watched.changes():
            self._update(credentials)

    def _update(self, credentials: Credentials) -> None:
        if credentials is self._known:
            return
        self._known = credentials
        try:
            self.native.replace(*_arguments(credentials))
        except ValueError as error:
            _log.warning("certificates that have changed cannot be used for TLS: %s; the old ones stay in use", error)


def _arguments(credentials: Credentials) -> tuple[bytes | None, bytes | None, bytes | None]:
    return credentials.certificate, credentials.key, credentials.authorities


def _name(tls: ServerTls | ClientTls) -> str:
    """The file that is wrong, as far as that is known: the core has checked that each is a certificate or a key."""
    if tls.certificate is not None:
        return str(tls.certificate)
    return str(tls.ca or "the system's authorities") if isinstance(tls, ClientTls) else "tls"
