"""The states of a node's health, and the table of their transitions.

=====  ===========  ================================================================================================
state  name         meaning
=====  ===========  ================================================================================================
HE     healthy      Requests are sent to the node. Fewer than `failures` consecutive attempts have failed.
SU     suspect      Requests are sent to the node, but `failures` consecutive attempts have failed. A probe decides.
HO     half-open    The node answers probes, but its requests fail. It gets one trial request at a time, from the time
                    `Health.trial_at` on; one success closes the case.
QU     quarantined  An attempt met UNAVAILABLE. No requests are sent to the node until a probe has ended; other
                    processes are not told.
EJ     ejected      No requests are sent to the node. It is probed until `rise` consecutive probes have passed.
=====  ===========  ================================================================================================

Each cell is the next state and the action. Where an event cannot happen in a state, as a failure limit in ejected, the
cell says what is safe.

event              in HE        in SU        in HO        in QU        in EJ
-----------------  -----------  -----------  -----------  -----------  -----------
succeeded          HE forgive   HE forgive   HE forgive   QU forgive   EJ forgive
failed             HE           SU           HO defer     QU           EJ
failure limit      SU probe     SU probe     HO verify    QU           EJ
unreachable        QU probe     QU probe     HO verify    QU           EJ
probe passed       HE rest      HE rest      HO rest      HE rest      EJ recheck
rise reached       HE rest      HE rest      HO rest      HE rest      HE readmit
only probe passed  HO trial     HO trial     HO trial     HO trial     EJ recheck
probe overruled    HE rest      SU rest      HO rest      HE rest      EJ back off
probe failed       HE recheck   EJ eject     HO recheck   EJ confirm   EJ back off
fall reached       EJ eject     EJ eject     EJ eject     EJ confirm   EJ back off
both failed        EJ eject     EJ eject     EJ eject     EJ confirm   EJ back off
probe refused      EJ eject     EJ eject     EJ eject     EJ confirm   EJ back off
probe stale        HE rest      SU rest      HO rest      QU probe     EJ wait
peer ejected       EJ eject     EJ eject     EJ eject     QU           EJ
peer readmitted    HE           SU           HO           QU hasten    EJ hasten
probe due          HE idle      SU idle      HO idle      QU probe     EJ probe

Slow start is not a state: the share of a node that is back is a function of the time since, in whichever state.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias


class State(enum.Enum):
    """The health of a node, as this process judges it. In the order of the table's columns."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    HALF_OPEN = "half-open"
    QUARANTINED = "quarantined"
    EJECTED = "ejected"

    @property
    def usable(self) -> bool:
        """Whether requests may be sent to the node."""
        return self is not State.QUARANTINED and self is not State.EJECTED


class Reason(enum.Enum):
    """Why requests are not sent to a node."""

    UNREACHABLE = "unreachable"
    UNAVAILABLE = "unavailable"  # so an attempt ended, and no probe has passed since
    NOT_SERVING = "not_serving"
    OUTLIER = "outlier"
    PROBE = "probe"


OUR_JUDGEMENT = frozenset({Reason.UNAVAILABLE, Reason.OUTLIER, Reason.PROBE})
"""The reasons that this process infers. `max_ejected` bounds how many nodes of a route they may concern."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a node's health at one time.

    Attributes:
        reason: why the node is quarantined or ejected; else None.
        detail: the same, for people.
        since: when it was last quarantined or ejected, on the clock of the health.
    """

    state: State = State.HEALTHY
    reason: Reason | None = None
    detail: str = ""
    since: float = -math.inf


class Event(enum.Enum):
    """What may happen to a node."""

    SUCCEEDED = "succeeded"
    """a request was answered"""
    FAILED = "failed"
    """an attempt failed; fewer than `failures` consecutive ones have"""
    FAILURE_LIMIT = "failure limit"
    """an attempt failed, as did at least `failures` consecutive ones"""
    UNREACHABLE = "unreachable"
    """an attempt ended with UNAVAILABLE; in half-open, one that was sent when a trial was due"""
    PROBE_PASSED = "probe passed"
    """a probe passed; fewer than `rise` consecutive ones have"""
    RISE_REACHED = "rise reached"
    """`rise` consecutive probes passed"""
    ONLY_PROBE_PASSED = "only probe passed"
    """a probe passed although the last `failures` attempts failed, and none of them by a timeout"""
    PROBE_OVERRULED = "probe overruled"
    """a probe failed, but a request was answered after the probe had begun"""
    PROBE_FAILED = "probe failed"
    """a probe failed; fewer than `fall` consecutive ones have"""
    FALL_REACHED = "fall reached"
    """`fall` consecutive probes failed"""
    BOTH_FAILED = "both failed"
    """a probe failed, and so did the last `failures` attempts"""
    PROBE_REFUSED = "probe refused"
    """a probe could not reach the node, or the node said NOT_SERVING"""
    PROBE_STALE = "probe stale"
    """a probe ended that had begun before the node was quarantined or ejected: its result may be older than that"""
    PEER_EJECTED = "peer ejected"
    """another process has ejected the node"""
    PEER_READMITTED = "peer readmitted"
    """another process uses the node again"""
    PROBE_DUE = "probe due"
    """the timer of the next probe ran out"""


Action: TypeAlias = Literal[
    "",  # nothing
    "forgive",  # forget failures and backoff
    "probe",  # begin a probe, unless one is under way
    "hasten",  # begin a probe and forget the backoff
    "idle",  # begin a probe, unless requests have been answered lately
    "defer",  # no trial request for a while, longer each time
    "verify",  # defer and probe
    "trial",  # defer and rest
    "rest",  # probe again in an interval
    "recheck",  # probe again soon
    "wait",  # probe again after the pause
    "back off",  # probe again after a longer pause; note what the probe said
    "eject",  # note the reason, forget the counts, and wait
    "confirm",  # note what the probe said, forget the counts, and wait
    "readmit",  # slow start begins; rest
]

Cell: TypeAlias = tuple[State, Action]

HE, SU, HO, QU, EJ = State

# fmt: off
TRANSITIONS: dict[Event, tuple[Cell, Cell, Cell, Cell, Cell]] = {
    #                         in HE             in SU             in HO             in QU             in EJ
    Event.SUCCEEDED:         ((HE, "forgive"),  (HE, "forgive"),  (HE, "forgive"),  (QU, "forgive"),  (EJ, "forgive")),
    Event.FAILED:            ((HE, ""),         (SU, ""),         (HO, "defer"),    (QU, ""),         (EJ, "")),
    Event.FAILURE_LIMIT:     ((SU, "probe"),    (SU, "probe"),    (HO, "verify"),   (QU, ""),         (EJ, "")),
    Event.UNREACHABLE:       ((QU, "probe"),    (QU, "probe"),    (HO, "verify"),   (QU, ""),         (EJ, "")),
    Event.PROBE_PASSED:      ((HE, "rest"),     (HE, "rest"),     (HO, "rest"),     (HE, "rest"),     (EJ, "recheck")),
    Event.RISE_REACHED:      ((HE, "rest"),     (HE, "rest"),     (HO, "rest"),     (HE, "rest"),     (HE, "readmit")),
    Event.ONLY_PROBE_PASSED: ((HO, "trial"),    (HO, "trial"),    (HO, "trial"),    (HO, "trial"),    (EJ, "recheck")),
    Event.PROBE_OVERRULED:   ((HE, "rest"),     (SU, "rest"),     (HO, "rest"),     (HE, "rest"),     (EJ, "back off")),
    Event.PROBE_FAILED:      ((HE, "recheck"),  (EJ, "eject"),    (HO, "recheck"),  (EJ, "confirm"),  (EJ, "back off")),
    Event.FALL_REACHED:      ((EJ, "eject"),    (EJ, "eject"),    (EJ, "eject"),    (EJ, "confirm"),  (EJ, "back off")),
    Event.BOTH_FAILED:       ((EJ, "eject"),    (EJ, "eject"),    (EJ, "eject"),    (EJ, "confirm"),  (EJ, "back off")),
    Event.PROBE_REFUSED:     ((EJ, "eject"),    (EJ, "eject"),    (EJ, "eject"),    (EJ, "confirm"),  (EJ, "back off")),
    Event.PROBE_STALE:       ((HE, "rest"),     (SU, "rest"),     (HO, "rest"),     (QU, "probe"),    (EJ, "wait")),
    Event.PEER_EJECTED:      ((EJ, "eject"),    (EJ, "eject"),    (EJ, "eject"),    (QU, ""),         (EJ, "")),
    Event.PEER_READMITTED:   ((HE, ""),         (SU, ""),         (HO, ""),         (QU, "hasten"),   (EJ, "hasten")),
    Event.PROBE_DUE:         ((HE, "idle"),     (SU, "idle"),     (HO, "idle"),     (QU, "probe"),    (EJ, "probe")),
}
# fmt: on


def transition(state: State, event: Event) -> Cell:
    """The state after `event` in `state`, and the action that goes with it."""
    return TRANSITIONS[event][_COLUMNS[state]]


_COLUMNS = {state: column for column, state in enumerate(State)}
