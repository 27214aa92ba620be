"""Time, as a gateway's policies see it: a simulation and a test hand them another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol as Interface

from dl_inference_core.transport import Timer, Transport


class Clock(Interface):
    """Seconds that only grow, and functions that are called later. Any thread."""

    def now(self) -> float:
        """In seconds; exchanges' deadlines are on this clock."""

    def call_later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Have `function` called after so many seconds."""


class SystemClock:
    """The clock of `time.monotonic`, with a transport's timers."""

    def __init__(self, transport: Transport) -> None:
        self.now = time.monotonic
        self.call_later = transport.call_later
