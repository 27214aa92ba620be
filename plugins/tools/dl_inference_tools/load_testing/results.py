"""What load there was and what came of it: figures, JSON, and the ratio to an earlier run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hdrh.histogram import HdrHistogram
from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from dl_inference_core.errors import ConfigError

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_LONGEST_US, _DIGITS = 3_600_000_000, 3
_BEHIND_MS, _BEHIND_SHARE, _BUSY = 1.0, 0.1, 0.9


def histogram() -> HdrHistogram:
    """An empty one for times in µs: from one to an hour, to three digits."""
    return HdrHistogram(1, _LONGEST_US, _DIGITS)


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Load(_Kept):
    """A closed loop, where each answer is followed by the next request, or an open one, where requests are due at a
    rate whatever becomes of the others.

    Attributes:
        in_flight: of a closed loop.
        rate: of an open loop, in requests per second.
        poisson: whether they are due at random, as from many users; else evenly.
        requests: how many, in place of `duration_s`.
        warm_up_s: the same load before, which counts nowhere.
    """

    in_flight: int | None = None
    rate: float | None = None
    poisson: bool = False
    duration_s: float = 10.0
    requests: int | None = None
    warm_up_s: float = 1.0

    @property
    def name(self) -> str:
        """What it is in a table."""
        if self.rate is None:
            return f"{self.in_flight} in flight"
        return f"{self.rate:,g}/s{' Poisson' if self.poisson else ''}"

    def part(self, index: int, of: int) -> Load:
        """What the process with that index does of it."""

        def share(whole: int | None) -> int | None:
            return None if whole is None else whole // of + (index < whole % of)

        rate = None if self.rate is None else self.rate / of
        return self.model_copy(
            update={"in_flight": share(self.in_flight), "rate": rate, "requests": share(self.requests)}
        )


class Row(_Kept):
    """What came of one load; of one process, or of all.

    Attributes:
        seconds: how long it was measured.
        answered: good answers that came in that time, whenever they had been asked for.
        failed: how many of the requests that were due in that time failed, by gRPC's code, or "FAILURE" where a
            SeldonMessage says so.
        said: by the same, the message of one of them.
        unsent: were due in that time, but not sent.
        busy: the part of the time that the event loop of the busiest process took a CPU.
        latency: a histogram of the others that were due in that time, in µs: HdrHistogram's V2 encoding. In a closed
            loop from sending to the answer, in an open one from when the request was due.
        behind: of an open loop, how long after it was due a request was sent; likewise.
    """

    load: Load
    seconds: float
    answered: int
    failed: dict[str, int]
    said: dict[str, str]
    unsent: int
    busy: float
    latency: str
    behind: str

    @classmethod
    def merged(cls, load: Load, parts: Sequence[Row]) -> Row:
        """Of all the processes that `parts` are of."""
        failed: Counter[str] = Counter()
        for part in parts:
            failed.update(part.failed)
        return cls(
            load=load,
            seconds=max(part.seconds for part in parts),
            answered=sum(part.answered for part in parts),
            failed=dict(failed),
            said={code: message for part in parts for code, message in part.said.items()},
            unsent=sum(part.unsent for part in parts),
            busy=max(part.busy for part in parts),
            latency=_sum(part.latency for part in parts),
            behind=_sum(part.behind for part in parts),
        )

    @computed_field  # type: ignore[prop-decorator] # as pydantic's documentation has it
    @property
    def requests_per_s(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def latency_ms(self) -> dict[str, float]:
        """ "mean", "p50" and so on, "max"; empty where no request was answered."""
        return _figures(self.latency)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def behind_ms(self) -> dict[str, float]:
        """Likewise; empty of a closed loop."""
        return _figures(self.behind)

    @property
    def good(self) -> bool:
        """Whether every request was sent and answered."""
        return not self.failed and not self.unsent

    def notes(self) -> list[str]:
        """What the figures do not say: failures, and whether the client rather than the server was the limit."""
        notes = [f"{count:,} failed: {code}: {self.said.get(code, '')}" for code, count in sorted(self.failed.items())]
        if self.unsent:
            notes.append(
                f"the client was the limit: {self.unsent:,} requests were due but not sent; with them latencies would "
                "be higher still"
            )
        behind, latency = self.behind_ms, self.latency_ms
        if behind and behind["p99"] > max(_BEHIND_MS, _BEHIND_SHARE * latency.get("p99", 0.0)):
            late = ", ".join(f"{behind[column]:,.1f} ms ({column})" for column in ("p50", "p99", "max"))
            notes.append(f"the client was late by {late}, which the latencies include; more --processes may help")
        elif self.busy > _BUSY:
            notes.append(
                f"the client may be the limit: a process of it was busy {self.busy:.0%} of the time; "
                "more --processes may help"
            )
        return notes


class Results(_Kept):
    """All of one command.

    Attributes:
        date: when it began, ISO 8601.
        contents: what was sent, for people.
        cpus: how many the load tester may use.
    """

    version: str
    date: str
    address: str
    model: str | None
    method: str
    contents: str
    request_bytes: int
    processes: int
    connections: int
    cpus: int
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, file: Path) -> Results:
        """What `model_dump_json` wrote.

        Raises:
            ConfigError: the file cannot be read, or is none of those.
        """
        try:
            results = cls.model_validate_json(file.read_bytes())
            for row in results.rows:
                _figures(row.latency)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{file} is nothing that --json wrote: {where}: {first['msg']}") from error
        except Exception as error:  # hdrh raises what it comes across, and zlib.error
            raise ConfigError(f"{file}: a histogram in it cannot be read: {error}") from error
        return results

    def like(self, row: Row) -> Row | None:
        """That of the same load, whatever its duration."""
        return next((own for own in self.rows if own.load.name == row.load.name), None)

    @property
    def good(self) -> bool:
        """Whether every request was sent and answered."""
        return all(row.good for row in self.rows)


def curve(encoded: str) -> tuple[list[float], list[float]]:
    """Of a histogram in µs: parts of the whole, and the ms within which so large a part was answered."""
    parts, ms = [], []
    for at in HdrHistogram.decode(encoded).get_percentile_iterator(10):
        parts.append(at.percentile_level_iterated_to / 100)
        ms.append(at.value_iterated_to / 1000)
    return parts, ms


def encoded(times: HdrHistogram) -> str:
    """HdrHistogram's V2 encoding, in base64."""
    text: bytes = times.encode()
    return text.decode("ascii")


def _sum(histograms: Iterable[str]) -> str:
    total = histogram()
    for each in histograms:
        total.decode_and_add(each)
    return encoded(total)


def _figures(histogram_us: str) -> dict[str, float]:
    times: Any = HdrHistogram.decode(histogram_us)
    if not times.get_total_count():
        return {}
    cuts = {f"p{percentile:g}": times.get_value_at_percentile(percentile) / 1000 for percentile in PERCENTILES}
    return {"mean": times.get_mean_value() / 1000, **cuts, "max": times.get_max_value() / 1000}
