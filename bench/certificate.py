"""A certificate for 127.0.0.1, of an authority of one run's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """PEM files.

    Attributes:
        chain, key: what a server shows, and its private key.
        both: chain and key in one file, as HAProxy takes them.
        ca: the authority, which clients trust.
    """

    chain: Path
    key: Path
    both: Path
    ca: Path


@contextmanager
def issued() -> Iterator[Certificate]:
    """There until the block ends."""
    authority = trustme.CA()
    shown = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = Certificate(
            chain=folder / "chain.pem", key=folder / "key.pem", both=folder / "both.pem", ca=folder / "ca.pem"
        )
        for part in shown.cert_chain_pems:
            part.write_to_path(files.chain, append=True)
        shown.private_key_pem.write_to_path(files.key)
        shown.private_key_and_cert_chain_pem.write_to_path(files.both)
        authority.cert_pem.write_to_path(files.ca)
        yield files
