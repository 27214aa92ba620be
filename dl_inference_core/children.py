"""Processes that are forked from a process that serves: default signal handlers, and none of its sockets.

A handler may fork; `multiprocessing` does so by default on Linux. The child begins as a copy of the process. It has the
handlers of signals and the descriptor by which they wake the event loop, so a SIGTERM to the child would end its
parent. It has the sockets, so a child that outlives its parent would hold the port, and clients would wait on
connections that nobody reads. `isolate_children` takes both away from each child. `end_child` ends a child that returns
from the handler: it would go on to answer its parent's requests, and to take down what its parent needs.

A child that runs another program (`subprocess`, the methods "spawn" and "forkserver") has neither: a program starts
with default signal handlers, and all descriptors of a process that serves are close-on-exec.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl_inference_core.errors import causes

_log = logging.getLogger(__name__)

_DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}
"""What Python begins with, for each signal that a process which serves handles."""

_EPOLL = "anon_inode:[eventpoll]"
"""What Linux calls a descriptor of epoll. A child's copy is its parent's event loop itself: what the child's Python or
gRPC objects take out of it when they are freed, the parent no longer hears of. So the child gets an empty one."""

_is_child = threading.Event()
"""Set in a process that was forked from one that serves, and never unset: the hooks of a fork hold for the whole
process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSockets:
    """Which sockets of a process belong to its service. All others belong to handlers, and stay open in children.

    Attributes:
        ports: TCP ports that it listens on; the connections of clients have the same local port.
        peer_ports: TCP ports of other servers that it is connected to.
        paths: Unix-domain sockets that it listens on, or folders of such.
    """

    ports: Collection[int]
    peer_ports: Collection[int] = ()
    paths: Collection[Path] = ()

    def has(self, each: socket.socket) -> bool:
        """Whether `each` is one of them."""
        name = each.getsockname()
        if each.family in (socket.AF_INET, socket.AF_INET6):
            return name[1] in self.ports or (bool(self.peer_ports) and _peer_port(each) in self.peer_ports)
        if each.family == socket.AF_UNIX and name:
            path = Path(os.fsdecode(name))
            return any(path == own or own in path.parents for own in self.paths)
        return False


def isolate_children(own: Callable[[], OwnSockets]) -> None:
    """Have each process that is forked from this one, by `os.fork`, `os.forkpty` or `multiprocessing`, begin with
    default handlers of SIGTERM, SIGINT and SIGHUP, and without this process's own sockets.

    Call it once in a process that serves, on its event loop: Python keeps such hooks for as long as the process lives.
    A child that returns to this event loop is ended.

    Args:
        own: says which sockets are this process's own. Called in the child, on the thread that forked.
    """
    # In a child each socket's number stays taken: Python and gRPC objects may close it again later.
    placeholder = os.open(os.devnull, os.O_RDWR)
    before_fork = threading.local()
    loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()

    def pause() -> None:
        # Until the child has its own handlers, a signal to it would wake the event loop of its parent.
        before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFAULTS)
        # A garbage collection in the child would free gRPC objects of its parent, which wait for threads that the child
        # lacks. The hooks of others may run in the child before `isolate`.
        before_fork.collects = gc.isenabled()
        gc.disable()

    def resume() -> None:
        if before_fork.collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before_fork.mask)

    def isolate() -> None:
        gc.freeze()
        _is_child.set()
        try:
            signal.set_wakeup_fd(-1)
            for number, handler in _DEFAULTS.items():
                signal.signal(number, handler)
            _close(own(), placeholder)
            if threading.get_ident() == loop_thread:
                # Two turns later: a `sys.exit` in the present turn ends the child by itself, with its own status.
                loop.call_soon(lambda: loop.call_soon(end_child))
        finally:
            resume()

    os.register_at_fork(before=pause, after_in_parent=resume, after_in_child=isolate)


def end_child(error: BaseException | None = None) -> None:
    """End this process if it was forked from one that serves; in any other process nothing happens. Neither exit
    handlers nor `finally` blocks run, as with `os._exit`.

    Args:
        error: what ended the code that forked. The status that `sys.exit` was given becomes the process's; for
            anything else the status is 1, and the log says that the code should have ended its process itself.
    """
    if not _is_child.is_set():
        return
    exiting = next((each for each in causes(error) if isinstance(each, SystemExit)), None)
    if exiting is None:
        _log.error(
            "process %d, forked by a handler or plugin, came back from it and is ended; expected it to call os._exit",
            os.getpid(),
            exc_info=error,
        )
    elif not isinstance(exiting.code, int | None):
        print(exiting.code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    code = exiting.code if exiting is not None else 1
    os._exit(0 if code is None else code & 0xFF if isinstance(code, int) else 1)


def _close(own: OwnSockets, placeholder: int) -> None:
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"  # noqa: PTH112
    for name in os.listdir(folder):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the folder's own descriptor, which is closed by now
            if _is_socket(int(name), own):
                os.dup2(placeholder, int(name), inheritable=False)
            elif os.readlink(f"{folder}/{name}") == _EPOLL:  # noqa: PTH115
                with select.epoll() as empty:
                    os.dup2(empty.fileno(), int(name), inheritable=False)


def _is_socket(number: int, own: OwnSockets) -> bool:
    """Whether a descriptor is one of `own`.

    Raises:
        OSError: it is closed; or it is a socket of a kind that Python does not know.
    """
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return False
    each = socket.socket(fileno=number)
    try:
        return own.has(each)
    finally:
        each.detach()


def _peer_port(each: socket.socket) -> int | None:
    with contextlib.suppress(OSError):  # it is not connected
        port: int = each.getpeername()[1]
        return port
    return None
