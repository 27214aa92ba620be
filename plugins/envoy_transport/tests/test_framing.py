"""gRPC's frames, timeouts, statuses and metadata, as Envoy carries them."""

from __future__ import annotations

import gzip
import zlib
from contextlib import suppress
from typing import Any

import pytest
from dl_inference_envoy_transport import framing
from hypothesis import given
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest, Code, InferenceError, MessageTooLarge, Unimplemented

LIMIT = 1000


@given(st.binary(max_size=LIMIT))
def test_a_message_comes_out_of_its_frame_as_it_went_in(message: bytes) -> None:
    assert framing.message(framing.framed(message), "identity", LIMIT) == message


@given(st.binary(max_size=LIMIT), st.sampled_from(["gzip", "deflate"]))
def test_a_compressed_message_is_unpacked(message: bytes, encoding: str) -> None:
    packed = gzip.compress(message) if encoding == "gzip" else zlib.compress(message)
    frame = b"\1" + len(packed).to_bytes(4, "big") + packed
    assert framing.message(frame, encoding, 2 * LIMIT) == message


@given(st.binary(max_size=64), st.sampled_from(["identity", "gzip", "deflate", "br", ""]))
def test_any_bytes_are_a_message_or_an_error_of_the_clients(frame: bytes, encoding: str) -> None:
    with suppress(BadRequest, MessageTooLarge, Unimplemented):
        assert len(framing.message(frame, encoding, LIMIT)) <= LIMIT


@pytest.mark.parametrize(
    ("frame", "encoding", "error", "said"),
    [
        (b"", "identity", BadRequest, "expected one message"),
        (b"\0\0\0\0", "identity", BadRequest, "expected one message"),
        (b"\0\0\0\0\2x", "identity", BadRequest, "expected one message"),
        (b"\0\0\0\0\1xy", "identity", BadRequest, "expected one message"),
        (b"\2\0\0\0\1x", "identity", BadRequest, "0 or 1; got 2"),
        (b"\0\xff\xff\xff\xff", "identity", MessageTooLarge, "larger than max (4294967295 vs. 1000)"),
        (b"\1\0\0\0\1x", "identity", BadRequest, "no grpc-encoding says how"),
        (b"\1\0\0\0\1x", "snappy", Unimplemented, '"snappy"'),
        (b"\1\0\0\0\4xxxx", "gzip", BadRequest, "not compressed by gzip"),
    ],
)
def test_what_is_no_frame_is_told_so(frame: bytes, encoding: str, error: type[InferenceError], said: str) -> None:
    with pytest.raises(error) as caught:
        framing.message(frame, encoding, LIMIT)
    assert said in str(caught.value)


def test_a_bomb_is_not_unpacked_beyond_the_limit() -> None:
    packed = gzip.compress(bytes(50_000_000))
    with pytest.raises(MessageTooLarge) as caught:
        framing.message(b"\1" + len(packed).to_bytes(4, "big") + packed, "gzip", 100_000)
    assert "100001 vs. 100000" in str(caught.value)


def test_a_compressed_message_that_is_cut_short_is_no_message() -> None:
    packed = gzip.compress(b"some text that is long enough to be cut")[:-9]
    with pytest.raises(BadRequest, match="ends before"):
        framing.message(b"\1" + len(packed).to_bytes(4, "big") + packed, "gzip", LIMIT)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_compressed_message_with_something_behind_it_is_no_message(pack: Any) -> None:
    packed = pack(b"some text") + b"x"
    with pytest.raises(BadRequest, match="goes on after"):
        framing.message(
            b"\1" + len(packed).to_bytes(4, "big") + packed, "gzip" if pack is gzip.compress else "deflate", LIMIT
        )


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("1n", 1e-9), ("20u", 2e-5), ("300m", 0.3), ("5S", 5.0), ("2M", 120.0), ("1H", 3600.0), ("99999999H", 3.6e11)],
)
def test_timeouts_are_read(header: str, seconds: float) -> None:
    assert framing.timeout_s(header) == pytest.approx(seconds)


@pytest.mark.parametrize("header", ["", "m", "5", "-5m", "5x", "5 m", "123456789m", "٣m", "1.5S"])
def test_malformed_timeouts_are_told_so(header: str) -> None:
    with pytest.raises(BadRequest, match="grpc-timeout"):
        framing.timeout_s(header)


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_timeouts_are_written_as_they_are_or_a_little_longer(seconds: float) -> None:
    written = framing.timeout_s(framing.timeout_header(seconds))
    assert seconds <= written <= seconds * (1 + 1e-5) + 2e-6 or seconds > 99_999


@given(st.text(max_size=200))
def test_status_messages_survive_the_way_through_a_header(text: str) -> None:
    class Failure(InferenceError):
        code = Code.ABORTED

    try:
        text.encode()
    except UnicodeEncodeError:
        return
    headers = dict(framing.status_headers(Failure(text)))
    assert headers["grpc-message"].isascii()
    assert headers["grpc-message"].isprintable() or not headers["grpc-message"]
    assert framing.status(200, headers["grpc-status"], headers["grpc-message"]) == (Code.ABORTED, text)


@pytest.mark.parametrize(
    ("http_status", "said", "code"),
    [
        (200, "0", Code.OK),
        (200, "14", Code.UNAVAILABLE),
        (200, None, Code.UNKNOWN),
        (200, "", Code.UNKNOWN),
        (200, "17", Code.UNKNOWN),
        (200, "00", Code.UNKNOWN),
        (503, None, Code.UNAVAILABLE),
        (503, "14", Code.UNAVAILABLE),
        (404, None, Code.UNIMPLEMENTED),
        (500, None, Code.UNKNOWN),
    ],
)
def test_a_status_that_is_missing_or_malformed_is_never_ok(http_status: int, said: str | None, code: Code) -> None:
    assert framing.status(http_status, said, None)[0] is code


@given(st.lists(st.tuples(st.sampled_from(["a", "b-bin"]), st.binary(max_size=20)), max_size=5))
def test_metadata_survive_the_way_through_headers(pairs: list[tuple[str, bytes]]) -> None:
    metadata = [(key, value if key.endswith("-bin") else value.hex()) for key, value in pairs]
    read = [pair for key, value in framing.encoded(metadata) for pair in framing.decoded(key, value)]
    assert read == metadata


def test_several_binary_values_in_one_header_are_several() -> None:
    assert framing.decoded("x-bin", "AAE, /w==") == (("x-bin", b"\0\1"), ("x-bin", b"\xff"))


@pytest.mark.parametrize("value", ["", "AA", "AA==", "AAE", "AAE=", "AAEC"])
def test_a_binary_value_may_be_padded_or_not(value: str) -> None:
    assert framing.decoded("x-bin", value) == (("x-bin", bytes(range(len(value.rstrip("=")) * 3 // 4))),)


@pytest.mark.parametrize("value", ["!!!", "A", "AA=A", "AA===", "A-_A", "AAEC,!", "AAé"])
def test_a_binary_value_that_is_no_base64_is_told_so(value: str) -> None:
    with pytest.raises(BadRequest, match="x-bin is not base64"):
        framing.decoded("x-bin", value)
