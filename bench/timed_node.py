"""A node that notes when requests pass its stages: `python -m bench.timed_node CONFIG LOG`.

It is `dl-inference-core serve` with a line more in some functions. At its end it writes to LOG, as JSON, the times of
each of `POINTS` by `time.monotonic_ns`, in the order of the requests, which must come one after another.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dl_inference_core.cli import main
from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.node.execution import Completions, Execution
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.queue import RequestQueue

POINTS = ("came", "queued", "taken", "called", "returned", "answered")


def _noting(function: Callable[..., Any], *, before: list[int] | None = None, after: list[int] | None = None) -> Any:
    """`function`, which notes when it is called and when it has returned."""

    def noted(*args: Any, **options: Any) -> Any:
        if before is not None:
            before.append(time.monotonic_ns())
        try:
            return function(*args, **options)
        finally:
            if after is not None:
                after.append(time.monotonic_ns())

    return noted


def _watch() -> dict[str, list[int]]:
    """Has the stages noted; the times by point."""
    times: dict[str, list[int]] = {point: [] for point in POINTS}
    send = Completions.send

    def send_noting(completions: Completions) -> None:
        if len(times["answered"]) < len(times["returned"]):  # it is called once more after each batch, with nothing
            times["answered"].append(time.monotonic_ns())
        send(completions)

    watched: list[tuple[type, str, Any]] = [
        (Dispatcher, "begin_all", _noting(Dispatcher.begin_all, before=times["came"])),
        (RequestQueue, "put_all", _noting(RequestQueue.put_all, before=times["queued"])),
        (Execution, "run", _noting(Execution.run, before=times["taken"])),
        (Handler, "run_batch", _noting(Handler.run_batch, before=times["called"], after=times["returned"])),
        (Completions, "send", send_noting),
    ]
    for cls, name, function in watched:
        setattr(cls, name, function)
    return times


if __name__ == "__main__":
    config, log = sys.argv[1:]
    times = _watch()
    try:
        main(["serve", "--config", config])
    finally:
        Path(log).write_text(json.dumps(times), encoding="utf-8")
