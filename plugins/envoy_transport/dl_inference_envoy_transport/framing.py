"""gRPC as HTTP/2 carries it: messages in frames, timeouts, statuses, metadata.

After doc/PROTOCOL-HTTP2.md of grpc/grpc.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from urllib.parse import quote, unquote

from dl_inference_core.errors import BadRequest, Code, InferenceError, MessageTooLarge, Unimplemented
from dl_inference_core.transport import Message, Metadata, shortened

PREFIX = 5
"""Bytes before each message: whether it is compressed, and its length."""

# At 600 KB a copy that need not be takes 30 µs by itself, and 100 µs where caches are cold.
_LARGE = 32_768
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "S": 1.0, "M": 60.0, "H": 3600.0}
_CODES = {str(code.value): code for code in Code}
_FROM_HTTP = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def framed(message: Message) -> bytes:
    """`message` in its frame, uncompressed. A view that `message` below made is in its frame still."""
    if isinstance(message, memoryview):
        frame = message.obj
        untouched = message.c_contiguous and message.format == "B"  # not a view of that view
        if untouched and isinstance(frame, bytes) and len(frame) == PREFIX + len(message) and not frame[0]:
            return frame
        message = bytes(message)
    return b"\0" + len(message).to_bytes(4, "big") + message


def too_large(size: int, limit: int, *, sent: bool = False) -> MessageTooLarge:
    """In gRPC's own words, by which `errors.from_status` tells it from a server that is overloaded."""
    return MessageTooLarge(f"{'Sent' if sent else 'Received'} message larger than max ({size} vs. {limit})")


def length(frame: bytes | bytearray, limit: int) -> int:
    """How many bytes the frame that begins `frame` has, its prefix included.

    Raises:
        MessageTooLarge: more than `limit` bytes are announced.
    """
    size = int.from_bytes(frame[1:PREFIX], "big")
    if size > limit:
        raise too_large(size, limit)
    return PREFIX + size


def message(frame: bytes, encoding: str, limit: int) -> Message:
    """The message in exactly one frame; a view of a large one, whose frame is to go on as it is (`framed`).

    Raises:
        BadRequest: it is no such frame, or is not compressed as `encoding` says.
        Unimplemented: the encoding is not known.
        MessageTooLarge: the message, unpacked, is over `limit` bytes.
    """
    if len(frame) < PREFIX or len(frame) != length(frame, limit):
        raise BadRequest(f"expected one message in a frame; got {len(frame)} bytes that are none")
    flag = frame[0]
    if not flag:
        return frame[PREFIX:] if len(frame) < _LARGE else memoryview(frame)[PREFIX:]
    if flag != 1:
        raise BadRequest(f"the first byte of a frame is 0 or 1; got {flag}")
    if encoding == "identity":
        raise BadRequest("the message says that it is compressed, and no grpc-encoding says how")
    if encoding not in _WINDOW_BITS:
        raise Unimplemented(f'grpc-encoding "{encoding[:20]}" is not known; known: identity, {", ".join(_WINDOW_BITS)}')
    unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        unpacked = unpacking.decompress(frame[PREFIX:], limit + 1)
    except zlib.error as error:
        raise BadRequest(f"the message is not compressed by {encoding}: {error}") from None
    if len(unpacked) > limit:
        raise too_large(len(unpacked), limit)
    if not unpacking.eof:
        raise BadRequest(f"the message ends before its {encoding} does")
    if unpacking.unused_data:
        raise BadRequest(f"the message goes on after its {encoding} has ended")
    return unpacked


def timeout_s(header: str) -> float:
    """Seconds that a grpc-timeout says.

    Raises:
        BadRequest: it is malformed.
    """
    digits, unit = header[:-1], header[-1:]
    if unit not in _UNITS or not digits.isdecimal() or not digits.isascii() or len(digits) > 8:
        raise BadRequest(f'grpc-timeout "{header[:20]}" is malformed; expected up to 8 digits and one of n u m S M H')
    return int(digits) * _UNITS[unit]


def timeout_header(seconds: float) -> str:
    """`seconds` as a grpc-timeout: in µs where 8 digits hold them, rounded up."""
    micros = int(seconds * 1e6) + 1
    return f"{micros}u" if micros < 10**8 else f"{min(micros // 1000 + 1, 10**8 - 1)}m"


def status_headers(error: InferenceError) -> list[tuple[str, str]]:
    """grpc-status and grpc-message."""
    return [
        ("grpc-status", str(error.code.value)),
        ("grpc-message", quote(shortened(str(error)), safe=_PRINTABLE)),
    ]


def status(http_status: int, said: str | None, text: str | None) -> tuple[Code, str]:
    """What an answer came to. A status that is missing or malformed is never OK."""
    if said is None:
        if http_status != 200:
            return _FROM_HTTP.get(http_status, Code.UNKNOWN), f"HTTP status {http_status} and no gRPC status"
        return Code.UNKNOWN, "the answer has no gRPC status"
    if said not in _CODES:
        return Code.UNKNOWN, f'the answer has the gRPC status "{said[:20]}"'
    return _CODES[said], unquote(text) if text else ""


def encoded(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str]]:
    """Metadata as headers."""
    return [
        (key, base64.b64encode(value).decode("ascii").rstrip("=") if isinstance(value, bytes) else value)
        for key, value in metadata
    ]


def decoded(key: str, value: str) -> Metadata:
    """A header as metadata; several, where a binary one has several values.

    Raises:
        BadRequest: a binary one is no base64.
    """
    if not key.endswith("-bin"):
        return ((key, value),)
    try:
        return tuple((key, _from_base64(part.strip())) for part in value.split(","))
    except ValueError:
        raise BadRequest(f"the metadata {key} is not base64") from None


def _from_base64(text: str) -> bytes:
    """The bytes of `text`, which may be padded or not."""
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
