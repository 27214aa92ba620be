"""Which nodes may be chosen: judged from what requests meet, from probes, and from what other processes say.

- A node that probes cannot reach is left out, and so is one that says NOT_SERVING: neither is a matter of chance.
- An attempt that ends with UNAVAILABLE has met a node that is gone, or one that only says so: a model is not loaded, a
  queue is full. It is left out at once, as one that we eject, and probed at once. If the probe passes it is back,
  nobody is told, and the attempt counts as one that failed.
- One whose attempts time out or fail, `failures` of them running, is suspect. It is ejected only if a probe fails too:
  nodes that are merely overloaded answer those. If none of these attempts timed out and the probe passes, its requests
  fail by themselves: it then gets one at a time, at growing pauses, until one succeeds.
- A node that has answered no request for about `interval_ms` is probed. One that answers them is probed in every fifth
  interval only, to hear whether it says NOT_SERVING: for all else a request's answer says more than a probe's.
- `fall` probes running that fail eject a node, and each follows at once on one that timed out: a node that hangs is
  noticed within `interval_ms` and `fall` times `timeout_ms`. The first probe of a new node counts alone.
- Whoever is left out is probed until `rise` probes running have passed: after 0.1 s, then ever later, up to every
  0.25 s. A node which is left out again and again and has answered no request is so longer each time, up to 1 s.
"""

from __future__ import annotations

import asyncio
import enum
import math
import random
import time
from collections.abc import Callable

from dl_inference_core.config import HealthConfig
from dl_inference_core.errors import AttemptTimedOut, InferenceError, NodeUnreachable
from dl_inference_core.gateway.probing import Prober, Verdict

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 0.25
_LONGEST_HOLD_S = 1.0
_LEAST_PAUSE_S = 0.02
_FIRST_SHARE = 0.1
_BUSY_INTERVALS = 5


class Reason(enum.Enum):
    """Why a node is left out."""

    UNREACHABLE = "unreachable"
    UNAVAILABLE = "unavailable"  # so an attempt ended, and no probe has passed since
    NOT_SERVING = "not_serving"
    OUTLIER = "outlier"
    PROBE = "probe"


EJECTED = frozenset({Reason.UNAVAILABLE, Reason.OUTLIER, Reason.PROBE})
"""Our own judgement, of which `max_ejected` bounds how many nodes it may concern."""

_SAID = {
    Verdict.UNREACHABLE: (Reason.UNREACHABLE, "a probe could not reach it"),
    Verdict.NOT_SERVING: (Reason.NOT_SERVING, "it says that it takes no requests"),
}
"""What needs no second word."""


class Health:
    """What is known of one endpoint. Event loop only.

    Attributes:
        usable: whether it may be chosen.
        reason: why it may not be.
        detail: the same, for people.
        since: when it was left out, on the clock of `time.monotonic`.
        on_trial: it fails requests but no probes, and may have one at a time, from `trial_at` on.
    """

    __slots__ = (
        "_back_at",
        "_busy_until",
        "_changed",
        "_config",
        "_doubted",
        "_failures",
        "_heard",
        "_hold_s",
        "_misses",
        "_moved",
        "_passes",
        "_pause_s",
        "_prober",
        "_probing",
        "_returned",
        "_timed_out",
        "_timer",
        "_troubled",
        "_wait_s",
        "detail",
        "on_trial",
        "reason",
        "since",
        "trial_at",
        "usable",
    )

    def __init__(
        self,
        prober: Prober,
        config: HealthConfig,
        *,
        changed: Callable[[], None],
        returned: Callable[[], None],
        moved: Callable[[bool], None],
    ) -> None:
        """Args:
        changed: called when another answer than before may be right to whether the endpoint may be chosen.
        returned: called after that when it may be chosen again, or has passed its trial.
        moved: called after that when `usable` is another, and not only until the probe that is under way has ended;
            with whether this process itself found out.
        """
        self._prober = prober
        self._config = config
        self._changed = changed
        self._returned = returned
        self._moved = moved
        self._failures = 0
        self._timed_out = False
        self._troubled = False
        self._doubted = False
        self._misses = config.fall - 1
        self._passes = 0
        self._heard = -math.inf
        self._back_at = -math.inf
        self._wait_s = 0.0
        self._busy_until = -math.inf
        self._pause_s = self._hold_s = _FIRST_PAUSE_S
        self._timer: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None
        self.usable = True
        self.reason: Reason | None = None
        self.detail = ""
        self.since = -math.inf
        self.on_trial = False
        self.trial_at = -math.inf

    # What requests meet

    def succeeded(self) -> None:
        """A request was answered."""
        self._heard = time.monotonic()
        if self._troubled:
            self._forgive()

    def failed(self, error: InferenceError) -> None:
        """An attempt ended by the node's fault."""
        self._troubled = True
        if not self.usable:  # it was under way when another failed, and says the same
            return
        self._failures += 1
        self._timed_out |= isinstance(error, AttemptTimedOut)
        doubtful = isinstance(error, NodeUnreachable)
        if self.on_trial:
            doubtful = doubtful and time.monotonic() >= self.trial_at  # else it may be one of many, as all are on trial
            self._try_later()
        elif doubtful:
            self._doubted = True
            self._out(Reason.UNAVAILABLE, str(error))
        if doubtful or self._suspect:
            self._probe()

    def share(self, now: float) -> float:
        """The part of its requests that it may have, while it is usable and not on trial."""
        age, whole = now - self._back_at, self._config.slow_start_s
        return 1.0 if age >= whole else _FIRST_SHARE + (1 - _FIRST_SHARE) * age / whole

    def _forgive(self) -> None:
        self._troubled = self._timed_out = False
        self._failures = 0
        self._hold_s = _FIRST_PAUSE_S
        if self.on_trial:
            self.on_trial = False
            self._changed()
            self._returned()

    @property
    def _suspect(self) -> bool:
        return self._failures >= self._config.failures

    def _try_later(self) -> None:
        self.trial_at = time.monotonic() + self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)

    # What others say

    def learn_left_out(self, reason: Reason, detail: str) -> None:
        """Another process has left it out. So does this one, which asks for itself from now on."""
        if self.usable:
            self._leave_out(reason, detail, own=False)

    def learn_returned(self) -> None:
        """Another process may use it again. This one asks at once, rather than at the end of a pause."""
        if not self.usable:
            self._hold_s = _FIRST_PAUSE_S
            self._probe()

    # Probes

    def start(self) -> None:
        """Probe for the first time, and from now on whenever it is time."""
        self._probe()

    async def settled(self) -> None:
        """Wait for the probe that is under way, if one is."""
        if self._probing is not None:
            await asyncio.wait((self._probing,))

    async def close(self) -> None:
        """Stop probing."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def _probe(self) -> None:
        """Begin a probe, unless one is under way."""
        if self._probing is None:
            self._cancel_timer()
            self._probing = asyncio.ensure_future(self._ask())

    def _probe_in(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._due)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        now = time.monotonic()
        if self.usable and (left := min(self._heard, self._busy_until) + self._wait_s - now) > 0:
            self._probe_in(left)
        else:
            self._probe()

    async def _ask(self) -> None:
        start = time.monotonic()
        try:
            verdict = await self._prober.ask()
        finally:
            self._probing = None
        if self.since > start:  # left out meanwhile; the answer may be older than that
            if self._doubted:
                self._probe()
            elif self._timer is None:
                self._probe_in(_jittered(self._pause_s))
        elif verdict is Verdict.WELL:
            self._passed()
        elif self.usable:
            self._missed(verdict, start)
        else:
            self._missed_again(verdict, start)

    def _passed(self) -> None:
        self._misses = 0
        if self.usable or self._doubted:
            self._clear()
        else:
            self._passes += 1
            if self._passes < self._config.rise:
                self._probe_in(_jittered(_FIRST_PAUSE_S))
                return
            self._return()
        self._rest()

    def _clear(self) -> None:
        """Whatever its attempts came to, it is there and answers."""
        if self._doubted:
            self._doubted = False
            self._in()
        if self._suspect:
            if not self._timed_out:
                self.on_trial = True
                self._try_later()
                self._changed()
            self._failures = 0
            self._timed_out = False

    def _rest(self) -> None:
        """Probe again in an interval's time, unless a request is answered meanwhile."""
        if self._config.interval_ms:
            # Never later than the interval: what it bounds is how long a node may hang unnoticed.
            self._wait_s = self._config.interval_ms / 1000 * random.uniform(0.75, 0.95)  # noqa: S311 - jitter
            self._busy_until = time.monotonic() + (_BUSY_INTERVALS - 1) * self._wait_s
            self._probe_in(self._wait_s)

    def _missed(self, verdict: Verdict, start: float) -> None:
        if (said := _SAID.get(verdict)) is not None:
            self._leave_out(*said)
        elif self._heard > start:
            self._misses = 0
            self._rest()
        elif self._suspect:
            self._leave_out(Reason.OUTLIER, f"{self._failures} attempts running failed, and a probe too")
        else:
            self._misses += 1
            if self._misses >= self._config.fall:
                self._leave_out(Reason.PROBE, "it does not answer probes")
            else:
                self._probe_in(max(_jittered(_FIRST_PAUSE_S) - (time.monotonic() - start), 0))

    def _missed_again(self, verdict: Verdict, start: float) -> None:
        if self._doubted and verdict is Verdict.FAILED and self._heard > start:
            self._clear()
            self._rest()
            return
        self._passes = 0
        if (said := _SAID.get(verdict)) is not None:
            self._restate(*said)
        if self._doubted:
            self._settle(own=True)
        else:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        # From start to start: what waited for its answer has waited already.
        self._probe_in(max(_jittered(self._pause_s) - (time.monotonic() - start), _LEAST_PAUSE_S))

    # In and out

    def _leave_out(self, reason: Reason, detail: str, *, own: bool = True) -> None:
        self._out(reason, detail)
        self._settle(own)
        if self._probing is None:
            self._probe_in(_jittered(self._pause_s))
        else:
            self._cancel_timer()

    def _out(self, reason: Reason, detail: str) -> None:
        self.usable = self.on_trial = False
        self.reason = reason
        self.detail = detail
        self.since = time.monotonic()
        self._changed()

    def _settle(self, own: bool) -> None:
        """It is left out until probes have passed."""
        self._doubted = self._timed_out = False
        self._troubled = True
        self._failures = self._misses = self._passes = 0
        self._prober.forget()
        self._pause_s = self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)
        self._moved(own)

    def _restate(self, reason: Reason, detail: str) -> None:
        if self.reason is not reason:
            if not (self._doubted and reason is Reason.UNREACHABLE):  # what the attempt met says more
                self.detail = detail
            self.reason = reason
            self._changed()

    def _in(self) -> None:
        self.usable = True
        self.reason = None
        self.detail = ""
        self._changed()

    def _return(self) -> None:
        self._failures = 0
        self._timed_out = False
        self._back_at = time.monotonic()
        self._in()
        self._returned()
        self._moved(True)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1)  # noqa: S311 - jitter
