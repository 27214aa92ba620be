"""What a node says of its load with an answer: Open Request Cost Aggregation, as gRPC and Envoy have it."""

from __future__ import annotations

from dataclasses import dataclass


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
