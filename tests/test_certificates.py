"""TLS files: what is wrong with them is said in a line, and what changes is taken up."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from dl_inference_core import certificates
from dl_inference_core.certificates import Watched
from dl_inference_core.config import ClientTls, ServerTls
from dl_inference_core.errors import ConfigError

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


Write = Callable[..., ServerTls]


@pytest.fixture
def write(authority: trustme.CA, tmp_path: Path) -> Write:
    """Writes a new certificate and its key, each in one step, over those before."""

    def write(**how: Any) -> ServerTls:
        issued = authority.issue_cert("node.test", **how)
        tls = ServerTls(certificate=tmp_path / "node.pem", key=tmp_path / "node.key")
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        for path, content in ((tls.certificate, chain), (tls.key, issued.private_key_pem.bytes())):
            part = path.with_suffix(".part")
            part.write_bytes(content)
            part.replace(path)
        return tls

    return write


def complaint(tls: ServerTls | ClientTls, about: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        certificates.read(tls)
    message = str(caught.value)
    assert message.startswith(f"{about}: ")
    assert "\n" not in message
    return message.removeprefix(f"{about}: ")


# What is read


@pytest.mark.parametrize("kind", list(trustme.KeyType))
def test_a_servers_credentials_are_its_files(write: Write, authority: trustme.CA, kind: Any) -> None:
    tls = write(key_type=kind)
    ca = tls.certificate.with_name("ca.pem")
    ca.write_bytes("# authorities — ours\n".encode() + authority.cert_pem.bytes() * 2)
    for given in (tls, tls.model_copy(update={"client_ca": ca})):
        credentials = certificates.read(given)
        assert credentials.certificate == tls.certificate.read_bytes()
        assert credentials.key == tls.key.read_bytes()
        assert credentials.authorities == (ca.read_bytes() if given.client_ca else None)
        assert "PRIVATE KEY" not in repr(credentials)


def test_certificate_and_key_may_be_in_one_file(write: Write) -> None:
    tls = write()
    tls.certificate.write_bytes(tls.key.read_bytes() + tls.certificate.read_bytes())
    both = ServerTls(certificate=tls.certificate, key=tls.certificate)
    assert certificates.read(both).key == tls.certificate.read_bytes()


def test_a_client_trusts_the_systems_authorities_unless_told(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "system.pem"
    file.write_bytes(authority.cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    credentials = certificates.read(ClientTls())
    assert credentials.authorities == file.read_bytes()
    assert credentials.certificate is None
    assert credentials.key is None
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(certificates, "_SYSTEM", ())
    with pytest.raises(ConfigError, match="no authorities for TLS"):
        certificates.read(ClientTls())
    assert certificates.read(ClientTls(ca=file)) == credentials


@pytest.mark.parametrize("until", [NOW + HOUR, datetime(2049, 12, 31, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC)])
def test_a_certificate_is_good_from_its_first_day_to_its_last(write: Write, until: datetime) -> None:
    certificates.read(write(not_before=NOW - HOUR, not_after=until))


# What is wrong


def test_a_certificate_out_of_its_time_is_said_with_the_time(write: Write) -> None:
    tls = write(not_after=NOW - HOUR)
    assert complaint(tls, tls.certificate) == f"the certificate expired at {NOW - HOUR:%Y-%m-%d %H:%M:%S} UTC"
    tls = write(not_before=NOW + HOUR)
    assert complaint(tls, tls.certificate).startswith(f"the certificate is not valid before {NOW + HOUR:%Y-%m-%d %H:}")


def test_an_expired_authority_beside_a_good_one_does_no_harm(
    write: Write, authority: trustme.CA, tmp_path: Path
) -> None:
    old = write(not_after=NOW - HOUR).certificate.read_bytes()
    ca = tmp_path / "ca.pem"
    ca.write_bytes(old)
    assert complaint(ClientTls(ca=ca), ca) == "every certificate in it has expired"
    ca.write_bytes(old + authority.cert_pem.bytes())
    assert certificates.read(ClientTls(ca=ca)).authorities == ca.read_bytes()


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
def test_a_file_that_cannot_be_read_is_said(write: Write, tmp_path: Path, name: str) -> None:
    good = write()
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        assert complaint(good.model_copy(update={name: path}), path) == why


DAMAGED = b"-----BEGIN CERTIFICATE-----\nTUlJ\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("name", ["certificate", "client_ca"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there is no certificate in it, in PEM"),
        (b"\x30\x82\xff", "there is no certificate in it, in PEM"),
        (DAMAGED, "a certificate in it is damaged"),
        (DAMAGED.replace(b"TUlJ", b"TUl"), "a certificate in it is damaged"),
        (DAMAGED.replace(b"TUlJ", b"\xff\xfe"), "a certificate in it is damaged"),
    ],
)
def test_what_holds_no_certificate_is_said(write: Write, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert complaint(write().model_copy(update={name: file}), file) == said
    file.write_bytes(write().certificate.read_bytes() + content)
    if said == "a certificate in it is damaged":
        assert complaint(write().model_copy(update={name: file}), file) == said


def passphrase(key: bytes) -> bytes:
    encryption = serialization.BestAvailableEncryption(b"secret")
    private = serialization.load_pem_private_key(key, None)
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def another(key: bytes) -> bytes:
    return trustme.CA().private_key_pem.bytes()


def another_kind(key: bytes) -> bytes:
    return trustme.CA(key_type=trustme.KeyType.RSA).private_key_pem.bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key: b"", "there is no private key in it, in PEM"),
        (lambda key: key[:60] + key[80:], "there is no private key in it, in PEM"),
        (passphrase, "the key has a passphrase; it must have none"),
        (another, "it is not the key of the certificate in "),
        (another_kind, "it is not the key of the certificate in "),
    ],
)
def test_what_is_not_the_certificates_key_is_said(write: Write, change: Callable[[bytes], bytes], said: str) -> None:
    tls = write()
    tls.key.write_bytes(change(tls.key.read_bytes()))
    assert complaint(tls, tls.key).startswith(said)
    client = ClientTls(ca=tls.certificate, certificate=tls.certificate, key=tls.key)
    assert complaint(client, tls.key).startswith(said)


@pytest.mark.skipif(ssl.create_default_context().security_level < 2, reason="this OpenSSL is content with less")
def test_a_certificate_that_openssl_finds_too_weak_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trustme.KeyType, "_generate_key", lambda self: rsa.generate_private_key(65537, 1024))
    issued = trustme.CA().issue_cert("weak.test")
    tls = ServerTls(certificate=tmp_path / "weak.pem", key=tmp_path / "weak.key")
    tls.certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    tls.key.write_bytes(issued.private_key_pem.bytes())
    assert complaint(tls, tls.certificate) == "the certificate cannot be used: EE_KEY_TOO_SMALL"


# What changes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_PAUSE_S", 0.0)
    monkeypatch.setattr(certificates, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_files_that_change_are_taken_up_once_they_fit(write: Write) -> None:
    tls = write()
    watched = Watched(tls)
    first = watched.current()
    key = tls.key.read_bytes()
    write()
    new_key = tls.key.read_bytes()
    tls.key.write_bytes(key)
    assert watched.current() is first
    tls.key.write_bytes(new_key)
    second = watched.current()
    assert second == certificates.read(tls) != first
    os.utime(tls.key)
    assert watched.current() is second, "the same content in a new file"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("break_it", [Path.unlink, lambda path: path.write_bytes(b"none")])
@pytest.mark.parametrize("name", ["certificate", "key"])
def test_what_cannot_be_used_is_said_once_and_what_was_good_stays(
    write: Write, caplog: pytest.LogCaptureFixture, name: str, break_it: Callable[[Path], Any]
) -> None:
    tls = write()
    watched = Watched(tls)
    first = watched.current()
    for _ in range(2):
        break_it(getattr(tls, name))
        assert [watched.current() for _ in range(3)] == [first] * 3
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"{getattr(tls, name)}: ")
        assert said.endswith("; what was good before stays in use")
        assert "\n" not in said
        caplog.clear()
        write()
        assert watched.current() is not first
        first = watched.current()
        assert not caplog.records


def test_a_key_that_comes_a_little_later_is_no_reason_to_complain(
    write: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "_PAUSE_S", 0.0)
    tls = write()
    watched = Watched(tls)
    first = watched.current()
    old, _ = tls.certificate.read_bytes(), write()
    new = tls.certificate.read_bytes()
    tls.certificate.write_bytes(old)
    assert watched.current() is first
    tls.certificate.write_bytes(new)
    assert watched.current() is not first
    assert not caplog.records


def test_the_files_are_not_looked_at_for_every_call(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = write()
    watched = Watched(tls)
    looks: list[Path] = []
    monkeypatch.setattr(certificates, "stamp", looks.append)
    for _ in range(1000):
        watched.current()
    assert len(looks) <= 4


async def test_changes_are_given_as_they_come(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_PAUSE_S", 0.01)
    tls = write()
    watched = Watched(tls)
    changes = watched.changes()
    async with asyncio.timeout(10):
        assert await anext(changes) is watched.current()
        for _ in range(3):
            write()
            given = await anext(changes)
            assert given == certificates.read(tls)
            assert given is watched.current()
    await changes.aclose()
