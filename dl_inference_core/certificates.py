"""TLS files → checked credentials, kept up with the files while they are in use. Of every transport alike."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import ConfigError
from dl_inference_core.files import stamp

_log = logging.getLogger(__name__)

_PAUSE_S = 0.5
# A certificate and its key are two files, so for a moment of every rotation they do not fit.
_PATIENCE_S = 2.0

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_TIMES = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # UTCTime, GeneralizedTime
# OpenSSL's reasons for a key that is not the certificate's; the last where they are of different kinds.
_MISFITS = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
# Where distributions keep the authorities, if not where OpenSSL was told at its build.
_SYSTEM = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What one side of TLS holds, in PEM.

    Attributes:
        certificate: its own certificate, then those between it and the root; None if it shows none.
        key: that certificate's private key.
        authorities: of whom the other side's certificate must be; None if it need not show one. Never None of a client.
    """

    certificate: bytes | None
    key: bytes | None = field(repr=False)
    authorities: bytes | None


def read(tls: ServerTls | ClientTls) -> Credentials:
    """The credentials in the files that `tls` names, or the system's authorities where a client's names none.

    Raises:
        ConfigError: one of them cannot be used; one line that names the file and what is wrong with it.
    """
    return _read(*_files(tls))


class Watched:
    """The credentials in the files that a TLS section names. Safe to use from any thread.

    Files that change are taken up together, once all of them can be used. Until then what was good stays; if that lasts
    for 2 seconds, one warning says which file is wrong, and why.
    """

    def __init__(self, tls: ServerTls | ClientTls) -> None:
        """Raises:
        ConfigError: as `read`.
        """
        self._files = _files(tls)
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._credentials = _read(*self._files)
        self._next_look = time.monotonic() + _PAUSE_S
        self._problem = ""
        self._complain_at = 0.0

    def current(self) -> Credentials:
        """The newest that can be used: the same object for as long as nothing changes.

        Looks at the files at most twice a second, and reads them only if they have changed; costs nothing in between.
        """
        if time.monotonic() >= self._next_look:
            with self._lock:
                self._update(time.monotonic())
        return self._credentials

    async def changes(self) -> AsyncIterator[Credentials]:
        """What `current` gives, at once and then whenever it is another; watches for ever."""
        known = None
        while True:
            found = await asyncio.to_thread(self.current)
            if found is not known:
                known = found
                yield found
            await asyncio.sleep(_PAUSE_S)

    def _update(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + _PAUSE_S
        found_now = self._look()
        if found_now != self._stamps:
            self._stamps = found_now
            self._problem = ""
            try:
                found = _read(*self._files)
            except ConfigError as error:
                self._problem = str(error)
                self._complain_at = now + _PATIENCE_S
            else:
                if found != self._credentials:
                    self._credentials = found
        if self._problem and now >= self._complain_at:
            _log.warning("%s; what was good before stays in use", self._problem)
            self._problem = ""

    def _look(self) -> tuple[object, ...]:
        """Differs whenever a file has been written or replaced."""
        return tuple(stamp(path) for path in self._files if path)


def _files(tls: ServerTls | ClientTls) -> tuple[Path | None, Path | None, Path | None]:
    """Where the certificate, its key and the authorities are."""
    if isinstance(tls, ServerTls):
        return tls.certificate, tls.key, tls.client_ca
    return tls.certificate, tls.key, tls.ca or _system_authorities()


def _read(certificate: Path | None, key: Path | None, authorities: Path | None) -> Credentials:
    return Credentials(
        certificate=_certificate(certificate) if certificate else None,
        key=_key(key, certificate) if key and certificate else None,
        authorities=_authorities(authorities) if authorities else None,
    )


def _system_authorities() -> Path:
    candidates = (ssl.get_default_verify_paths().cafile, *_SYSTEM)
    for candidate in candidates:
        if candidate and (path := Path(candidate)).is_file():
            return path
    raise ConfigError("no authorities for TLS: `ca` names no file, and the system has none where it is looked for")


def _certificate(path: Path) -> bytes:
    content, certificates = _pem(path)
    begins, ends = _validity(certificates[0])
    now = datetime.now(UTC)
    if now < begins:
        raise ConfigError(f"{path}: the certificate is not valid before {begins:%Y-%m-%d %H:%M:%S} UTC")
    if now > ends:
        raise ConfigError(f"{path}: the certificate expired at {ends:%Y-%m-%d %H:%M:%S} UTC")
    return content


def _authorities(path: Path) -> bytes:
    content, certificates = _pem(path)
    if all(_validity(certificate)[1] < datetime.now(UTC) for certificate in certificates):
        raise ConfigError(f"{path}: every certificate in it has expired")
    return content


def _key(path: Path, certificate: Path) -> bytes:
    content = _content(path)

    def no_passphrase() -> str:
        raise ConfigError(f"{path}: the key has a passphrase; it must have none")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, path, no_passphrase)
    except ssl.SSLError as error:
        if error.reason in _MISFITS:
            raise ConfigError(f"{path}: it is not the key of the certificate in {certificate}") from error
        if error.reason and error.library != "PEM":
            raise ConfigError(f"{certificate}: the certificate cannot be used: {error.reason}") from error
        raise ConfigError(f"{path}: there is no private key in it, in PEM") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    return content


def _pem(path: Path) -> tuple[bytes, list[bytes]]:
    """What is in the file, and the certificates of it in DER, at least one."""
    content = _content(path)
    parser = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        certificates = [ssl.PEM_cert_to_DER_cert(match.decode("ascii")) for match in _CERTIFICATE.findall(content)]
        for certificate in certificates:
            parser.load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{path}: a certificate in it is damaged") from error
    if not certificates:
        raise ConfigError(f"{path}: there is no certificate in it, in PEM")
    return content, certificates


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _validity(certificate: bytes) -> tuple[datetime, datetime]:
    """From when until when a certificate in DER, which OpenSSL has found to be one, is valid: RFC 5280, section 4.1."""

    def content(at: int) -> tuple[int, int]:
        """Where that of the element at `at` begins and ends."""
        length, at = certificate[at + 1], at + 2
        if length > 127:
            end = at + (length & 127)
            length, at = int.from_bytes(certificate[at:end], "big"), end
        return at, at + length

    def time_at(at: int) -> datetime:
        begin, end = content(at)
        text = certificate[begin:end].decode("ascii")
        return datetime.strptime(text, _TIMES[certificate[at]]).replace(tzinfo=UTC)

    at = content(content(0)[0])[0]  # in Certificate, in TBSCertificate
    if certificate[at] == 0xA0:  # version
        at = content(at)[1]
    for _ in ("serialNumber", "signature", "issuer"):
        at = content(at)[1]
    begins, _ = content(at)
    return time_at(begins), time_at(content(begins)[1])
