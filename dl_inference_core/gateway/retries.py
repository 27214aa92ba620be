"""Whether a route may make one more attempt, and when: budgets, and how long its recent attempts took."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

_KEPT = 256
_FIRST_LOOK_AFTER, _LOOK_AFTER = 32, 128


class Budget:
    """A bucket of tokens, each worth one attempt beyond the first; earned by the share of one at a time.

    It holds at most `reserve` and one for each request that is in flight when one is taken: however many fail at once,
    each of them may be tried again, but of those that come afterwards only as many as `share` pays for. So a node that
    dies costs no request, and an outage of all of them is not made worse.
    """

    __slots__ = ("_in_flight", "_reserve", "_share", "_tokens")

    def __init__(self, share: float, reserve: int, in_flight: Callable[[], int], *, full: bool) -> None:
        """Args:
        share: tokens that one `earn` brings; if 0, there are never more than the `reserve` that it starts with.
        in_flight: how many attempts are in flight now, that of the request which asks left out.
        full: whether it starts full, else empty.
        """
        self._share = share
        self._reserve = reserve
        self._in_flight = in_flight
        self._tokens = 0.0 if not full else math.inf if share else float(reserve)

    def earn(self) -> None:
        """What a token is a share of has happened: a success, or a request."""
        self._tokens += self._share

    @property
    def left(self) -> bool:
        """Whether there is a token."""
        return self._tokens >= 1

    def take(self) -> bool:
        """Take a token, if there is one."""
        # What is over the brim is spilt only here: nobody looks before, and counting what is in flight takes time.
        if self._tokens > self._reserve:
            self._tokens = min(self._tokens, self._reserve + self._in_flight() + 1)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Recent:
    """Seconds that the last attempts of a route took, those that succeeded.

    Attributes:
        least_s: what the quickest took; 0 until there are enough.
        typical_s: what half of them took at most; likewise.
        late_s: what 95 % of them took at most; None until there are enough.
    """

    __slots__ = ("_last", "_left", "late_s", "least_s", "typical_s")

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._left = _FIRST_LOOK_AFTER
        self.least_s = 0.0
        self.typical_s = 0.0
        self.late_s: float | None = None

    def add(self, seconds: float) -> None:
        """Takes 0.1 µs, and 10 µs once in 128 times."""
        self._last.append(seconds)
        self._left -= 1
        if not self._left:
            self._left = _LOOK_AFTER
            ordered = sorted(self._last)
            count = len(ordered)
            self.least_s = ordered[0]
            self.typical_s = ordered[count // 2]
            self.late_s = ordered[count * 95 // 100]
