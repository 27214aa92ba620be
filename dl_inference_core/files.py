"""Files that people and scripts write while the service runs: whether one has changed, and the text in it."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path
from typing import TypeAlias

from dl_inference_core.errors import ConfigError

Stamp: TypeAlias = tuple[int | str, ...]
"""What `stamp` returns; to be compared, not to be read."""

LARGEST = 16 * 1024 * 1024
"""Bytes of a config or node file that are read: a node file with a hundred thousand nodes has a third of it."""


def stamp(path: Path | os.DirEntry[str]) -> Stamp:
    """A value that differs whenever the file at `path` has been written or replaced, even if its size and time of
    modification stay: programs cannot set the time of change (ctime), and two files have two inodes. It also differs
    after a new hard link or other permissions, which change the ctime as well.

    The stamp of a link is that of its target, and differs once the link has another target. A file that cannot be
    looked at has a stamp, too.
    """
    try:
        target = os.readlink(path) if path.is_symlink() else ""  # noqa: PTH115 - a DirEntry has no readlink
    except OSError:
        target = ""
    try:
        status = path.stat()
    except OSError as error:
        return target, -1, error.errno or 0
    return target, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def decode(content: bytes) -> str:
    """The text in a file's `content`, which must be UTF-8, without the byte order mark that editors put first.

    Raises:
        ValueError: it is in another encoding; says which, or where.
    """
    content = without_mark(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); expected UTF-8") from error


def without_mark(content: bytes) -> bytes:
    """`content` without UTF-8's byte order mark.

    Raises:
        ValueError: it begins with UTF-16's.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; expected UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


class FileWatcher:
    """A file that may be edited, replaced, or missing for a while; its content only once that is whole."""

    def __init__(self, path: Path, *, patience: int) -> None:
        """Args:
        patience: how many looks a file whose last line has no end must stay the same; others must for one. With 0
            a change counts at the first look.
        """
        self.path = path
        self._patience = patience
        self._seen: bytes | None = None
        self._same_for = 0
        self._taken: bytes | None = None
        self.complaint = ""
        """Why the file could not be read at the last look; "" if it could."""

    def read(self) -> bytes:
        """The content now, taken as it stands; for the start, when nobody is writing yet.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            self._taken = self._seen = self._content()
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror or error}") from error
        return self._taken

    def look(self) -> bytes | None:
        """The content, if it is new and has stayed the same for long enough; None otherwise, and while it cannot be
        read. Blocks for as long as reading the file takes."""
        try:
            content = self._content(again=True)
        except OSError as error:
            self.complaint = f"{self.path}: {error.strerror or error}"
            self._seen = None
            return None
        self.complaint = ""
        if content != self._seen:
            self._seen, self._same_for = content, 0
        else:
            self._same_for += 1
        enough = min(1, self._patience) if content.endswith(b"\n") else self._patience
        if content == self._taken or self._same_for < enough:
            return None
        self._taken = content
        return content

    def _content(self, *, again: bool = False) -> bytes:
        """Raises:
        OSError: it cannot be read; or `again`, which a pipe or a device cannot.
        """
        with open(self.path, "rb", opener=_without_waiting if again else None) as file:
            if again and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file, and cannot be read again")
            return file.read(LARGEST + 1)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe, too, whether or not anybody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)
