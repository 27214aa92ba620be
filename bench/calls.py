"""Calls without a server, in a process of their own that imports as little as it can."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping


def answer(calls: Mapping[str, Callable[[], object]]) -> None:
    """For each line "NAME COUNT" on standard input call so often, and tell as a line of JSON what that took."""
    for line in sys.stdin:
        name, count = line.split()
        print(json.dumps(_timed(calls[name], int(count))), flush=True)


def _timed(call: Callable[[], object], count: int) -> dict[str, float]:
    seconds = []
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(count):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    took, used = time.perf_counter() - start, time.process_time() - cpu
    seconds.sort()
    return {
        "cpu_us": used / count * 1e6,
        "requests_per_s": count / took,
        "mean_ms": sum(seconds) / count * 1000,
        "p50_ms": seconds[count // 2] * 1000,
        "p99_ms": seconds[count * 99 // 100] * 1000,
    }
