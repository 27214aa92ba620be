"""What a node says of its load with an answer: Open Request Cost Aggregation, as gRPC and Envoy have it.

After gRFC A51 (custom backend metrics) and A58 (weighted round robin).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import messages

KEY = "endpoint-load-metrics-bin"
"""The trailer that gRPC's and Envoy's clients look for."""

OWN_KEY = "x-endpoint-load-metrics-bin"
"""The same report once more: gRPC's C core keeps the one under `KEY` to itself."""

_TEXT_KEY = "endpoint-load-metrics"
TRAILERS = frozenset({KEY, OWN_KEY, _TEXT_KEY})
"""The trailers that tell of a node's load: a gateway's client would take them for the gateway's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a node says of itself with an answer: ORCA's `xds.data.orca.v3.OrcaLoadReport`, as far as it is used.

    Attributes:
        utilization: the part of its capacity that is in use, from 0, may be over 1; 0 if it did not say.
        qps: requests per second that it answers.
        eps: errors per second among them.
    """

    utilization: float
    qps: float
    eps: float


def encode(load: Load, cpu: float = 0.0) -> bytes:
    """An OrcaLoadReport, `load.utilization` as the application's.

    Args:
        cpu: the part of the process's CPU (its cores, or its quota) that is in use; 0 says nothing.
    """
    report = messages.OrcaLoadReport(
        application_utilization=load.utilization, cpu_utilization=cpu, rps_fractional=load.qps, eps=load.eps
    )
    return report.SerializeToString()  # type: ignore[no-any-return]


def trailers(report: bytes) -> tuple[tuple[str, bytes], ...]:
    """What goes with an answer to tell of `report`."""
    return (KEY, report), (OWN_KEY, report)


def read(trailers: Iterable[tuple[str, str | bytes]]) -> Load | None:
    """The load that came with an answer; None if there is none, or it is malformed."""
    for key, report in trailers:
        if key in TRAILERS and isinstance(report, bytes):  # ORCA's text form is not
            return decode(report)
    return None


def decode(report: bytes) -> Load | None:
    """The load in an OrcaLoadReport; None if it is malformed. What is no number from 0 counts as not said."""
    try:
        message = messages.parse(messages.OrcaLoadReport, report)
    except BadRequest:
        return None
    return Load(
        utilization=_number(message.application_utilization) or _number(message.cpu_utilization),
        qps=_number(message.rps_fractional),
        eps=_number(message.eps),
    )


def _number(value: float) -> float:
    return value if 0 < value < math.inf else 0.0
