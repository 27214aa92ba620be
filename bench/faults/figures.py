"""The arithmetic: of records of requests and logs of attempts, what clients saw and where attempts went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.faults.client import COLUMNS
from bench.faults.node import ANSWERED, ARRIVED, CANCELLED, EVENT

_OK = 0
_EVENT = np.dtype([("at", "<f8"), ("left", "<f4"), ("port", "<u2"), ("event", "u1"), ("", "u1")])
_WINDOW_S, _STEP_S = 0.5, 0.05
BIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Records:
    """Requests in the order in which they were due; all times in seconds, by time.monotonic."""

    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    ended: NDArray[np.float64]
    code: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.due)

    def among(self, chosen: NDArray[np.bool_]) -> Records:
        return Records(self.due[chosen], self.sent[chosen], self.ended[chosen], self.code[chosen])

    def due_within(self, begin: float, end: float) -> Records:
        return self.among((self.due >= begin) & (self.due < end))

    def ended_within(self, begin: float, end: float) -> Records:
        return self.among((self.ended >= begin) & (self.ended < end))

    def by_connections(self, some: Sequence[int], count: int) -> Records:
        """Those by `some` of the `count` connections that the client takes in turn; of all that it has sent."""
        return self.among(np.isin(np.arange(len(self)) % count, some))

    @property
    def succeeded(self) -> Records:
        return self.among(self.code == _OK)

    @property
    def failed(self) -> Records:
        return self.among(self.code != _OK)

    def percentile_ms(self, percent: float) -> float:
        """Of the latency, from when a request was due; NaN without requests."""
        return float(np.percentile(self.ended - self.due, percent)) * 1000 if len(self) else float("nan")

    def percentile_of_answer_ms(self, percent: float) -> float:
        """The same from when it was sent."""
        return float(np.percentile(self.ended - self.sent, percent)) * 1000 if len(self) else float("nan")

    def lateness_ms(self) -> float:
        """The 99th percentile of how late the client sent what was due."""
        return float(np.percentile(self.sent - self.due, 99)) * 1000 if len(self) else float("nan")


@dataclass(frozen=True, slots=True)
class Attempts:
    """What reached one node, as it logged it.

    Attributes:
        at: when each event was, by time.monotonic.
        left: seconds that an attempt's deadline was away when it came.
        port: of the connection that it came by.
        event: of `bench.faults.node`.
    """

    at: NDArray[np.float64]
    left: NDArray[np.float64]
    port: NDArray[np.int64]
    event: NDArray[np.int64]

    def _of(self, event: int, begin: float, end: float) -> NDArray[np.bool_]:
        chosen: NDArray[np.bool_] = (self.event == event) & (self.at >= begin) & (self.at < end)
        return chosen

    def arrived(self, begin: float = float("-inf"), end: float = float("inf")) -> Attempts:
        return self._among(self._of(ARRIVED, begin, end))

    def answered(self, begin: float = float("-inf"), end: float = float("inf")) -> Attempts:
        return self._among(self._of(ANSWERED, begin, end))

    def cancelled(self, begin: float = float("-inf"), end: float = float("inf")) -> Attempts:
        return self._among(self._of(CANCELLED, begin, end))

    def _among(self, chosen: NDArray[np.bool_]) -> Attempts:
        return Attempts(self.at[chosen], self.left[chosen], self.port[chosen], self.event[chosen])

    def __len__(self) -> int:
        return len(self.at)


def records(file: Path) -> Records:
    """What a client wrote."""
    table = np.fromfile(file, np.float64).reshape(-1, COLUMNS)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Records(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(np.int64))


def attempts(file: Path) -> Attempts:
    """What a node wrote; a last event that it was killed at is left out."""
    content = file.read_bytes()
    table = np.frombuffer(content[: len(content) // EVENT.size * EVENT.size], _EVENT)
    return Attempts(
        table["at"], table["left"].astype(np.float64), table["port"].astype(np.int64), table["event"].astype(np.int64)
    )


def arrivals(nodes: Sequence[Attempts], begin: float, end: float) -> NDArray[np.int64]:
    """Attempts that came to each node."""
    return np.array([len(node.arrived(begin, end)) for node in nodes])


def per_request(nodes: Sequence[Attempts], requests: Records, begin: float, end: float) -> float:
    """Attempts for each request that was due then; NaN without requests."""
    due = len(requests.due_within(begin, end))
    return float(arrivals(nodes, begin, end).sum()) / due if due else float("nan")


def share_of_fair(nodes: Sequence[Attempts], some: Sequence[int], begin: float, end: float) -> float:
    """What `some` of the nodes had of all attempts, over what they would have if all nodes had as many."""
    came = arrivals(nodes, begin, end)
    fair = came.sum() * len(some) / len(nodes)
    return float(came[list(some)].sum() / fair) if fair else float("nan")


def recovered_s(nodes: Sequence[Attempts], node: int, begin: float, end: float, share: float = 0.8) -> float:
    """Seconds from `begin` to the first half second in which `node` gives `share` of its fair part of all answers; inf
    for never. What had waited in a node that stood still is not answered any more, and does not count."""
    start = begin
    while start + _WINDOW_S <= end:
        answers = [len(each.answered(start, start + _WINDOW_S)) for each in nodes]
        if sum(answers) and answers[node] >= share * sum(answers) / len(nodes):
            return start - begin
        start += _STEP_S
    return float("inf")


def starved_seconds(nodes: Sequence[Attempts], healthy: Sequence[int], begin: float, end: float) -> int:
    """Of the whole seconds, those in which a healthy node had no attempt while others had, added over those nodes."""
    starved = 0
    for second in np.arange(begin, end - 1, 1.0):
        came = arrivals(nodes, second, second + 1)
        starved += sum(1 for node in healthy if came.sum() and not came[node])
    return starved


def series(requests: Records, nodes: Sequence[Attempts], begin: float, end: float) -> dict[str, Any]:
    """Counts in bins of `BIN_S`: requests that were due, those of them that failed by when they ended, attempts at each
    node."""
    edges = begin + BIN_S * np.arange(math.ceil((end - begin) / BIN_S) + 1)

    def counts(times: NDArray[np.float64]) -> list[int]:
        return [int(count) for count in np.histogram(times, edges)[0]]

    return {
        "requests": counts(requests.due),
        "failed": counts(requests.failed.ended),
        "attempts": [counts(node.arrived().at) for node in nodes],
    }
