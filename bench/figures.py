"""What a system takes at one load: every round of it, and their medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Figure = Literal["cpu_us_per_request", "requests_per_s", "p50_ms", "p99_ms", "memory_mb"]

COLUMNS = (
    *("CPU µs/request", "least to most", "requests/s", "least to most", "p50 ms", "least to most", "p99 ms"),
    *("memory MB", "load generator's CPU µs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round.

    Attributes:
        cpu_us_per_request: of the server.
        client_cpu_us: of the load generator, per request; None where it does not say, or there is none.
    """

    cpu_us_per_request: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    client_cpu_us: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One system at one load.

    Attributes:
        rounds: all that were measured, in their order; none is left out.
        memory_mb: resident at the end.
    """

    rounds: Sequence[Sample]
    memory_mb: float

    @property
    def cpu_us_per_request(self) -> float:
        """The median of the rounds, as all others are."""
        return self._median("cpu_us_per_request")

    @property
    def requests_per_s(self) -> float:
        return self._median("requests_per_s")

    @property
    def p50_ms(self) -> float:
        return self._median("p50_ms")

    @property
    def p99_ms(self) -> float:
        return self._median("p99_ms")

    @property
    def client_cpu_us(self) -> float | None:
        known = [each.client_cpu_us for each in self.rounds if each.client_cpu_us is not None]
        return statistics.median(known) if known else None

    def each(self, figure: Figure) -> list[float]:
        """The figure of each round. Memory is looked at once."""
        if figure == "memory_mb":
            return [self.memory_mb] * len(self.rounds)
        return [getattr(sample, figure) for sample in self.rounds]

    def values(self) -> dict[str, Any]:
        """For JSON: the medians, and the rounds."""
        return {
            "cpu_us_per_request": self.cpu_us_per_request,
            "requests_per_s": self.requests_per_s,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "memory_mb": self.memory_mb,
            "rounds": [asdict(sample) for sample in self.rounds],
        }

    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS` has them."""
        client = self.client_cpu_us
        return (
            _rounded(self.cpu_us_per_request),
            self._range("cpu_us_per_request"),
            _rounded(self.requests_per_s),
            self._range("requests_per_s"),
            f"{self.p50_ms:.2f}",
            self._range("p50_ms"),
            f"{self.p99_ms:.1f}",
            f"{self.memory_mb:.0f}",
            "" if client is None else _rounded(client),
        )

    def _median(self, figure: Figure) -> float:
        return statistics.median(self.each(figure))

    def _range(self, figure: Figure) -> str:
        shown = _milliseconds if figure.endswith("ms") else _rounded
        return f"{shown(min(self.each(figure)))} to {shown(max(self.each(figure)))}"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}"
