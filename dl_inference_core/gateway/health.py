"""The health of a node: judged from what requests meet, from probes, and from what other processes say.

The states and their transitions are the table in `dl_inference_core.gateway.health_states`. The policy in words:

- A node that probes cannot reach is ejected, and so is one that says NOT_SERVING: neither is a matter of chance.
- An attempt that ends with UNAVAILABLE has met a node that is gone, or one that only says so: a model is not loaded, a
  queue is full. The node is quarantined and probed at once. If the probe passes, the node is healthy again, other
  processes are not told, and the attempt counts as one that failed.
- After `failures` consecutive attempts that timed out or failed, a node is suspect. It is ejected only if a probe fails
  too: nodes that are merely overloaded answer probes. If none of these attempts timed out and the probe passes, its
  requests fail by themselves: half-open, the node gets one at a time, at growing pauses, until one succeeds.
- A node that has answered no request for about `interval_ms` is probed. One that answers requests is probed in every
  fifth interval only, to hear whether it says NOT_SERVING: for all else a request's answer says more than a probe's.
- `fall` consecutive probes that fail eject a node, and each follows at once on one that timed out: a node that hangs is
  noticed within `interval_ms` and `fall` times `timeout_ms`. The first probe of a new node counts alone.
- An ejected node is probed until `rise` consecutive probes have passed: after 0.1 s, then ever later, up to every
  0.25 s. A node that is ejected again and again and has answered no request waits longer each time, up to 1 s.

Threads and locks: any thread may call any method, and several routes share one `Health`. The lock order is

    the lock of a route (`Forwarder.lock`) → the lock of a node's health (here) → the locks of timers and event loops.

A caller may hold the lock of one route. Reading takes no lock. The callbacks of `Health` run without its lock, on the
thread that caused the change; because the caller may hold the lock of a route, they must not wait for the lock of any.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol as Interface
from typing import assert_never

from dl_inference_core.config import HealthConfig
from dl_inference_core.errors import AttemptTimedOut, InferenceError, NodeUnreachable
from dl_inference_core.gateway.clock import Clock
from dl_inference_core.gateway.health_states import Action, Event, Reason, Standing, State, transition
from dl_inference_core.gateway.probing import Verdict
from dl_inference_core.transport import Timer

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 0.25
"""Between probes of an ejected node. With the longest, a node is used again well within 1.5 s of when it listens."""
_LONGEST_HOLD_S = 1.0
"""Before the first probe of a node that is ejected again and again, and between trial requests. It bounds what a node
that has recovered waits for."""
_LEAST_PAUSE_S = 0.02
"""Between the end of a probe and the next one: probes that take as long as the pause do not follow without a break."""
_FIRST_SHARE = 0.1
"""With which slow start begins, as the config documents."""
_BUSY_INTERVALS = 5
"""A probe takes some 0.3 ms of CPU, and of a node that answers requests it tells little."""

_SAID = {
    Verdict.UNREACHABLE: (Reason.UNREACHABLE, "a probe could not reach it"),
    Verdict.NOT_SERVING: (Reason.NOT_SERVING, "it says that it takes no requests"),
}
"""The results of a probe that need no second one."""


class Probes(Interface):
    """The probes of one node, in the background. Any thread."""

    def begin(self, ended: Callable[[Verdict, float], None]) -> None:
        """Begin a probe. `ended` is told its result and when it began, on the clock of the health, and never before
        this method has returned."""

    def forget(self) -> None:
        """The node may come back as another kind of server."""


_Why = tuple[Reason, str]


class Health:
    """The health of one endpoint. Any thread.

    Attributes:
        answered_at: when a request was last answered; several threads write it, and the last one wins.
        forgivable: whether `succeeded` is to be called when a request is answered. Most requests find it False, and
            write `answered_at` instead, which takes 0.1 µs less.
        standing: its state, as one reference to what never changes.
        trial_at: from when on a half-open node may get its next trial request.
    """

    __slots__ = (
        "_back_at",
        "_busy_until",
        "_call_later",
        "_changed",
        "_config",
        "_failed_probes",
        "_failures",
        "_hold_s",
        "_lock",
        "_moved",
        "_now",
        "_passed_probes",
        "_pause_s",
        "_probes",
        "_probing",
        "_returned",
        "_ticket",
        "_timed_out",
        "_timer",
        "_wait_s",
        "answered_at",
        "forgivable",
        "standing",
        "trial_at",
    )

    def __init__(
        self,
        probes: Probes,
        config: HealthConfig,
        clock: Clock,
        *,
        changed: Callable[[], None],
        returned: Callable[[], None],
        moved: Callable[[bool], None],
    ) -> None:
        """Args:
        changed: called when another answer than before may be right to whether the endpoint may be chosen.
        returned: called after that when the node is healthy again after it was ejected or half-open.
        moved: called after that when the node was ejected or is healthy again after it was ejected; with whether this
            process itself found out.
        """
        self._probes = probes
        self._config = config
        self._now = clock.now
        self._call_later = clock.call_later
        self._changed = changed
        self._returned = returned
        self._moved = moved
        self._lock = threading.Lock()
        self.standing = Standing()
        self.trial_at = -math.inf
        self.forgivable = False
        self._failures = 0
        """Consecutive attempts that failed."""
        self._timed_out = False
        """Whether one of them timed out."""
        self._failed_probes = config.fall - 1
        """Consecutive; the first probe of a new node counts alone."""
        self._passed_probes = 0
        """Consecutive."""
        self.answered_at = -math.inf
        self._back_at = -math.inf
        """When the node was last healthy again after an ejection."""
        self._wait_s = 0.0
        """The interval between probes, with jitter."""
        self._busy_until = -math.inf
        """Until then a node that answers requests is not probed."""
        self._pause_s = self._hold_s = _FIRST_PAUSE_S
        """Before the next probe of an ejected node; and at first, after the next ejection or failed trial."""
        self._probing = False
        """Whether a probe is under way; else `_timer` may wait for the next one."""
        self._timer: Timer | None = None
        self._ticket = 0
        """Of the timer that counts: an earlier one may have run out while it was cancelled."""

    @property
    def usable(self) -> bool:
        """Whether requests may be sent to the node."""
        return self.standing.state.usable

    @property
    def on_trial(self) -> bool:
        """Whether it is half-open."""
        return self.standing.state is State.HALF_OPEN

    @property
    def reason(self) -> Reason | None:
        """As `Standing.reason`."""
        return self.standing.reason

    @property
    def detail(self) -> str:
        """As `Standing.detail`."""
        return self.standing.detail

    def share(self, now: float) -> float:
        """The part of its requests that the node may have in slow start, while it is usable and not half-open."""
        age, whole = now - self._back_at, self._config.slow_start_s
        return 1.0 if age >= whole else _FIRST_SHARE + (1 - _FIRST_SHARE) * age / whole

    # What happens to a node

    def start(self) -> None:
        """Probe for the first time, and from now on whenever a probe is due."""
        with self._lock:
            self._begin_probe()

    def close(self) -> None:
        """Begin no probe any more by a timer."""
        with self._lock:
            self._cancel_timer()

    def succeeded(self) -> None:
        """A request was answered."""
        self.answered_at = self._now()
        if self.forgivable:
            with self._lock:
                change = self._step(Event.SUCCEEDED)
            self._tell(*change)

    def failed(self, error: InferenceError) -> None:
        """An attempt ended by the node's fault."""
        with self._lock:
            change = self._step(self._count_failure(error), (Reason.UNAVAILABLE, str(error)))
        self._tell(*change)

    def probed(self, verdict: Verdict, began: float) -> None:
        """The probe that was under way ended."""
        with self._lock:
            self._probing = False
            change = self._step(self._count_probe(verdict, began), _SAID.get(verdict), began)
        self._tell(*change)

    def learn_left_out(self, reason: Reason, detail: str) -> None:
        """Another process has ejected it. So does this one, which probes it itself from now on."""
        with self._lock:
            change = self._step(Event.PEER_EJECTED, (reason, detail))
        self._tell(*change)

    def learn_returned(self) -> None:
        """Another process uses it again. This one probes it at once, rather than at the end of a pause."""
        with self._lock:
            self._step(Event.PEER_READMITTED)

    def _timer_ended(self, ticket: int) -> None:
        with self._lock:
            if ticket == self._ticket:
                self._timer = None
                self._step(Event.PROBE_DUE)

    # Which event it is: under the lock

    def _count_failure(self, error: InferenceError) -> Event:
        if not self.usable:  # it was under way when another failed, and says the same
            return Event.FAILED
        self.forgivable = True
        self._failures += 1
        self._timed_out |= isinstance(error, AttemptTimedOut)
        # An attempt that is not a trial may be one of many: where all nodes are half-open, each gets requests.
        if isinstance(error, NodeUnreachable) and not (self.on_trial and self._now() < self.trial_at):
            return Event.UNREACHABLE
        return Event.FAILURE_LIMIT if self._failures >= self._config.failures else Event.FAILED

    def _count_probe(self, verdict: Verdict, began: float) -> Event:
        suspicious = self._failures >= self._config.failures
        if self.standing.since > began:
            return Event.PROBE_STALE
        if verdict is Verdict.WELL:
            self._failed_probes = 0
            self._passed_probes += 1
            if suspicious:
                event = Event.PROBE_PASSED if self._timed_out else Event.ONLY_PROBE_PASSED
                self._forget_failures()
                return event
            return Event.RISE_REACHED if self._passed_probes >= self._config.rise else Event.PROBE_PASSED
        self._passed_probes = 0
        if verdict in _SAID:
            return Event.PROBE_REFUSED
        if self.answered_at > began:
            self._failed_probes = 0
            return Event.PROBE_OVERRULED
        if suspicious:
            return Event.BOTH_FAILED
        self._failed_probes += 1
        return Event.FALL_REACHED if self._failed_probes >= self._config.fall else Event.PROBE_FAILED

    def _forget_failures(self) -> None:
        self._failures = 0
        self._timed_out = False

    # What follows

    def _step(self, event: Event, why: _Why | None = None, began: float = 0.0) -> tuple[Standing, Standing, Event]:
        """Go where the table says; returns what `_tell` takes. Under the lock.

        Args:
            why: of an event that has a reason.
            began: of the probe that has ended.
        """
        before = self.standing
        state, action = transition(before.state, event)
        self._note(state, event, why)
        self._act(action, began)
        return before, self.standing, event

    def _tell(self, before: Standing, after: Standing, event: Event) -> None:
        """Call the callbacks that a step calls for. Without the lock."""
        if after is before:
            return
        was, now = before.state, after.state
        half_open = State.HALF_OPEN
        if was.usable != now.usable or (was is half_open) != (now is half_open) or before.reason is not after.reason:
            self._changed()
        if now is State.HEALTHY and was in (State.EJECTED, half_open):
            self._returned()
        if (was is State.EJECTED) != (now is State.EJECTED):
            self._moved(event is not Event.PEER_EJECTED)

    def _note(self, state: State, event: Event, why: _Why | None) -> None:
        """Publish the standing in `state`."""
        standing = self.standing
        if state.usable:
            if state is not standing.state:
                self.standing = Standing(state, since=standing.since)
        elif standing.state.usable:
            reason, detail = why or self._inferred(event)
            self.standing = Standing(state, reason, detail, self._now())
        elif event is Event.PROBE_REFUSED and why is not None and why[0] is not standing.reason:
            # What the attempt met says more of a node in quarantine.
            known = standing.state is State.QUARANTINED and why[0] is Reason.UNREACHABLE
            self.standing = replace(standing, state=state, reason=why[0], detail=standing.detail if known else why[1])
        elif state is not standing.state:
            self.standing = replace(standing, state=state)

    def _inferred(self, event: Event) -> _Why:
        if event is Event.FALL_REACHED:
            return Reason.PROBE, "it does not answer probes"
        return Reason.OUTLIER, f"{self._failures} attempts running failed, and a probe too"

    def _act(self, action: Action, began: float) -> None:
        match action:
            case "":
                pass
            case "forgive":
                self._forgive()
            case "probe":
                self._begin_probe()
            case "hasten":
                self._hold_s = _FIRST_PAUSE_S
                self._begin_probe()
            case "idle":
                self._begin_probe_if_idle()
            case "defer":
                self._defer()
            case "verify":
                self._defer()
                self._begin_probe()
            case "trial":
                self._defer()
                self._rest()
            case "rest":
                self._rest()
            case "recheck":
                self._probe_after(began, _FIRST_PAUSE_S, 0)
            case "wait":
                self._wait()
            case "back off":
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                self._probe_after(began, self._pause_s, _LEAST_PAUSE_S)
            case "eject":
                self._settle()
                self._wait()
            case "confirm":
                self._settle()
                self._probe_after(began, self._pause_s, _LEAST_PAUSE_S)
            case "readmit":
                self._back_at = self._now()
                self._rest()
            case _:
                assert_never(action)

    def _forgive(self) -> None:
        self.forgivable = False
        self._forget_failures()
        self._hold_s = _FIRST_PAUSE_S

    def _defer(self) -> None:
        """Let a half-open node wait for its next trial request, longer each time."""
        self.trial_at = self._now() + self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)

    def _settle(self) -> None:
        """Start afresh in ejected."""
        self.forgivable = True
        self._forget_failures()
        self._failed_probes = self._passed_probes = 0
        self._probes.forget()
        self._pause_s = self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)

    # Probes and their timer: under the lock

    def _rest(self) -> None:
        """Probe again in an interval's time, unless a request is answered meanwhile."""
        if self._config.interval_ms:
            # Never later than the interval: what it bounds is how long a node may hang unnoticed.
            self._wait_s = self._config.interval_ms / 1000 * random.uniform(0.75, 0.95)  # noqa: S311 - jitter
            self._busy_until = self._now() + (_BUSY_INTERVALS - 1) * self._wait_s
            self._probe_in(self._wait_s)

    def _wait(self) -> None:
        """Probe after the pause of an ejected node; a probe that is under way will end in the same."""
        if self._probing:
            self._cancel_timer()
        else:
            self._probe_in(_jittered(self._pause_s))

    def _begin_probe_if_idle(self) -> None:
        """Begin a probe, unless a request was answered lately and the last probe is not too old."""
        left = min(self.answered_at, self._busy_until) + self._wait_s - self._now()
        if left > 0:
            self._probe_in(left)
        else:
            self._begin_probe()

    def _begin_probe(self) -> None:
        """Begin a probe, unless one is under way."""
        if not self._probing:
            self._cancel_timer()
            self._probing = True
            self._probes.begin(self.probed)

    def _probe_after(self, began: float, pause_s: float, least_s: float) -> None:
        """Probe `pause_s` after the last probe began: what waited for its result has waited already."""
        self._probe_in(max(_jittered(pause_s) - (self._now() - began), least_s))

    def _probe_in(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._call_later(seconds, partial(self._timer_ended, self._ticket))

    def _cancel_timer(self) -> None:
        self._ticket += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1)  # noqa: S311 - jitter
