"""Balancing strategies; what each does, and when to use which, is in the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dl_inference_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from dl_inference_core.gateway.balancing import Balancer


@hookimpl
def dl_inference_register_balancers() -> list[type[Balancer]]:
    from dl_inference_balancers.hashing import RendezvousHash
    from dl_inference_balancers.load_aware import LeastRequest, PeakEwma, Prequal
    from dl_inference_balancers.weighted import (
        DynamicWeightedRoundRobin,
        OrcaWeightedRoundRobin,
        WeightedRandom,
        WeightedRoundRobin,
    )

    return [
        WeightedRoundRobin,
        DynamicWeightedRoundRobin,
        OrcaWeightedRoundRobin,
        WeightedRandom,
        LeastRequest,
        PeakEwma,
        Prequal,
        RendezvousHash,
    ]
