"""Which settings are tried, which are the best of them, and whether they are better than those that the model has.

It measures nothing itself: what does is a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_
from math import inf, sqrt
from statistics import median

from pydantic import BaseModel, ConfigDict

from dl_inference_core.errors import InferenceError
from dl_inference_tools.load_testing.results import Row

ROWS = (1, 8, 16, 32, 64, 128)
DELAYS_US = (0, 100, 500, 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is tuned.

    Attributes:
        intra_op_threads: the backend's, in the server's config; None is its own default.
    """

    max_rows: int = 64
    max_delay_us: int = 0
    instances: int = 1
    intra_op_threads: int | None = None

    def __str__(self) -> str:
        threads = "default" if self.intra_op_threads is None else self.intra_op_threads
        return (
            f"max_rows {self.max_rows}, max_delay_us {self.max_delay_us}, instances {self.instances}, "
            f"intra_op_threads {threads}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The values that are tried.

    Attributes:
        placements: instances, and the threads of each.
    """

    max_rows: tuple[int, ...]
    max_delay_us: tuple[int, ...]
    placements: tuple[tuple[int, int | None], ...]

    def axes(self) -> tuple[Callable[[Settings], list[Settings]], ...]:
        """Functions from settings to those that differ in one respect. Placements come first: more threads than cores
        disturb all that is measured. A batch of one row is held for nobody; delays are tried for larger ones."""

        def rows(at: Settings) -> list[Settings]:
            return [with_(at, max_rows=rows, max_delay_us=at.max_delay_us if rows > 1 else 0) for rows in self.max_rows]

        def placements(at: Settings) -> list[Settings]:
            return [with_(at, instances=copies, intra_op_threads=threads) for copies, threads in self.placements]

        def delays(at: Settings) -> list[Settings]:
            return [with_(at, max_delay_us=delay) for delay in self.max_delay_us] if at.max_rows > 1 else []

        return placements, rows, delays


def placements(cores: int, each: int, threads: Sequence[int | None] = ()) -> tuple[tuple[int, int | None], ...]:
    """Numbers of instances, and of threads for each, that no more threads work than there are cores.

    Args:
        each: how many batches one instance works on at a time, on all devices together.
        threads: those to choose from; any if empty.
    """
    powers = [1 << power for power in range(cores.bit_length())]
    return tuple(
        (instances, count)
        for instances in powers
        for count in threads or powers
        if instances * each * (count or 1) <= cores
    )


class Candidate(BaseModel):
    """Settings that were tried, and what came of it.

    Attributes:
        rows: of each load that was measured.
        failed: why the model could not be served so; "" if it could.
    """

    model_config = ConfigDict(frozen=True)

    settings: Settings
    rows: tuple[Row, ...] = ()
    failed: str = ""

    def at(self, p99_ms: float) -> Row | None:
        """The load at which it answers the most requests a second with a p99 within that; if there is none, the one
        with the least p99; None if nothing was answered."""
        answered = [row for row in self.rows if row.latency_ms]
        within = [row for row in answered if reaches(row, p99_ms)]
        if within:
            return max(within, key=lambda row: row.requests_per_s)
        return min(answered, key=lambda row: (not row.good, row.latency_ms["p99"]), default=None)

    def score(self, p99_ms: float) -> tuple[int, float]:
        """The more the better: within the limit by throughput; else by how near it comes."""
        row = self.at(p99_ms)
        if row is None:
            return -2, 0.0
        if reaches(row, p99_ms):
            return 1, row.requests_per_s
        return (0 if row.good else -1), -row.latency_ms["p99"]


def reaches(row: Row, p99_ms: float) -> bool:
    """Whether all requests of the load were answered, and 99 % of them within that."""
    return row.good and bool(row.latency_ms) and row.latency_ms["p99"] <= p99_ms


class Budget:
    """Time for all that is measured."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._longest_s = 0.0

    def left_s(self) -> float:
        """Below 0 when it is over."""
        return self._end - self._clock()

    def fits(self, more_s: float = 0.0) -> bool:
        """Whether one more candidate is likely to be done in time, and so much after it."""
        return self._longest_s + more_s <= self.left_s()

    def spent(self, seconds: float) -> None:
        """A candidate took that."""
        self._longest_s = max(self._longest_s, seconds)


def search(
    before: Settings,
    space: Space,
    measure: Callable[[Settings], Sequence[Row]],
    *,
    p99_ms: float,
    budget: Budget,
    keep_s: Callable[[], float] = lambda: 0.0,
) -> tuple[list[Candidate], bool]:
    """Coordinate descent: from `before` all values of one axis, from the best of them all of the next, and again until
    a round finds nothing better or the budget ends. Returns all that was tried, `before` first, and whether it was the
    search that ended.

    Args:
        measure: what comes of serving so; an InferenceError it raises is a candidate's own.
        keep_s: how much of the budget is to be left.

    Raises:
        InferenceError: `before` cannot be served.
    """
    tried: dict[Settings, Candidate] = {}

    def attempt(settings: Settings) -> None:
        left_s = budget.left_s()
        try:
            tried[settings] = Candidate(settings=settings, rows=tuple(measure(settings)))
        except InferenceError as error:
            if not tried:
                raise
            tried[settings] = Candidate(settings=settings, failed=str(error))
        budget.spent(left_s - budget.left_s())

    def best() -> Candidate:
        return max(tried.values(), key=lambda candidate: candidate.score(p99_ms))

    attempt(before)
    improves = True
    while improves:
        start = best().settings
        for axis in space.axes():
            for settings in axis(best().settings):
                if settings in tried:
                    continue
                if not budget.fits(keep_s()):
                    return list(tried.values()), False
                attempt(settings)
        improves = best().settings != start
    return list(tried.values()), True


class Turns(BaseModel):
    """Two settings measured in turns, as neither drift of the machine nor the luck of one measurement tells them apart.

    Attributes:
        best, before: of each round, at the load that either is best at.
    """

    model_config = ConfigDict(frozen=True)

    settings: Settings
    best: tuple[Row, ...]
    before: tuple[Row, ...]

    @property
    def ratio(self) -> float:
        """Of the throughputs: the median of the rounds' own."""
        return median(self._ratios())

    @property
    def spread(self) -> float:
        """How far apart the rounds are, as a part of the ratio: half of the way from the least ratio to the largest,
        by factors, as a pause of the machine multiplies a throughput. 0.1 is 10 %."""
        ratios = self._ratios()
        return sqrt(max(ratios) / min(ratios)) - 1 if min(ratios) and max(ratios) < inf else inf

    def better(self, p99_ms: float) -> bool:
        """Whether the best is within the limit in most rounds, and before was not, or gains more than the spread."""
        if not typically(self.best, p99_ms):
            return False
        return not typically(self.before, p99_ms) or self.ratio - 1 > self.spread

    def _ratios(self) -> list[float]:
        return [
            best.requests_per_s / before.requests_per_s if before.requests_per_s else inf
            for best, before in zip(self.best, self.before, strict=True)
        ]


def typically(rows: Iterable[Row], p99_ms: float) -> bool:
    """Whether more than half of them are within it."""
    reached = [reaches(row, p99_ms) for row in rows]
    return sum(reached) * 2 > len(reached)


def choose(
    tried: Sequence[Candidate],
    compare: Callable[[Candidate, Candidate], Turns],
    *,
    p99_ms: float,
    fits: Callable[[], bool],
) -> tuple[Candidate, Turns | None]:
    """The best of what was tried, and how it did in turns with the first, which is what the model has; None where that
    is the best. One that turns out not to stay within the limit gives way to the next, as long as time is left.

    Args:
        fits: whether there is time for another comparison.
    """
    before = tried[0]
    ranked = sorted(tried, key=lambda candidate: candidate.score(p99_ms), reverse=True)
    turns: Turns | None = None
    best = ranked[0]
    for candidate in ranked:
        row = candidate.at(p99_ms)
        if row is None or not reaches(row, p99_ms) or (turns is not None and not fits()):
            break
        best = candidate
        if candidate is before:
            return before, None
        turns = compare(candidate, before)
        if typically(turns.best, p99_ms):
            break
    return best, turns
