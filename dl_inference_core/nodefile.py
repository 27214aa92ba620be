"""The original's node file: one line per task, `taskid=timeout_ms,host:port,host:port@weight,…`; re-read while running.

What a person or a script may do to such a file while it is read decides the rules: a line that is wrong keeps what its
task had; a task goes only when its line is gone and every other line can be read; nothing is taken from a file that
still changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dl_inference_core.config import NodeConfig, RouteConfig, validated
from dl_inference_core.errors import ConfigError
from dl_inference_core.files import LARGEST, without_mark

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
    if len(content) > LARGEST:
        return NodeFile(routes={}, problems=(f"it has over {LARGEST} bytes",), readable=False)
    try:
        content = without_mark(content)
    except ValueError as error:
        return NodeFile(routes={}, problems=(str(error),), readable=False)
    routes: dict[int | str, RouteConfig] = {}
    problems: list[str] = []
    broken: set[int | str] = set()
    readable = True
    for number, raw in enumerate(content.splitlines(), start=1):
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
