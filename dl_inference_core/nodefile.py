"""The original's node file: one line per task, `taskid=timeout_ms,host:port,host:port@weight,…`; re-read while running.

What a person or a script may do to such a file while it is read decides the rules: a line that is wrong keeps what its
task had; a task goes only when its line is gone and every other line can be read; nothing is taken from a file that
still changes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dl_inference_core.config import NodeConfig, RouteConfig, validated
from dl_inference_core.errors import ConfigError

_LARGEST = 16 * 1024 * 1024
_KEY = re.compile(r"[^\s=,/#\x00-\x1f\x7f]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """What a node file says.

    Attributes:
        routes: by task id, or by name.
        problems: one sentence for each line that cannot be used, with its number.
        broken: the tasks whose lines cannot be used.
        readable: whether every line says which task it is for.
    """

    routes: Mapping[int | str, RouteConfig]
    problems: tuple[str, ...] = ()
    broken: frozenset[int | str] = frozenset()
    readable: bool = True

    def onto(self, last: Mapping[int | str, RouteConfig]) -> dict[int | str, RouteConfig]:
        """The routes to use, given the last ones that were: what is broken here keeps what it had."""
        kept = {key: route for key, route in last.items() if key in self.broken or not self.readable}
        return {**kept, **self.routes}


def parse(content: bytes) -> NodeFile:
    """`content` line by line. Never raises: what is wrong is in `problems`."""
    if len(content) > _LARGEST:
        return NodeFile(routes={}, problems=(f"it has over {_LARGEST} bytes",), readable=False)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return NodeFile(routes={}, problems=("it is UTF-16; expected UTF-8",), readable=False)
    routes: dict[int | str, RouteConfig] = {}
    problems: list[str] = []
    broken: set[int | str] = set()
    readable = True
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        key: int | str | None = None
        try:
            if raw.lstrip().startswith(b"#"):  # in whatever encoding
                continue
            line = raw.decode("utf-8").strip()
            if not line:
                continue
            key, rest = _split(line)
            if key in routes or key in broken:
                raise ValueError(f"task {key} stands twice; the first line counts")
            routes[key] = _route(key, rest)
        except (ValueError, ConfigError) as error:
            problems.append(f"line {number}: {error}")
            if key is None:
                readable = False
            elif key not in routes:
                broken.add(key)
    return NodeFile(routes=routes, problems=tuple(problems), broken=frozenset(broken), readable=readable)


def _split(line: str) -> tuple[int | str, str]:
    key, equals, rest = (part.strip() for part in line.partition("="))
    if not equals or not _KEY.fullmatch(key):
        raise ValueError("expected taskid=timeout_ms,host:port,…")
    if key.isascii() and key.isdecimal():
        if len(key) > 18:
            raise ValueError("the task id has more than 18 digits")
        return int(key), rest
    return key, rest


def _route(key: int | str, rest: str) -> RouteConfig:
    timeout, *nodes = (part.strip() for part in rest.split(","))
    if not (timeout.isascii() and timeout.isdecimal() and len(timeout) <= 9):
        raise ValueError(f'task {key}: "{timeout[:40]}" is no timeout in milliseconds')
    if not any(nodes):
        raise ValueError(f"task {key} has no nodes")
    values = {
        "name" if isinstance(key, str) else "task_id": key,
        "timeout_ms": int(timeout),
        "nodes": tuple(NodeConfig.parse(node) for node in nodes),
    }
    return validated(RouteConfig, values, f"task {key}")


class Watched:
    """A file that may be edited, replaced, or missing for a while; its content only once that is whole."""

    def __init__(self, path: Path, *, patience: int) -> None:
        """Args:
        patience: how many looks a file whose last line has no end must stay the same; others must for one.
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
        """The content, if it is new and has stayed the same since the last look; None otherwise, and while it cannot be
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
            return None
        self._same_for += 1
        if content == self._taken or (self._same_for < self._patience and not content.endswith(b"\n")):
            return None
        self._taken = content
        return content

    def _content(self, *, again: bool = False) -> bytes:
        """Raises:
        OSError: it cannot be read; or `again`, which a pipe or a device cannot.
        """
        with open(self.path, "rb", opener=_without_waiting if again else None) as file:
            if again and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file, and cannot be read again")
            return file.read(_LARGEST + 1)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe, too, whether or not anybody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)
