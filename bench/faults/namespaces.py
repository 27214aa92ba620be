"""A network of its own for one node, and a black hole in it; takes root, and Linux's `ip`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# 198.18.0.0/15 is set aside for measurements of networks (RFC 2544).
_HOST, _NODE = "198.18.{}.1", "198.18.{}.2"
_LONGEST_S = 10.0


class Namespace:
    """One network namespace, tied to this one by a pair of interfaces.

    Attributes:
        host: the address of a node in it.
        prefix: the command that runs another in it.
    """

    def __init__(self, name: str, number: int) -> None:
        self._name = name
        self._outside = _HOST.format(number)
        self.host = _NODE.format(number)
        self.prefix = ("ip", "netns", "exec", name)

    def swallow(self) -> None:
        """From now on the node gets everything and nothing of what it answers arrives, without a word to anybody."""
        _ip("-n", self._name, "route", "add", "blackhole", f"{self._outside}/32")

    def heal(self) -> None:
        _ip("-n", self._name, "route", "del", "blackhole", f"{self._outside}/32")


def missing() -> str:
    """What this machine lacks for it, in one line; "" if nothing."""
    if shutil.which("ip") is None:
        return "ip is not installed: apt-get install iproute2"
    try:
        with made(255):
            return ""
    except (OSError, RuntimeError) as error:
        return f"network namespaces cannot be made (it takes root): {error}"


@contextmanager
def made(number: int) -> Iterator[Namespace]:
    """A namespace, of which there is one of each number, until the block ends.

    Raises:
        RuntimeError: it cannot be made.
    """
    name = f"faults-{os.getpid()}-{number}"
    inside, outside = f"flt{os.getpid() % 100000}-{number}n", f"flt{os.getpid() % 100000}-{number}h"
    namespace = Namespace(name, number)
    _ip("netns", "add", name)
    try:
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        _ip("address", "add", f"{_HOST.format(number)}/30", "dev", outside)
        _ip("link", "set", outside, "up")
        _ip("-n", name, "address", "add", f"{_NODE.format(number)}/30", "dev", inside)
        _ip("-n", name, "link", "set", inside, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield namespace
    finally:
        _ip("netns", "delete", name)  # the pair of interfaces goes with it


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
