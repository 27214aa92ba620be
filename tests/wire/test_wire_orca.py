"""Load reports as they lie on the wire, and what is taken out of an answer's trailers."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from dl_inference_core.wire import messages, orca
from dl_inference_core.wire.orca import Load

LOAD = Load(utilization=0.5, qps=200.0, eps=3.0)


def report(**fields: Any) -> bytes:
    encoded: bytes = messages.OrcaLoadReport(**fields).SerializeToString()
    return encoded


def test_the_numbers_are_the_official_ones() -> None:
    # Field 1 is the processor's utilization, 6 and 7 requests and errors per second, 9 the application's; all double.
    fields = ((1, 0.25), (6, 200.0), (7, 3.0), (9, 0.5))
    assert orca.encode(LOAD, cpu=0.25) == b"".join(
        bytes([number << 3 | 1]) + struct.pack("<d", value) for number, value in fields
    )


def test_what_is_encoded_is_read_again() -> None:
    assert orca.decode(orca.encode(LOAD, cpu=0.9)) == LOAD


def test_the_applications_utilization_comes_before_the_processors() -> None:
    both = report(application_utilization=1.5, cpu_utilization=0.2)
    assert orca.decode(both) == Load(utilization=1.5, qps=0, eps=0)
    assert orca.decode(report(cpu_utilization=0.2)) == Load(utilization=0.2, qps=0, eps=0)


def test_fields_that_are_not_used_are_no_harm() -> None:
    full = report(rps_fractional=5, named_metrics={"a": 1}, request_cost={"b": 2}, utilization={"c": 3})
    assert orca.decode(full + b"\x18\x07") == Load(utilization=0, qps=5, eps=0)  # and `rps`, which is deprecated


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_number_from_0_is_not_said(value: float) -> None:
    fields = {"application_utilization": value, "rps_fractional": value, "eps": value}
    assert orca.decode(report(**fields, cpu_utilization=0.25)) == Load(utilization=0.25, qps=0, eps=0)


@pytest.mark.parametrize("key", [orca.KEY, orca.OWN_KEY])
def test_a_report_is_read_among_other_trailers(key: str) -> None:
    assert orca.read([("a", "1"), (key, orca.encode(LOAD)), ("b-bin", b"2")]) == LOAD


def test_the_report_in_orcas_text_form_is_passed_over() -> None:
    assert orca.read([("endpoint-load-metrics", "TEXT cpu_utilization=0.3"), *orca.trailers(orca.encode(LOAD))]) == LOAD


def test_what_tells_of_load_is_known_by_its_keys() -> None:
    told = {"endpoint-load-metrics", *(key for key, _ in orca.trailers(b""))}
    assert told == orca.TRAILERS == {orca.KEY, orca.OWN_KEY, "endpoint-load-metrics"}


@pytest.mark.parametrize("value", [b"\xff", b"\x31\x00", "text"])
def test_a_malformed_report_is_none(value: str | bytes) -> None:
    assert orca.read([(orca.KEY, value)]) is None


def test_without_a_report_there_is_none() -> None:
    assert orca.read([("a", "1")]) is None
