"""The processes of the load: started once, told each load in turn, and what they measured put together."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dl_inference_core.errors import NodeFailed
from dl_inference_tools.load_testing.request import Message, Target
from dl_inference_tools.load_testing.results import Load, Row
from dl_inference_tools.load_testing.sending import Part, work

_AHEAD_NS = 20_000_000
"""Within that they hear of a load and take it up."""
_END_S = 5.0


class Processes:
    """Several that share each load; `started` makes them."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes
        for pipe in pipes:
            _received(pipe)

    def run(self, load: Load, progress: Callable[[int], None] = lambda _: None) -> Row:
        """Blocks until all of it is done.

        Args:
            progress: is told now and then how many requests are done, those of the warm-up left out.

        Raises:
            NodeFailed: a process has ended.
        """
        count = len(self._pipes)
        start = time.monotonic_ns() + _AHEAD_NS
        for index, pipe in enumerate(self._pipes):
            pipe.send(Part(load=load.part(index, count), first=index, step=count, start_ns=start))
        done = dict.fromkeys(self._pipes, 0)
        rows: dict[Connection, Row] = {}
        while len(rows) < count:
            waiting: list[Any] = [pipe for pipe in self._pipes if pipe not in rows]
            ready: list[Any] = wait(waiting)
            for pipe in ready:
                match _received(pipe):
                    case Row() as row:
                        rows[pipe] = row
                    case int() as number:
                        done[pipe] = number
            progress(sum(done.values()))
        return Row.merged(load, [rows[pipe] for pipe in self._pipes])


@contextmanager
def started(
    target: Target, message: Message, *, processes: int, connections: int, open_loop: bool
) -> Iterator[Processes]:
    """Processes that stand in connection with the target; they are gone after it.

    Args:
        connections: of all together; at least one for each process.

    Raises:
        NodeFailed: one could not connect; it has said why.
    """
    spawning = multiprocessing.get_context("spawn")  # gRPC does not outlive a fork
    pipes: list[Connection] = []
    running: list[BaseProcess] = []
    try:
        for index in range(processes):
            ours, theirs = spawning.Pipe()
            own = connections // processes + (index < connections % processes)
            arguments = (theirs, target, message, own, open_loop)
            process: BaseProcess = spawning.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            running.append(process)
        yield Processes(pipes)
    except BaseException:
        for started_one in running:
            started_one.terminate()
        raise
    finally:
        for pipe in pipes:
            pipe.close()
        for process in running:
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise NodeFailed("a process that makes the load has ended; it has said why") from None
