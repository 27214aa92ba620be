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

    Attributes:
        tokens: those that it has, and some over the brim.
        share: the tokens that one `earn` brings.
    """

    __slots__ = ("_in_flight", "_reserve", "share", "tokens")

    def __init__(self, share: float, reserve: int, in_flight: Callable[[], int], *, full: bool) -> None:
        """Args:
        share: tokens that one `earn` brings; if 0, there are never more than the `reserve` that it starts with.
        in_flight: how many attempts are in flight now, that of the request which asks left out.
        full: whether it starts full, else empty.
        """
        self.share = share
        self._reserve = reserve
        self._in_flight = in_flight
        self.tokens = 0.0 if not full else math.inf if share else float(reserve)

    def earn(self) -> None:
        """What a token is a share of has happened: a success, or a request."""
        self.tokens += self.share

    @property
    def left(self) -> bool:
        """Whether there is a token."""
        return self.tokens >= 1

    def take(self) -> bool:
        """Take a token, if there is one."""
        # What is over the brim is spilt only here: nobody looks before, and counting what is in flight takes time.
        if self.tokens > self._reserve:
            self.tokens = min(self.tokens, self._reserve + self._in_flight() + 1)
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Recent:
    """Seconds that the last attempts of a route took, those that succeeded. For use under the route's lock.

    Attributes:
        add: adds one. It takes 0.03 µs: the seconds are looked at only when somebody wants to know.
        least_s: what the quickest took, as of the last `look`; 0 until there are enough.
        typical_s: what half of them took at most; likewise.
        late_s: what 95 % of them took at most; None until there are enough.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._new: deque[float] = deque(maxlen=_KEPT)
        """Those since the last look."""
        self._enough = _FIRST_LOOK_AFTER
        self.add: Callable[[float], None] = self._new.append
        self.least_s = 0.0
        self.typical_s = 0.0
        self.late_s: float | None = None

    def look(self) -> None:
        """Bring the attributes up to date, where enough was added. Takes 15 µs once in 128 times."""
        if len(self._new) < self._enough:
            return
        self._enough = _LOOK_AFTER
        self._last.extend(self._new)
        self._new.clear()
        ordered = sorted(self._last)
        count = len(ordered)
        self.least_s = ordered[0]
        self.typical_s = ordered[count // 2]
        self.late_s = ordered[count * 95 // 100]
