"""What the costliest messages that are decoded take: `python -m bench.amplification [part of a field's name]`.

For every field that a request of any protocol can repeat, the largest message of nothing but this field that
`limits.check` lets pass, up to 10 MiB; the memory that it takes decoded, and the time for which protobuf holds the GIL.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl_inference_core.errors import BadRequest
from dl_inference_core.transport import Limits
from dl_inference_core.wire import limits, messages
from dl_inference_core.wire.arrays import field, varint

ROOTS = (
    messages.ModelInferRequest,
    messages.PredictRequest,
    messages.ClassificationRequest,
    messages.RegressionRequest,
    messages.MultiInferenceRequest,
    messages.SeldonMessage,
    messages.GetModelMetadataRequest,
    messages.GetModelStatusRequest,
    messages.ReloadConfigRequest,
)
"""What clients send."""


@dataclass(frozen=True, slots=True)
class Case:
    """One field, repeated.

    Attributes:
        name: its path from the message on, and how it is written.
        field: the field's full name, and how it is written.
        root: the class of the message.
        fixed: whether its values take as many bytes decoded as on the wire.
        body: a message of about so many bytes.
    """

    name: str
    field: str
    root: Any
    fixed: bool
    body: Callable[[int], bytes]


def cases(root: Any) -> Iterator[Case]:
    """Every field of `root` and of the messages in it, each type of messages once on a path."""
    yield Case(
        "an unknown field", f"{root.DESCRIPTOR.full_name}.?", root, False, lambda size: b"\xfa\x3f\x00" * (size // 3)
    )
    yield from _within(root, root.DESCRIPTOR, "", lambda payload: payload, frozenset())


def _within(root: Any, described: Any, path: str, wrap: Callable[[bytes], bytes], above: frozenset[str]) -> Any:
    above |= {described.full_name}
    for each in described.fields:
        name = f"{path}{each.name}"
        for how, fixed, unit in _ways(each):

            def body(size: int, unit: Callable[[int], bytes] = unit) -> bytes:
                return wrap(unit(size))

            yield Case(name + how, each.full_name + how, root, fixed, body)
        if each.message_type is not None and each.message_type.full_name not in above:

            def inner(payload: bytes, number: int = each.number) -> bytes:
                return wrap(field(number, payload))

            yield from _within(root, each.message_type, f"{name}.", inner, above)


def _ways(each: Any) -> Iterator[tuple[str, bool, Callable[[int], bytes]]]:
    """How a field can be repeated: a suffix for its name, whether it is fixed, and its bytes."""
    number = each.number
    if each.message_type is not None or each.type in (each.TYPE_STRING, each.TYPE_BYTES):
        yield "", False, lambda size: field(number, b"") * (size // len(field(number, b"")))
        if each.message_type is not None and each.message_type.GetOptions().map_entry:
            key = each.message_type.fields_by_name["key"]
            yield " (distinct)", False, lambda size: _entries(number, key, size)
        return
    width = {each.TYPE_DOUBLE: 8, each.TYPE_FLOAT: 4}.get(each.type, 0)
    one = varint(number << 3 | {8: 1, 4: 5, 0: 0}[width]) + b"\x01" * (width or 1)
    yield "", False, lambda size: one * (size // len(one))
    if each.is_repeated:
        yield " (packed)", bool(width), lambda size: field(number, b"\x01" * (size // 8 * 8))


def _entries(number: int, key: Any, size: int) -> bytes:
    """Entries of a map with different keys, about 11 bytes each."""
    count = size // 11
    if key.type == key.TYPE_STRING:
        entry = field(number, field(1, b"0000000")).replace(b"0000000", b"%07d")
        return b"".join([entry % index for index in range(count)])
    return b"".join([field(number, b"\x08" + varint(index)) for index in range(count)])


def largest(case: Case, most: int = Limits().message_bytes) -> bytes:
    """The largest message of the case, within 2 %, that `limits.check` lets pass."""
    low, high = 0, most - 64
    if passes(case, body := case.body(high)):
        return body
    while high - low > max(high // 50, 64):
        middle = (low + high) // 2
        low, high = (middle, high) if passes(case, case.body(middle)) else (low, middle)
    return case.body(low)


def passes(case: Case, body: bytes) -> bool:
    try:
        limits.check(case.root.DESCRIPTOR, body)
    except BadRequest:
        return False
    return True


def decoded_bytes(case: Case, body: bytes) -> int:
    """What decoding adds to the memory of a process that has not decoded anything large; in a process of its own."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and still counted, would be used again
        before = _resident()
        message = case.root.FromString(body)
        os.write(writable, str(_resident() - before).encode())
        del message
        os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    with os.fdopen(readable) as told:
        return int(told.read())


def _resident() -> int:
    # The kernel counts pages exactly here, and not in statm.
    with Path("/proc/self/smaps_rollup").open() as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * 1024


def seconds(function: Callable[[], object], times: int = 5) -> float:
    """The shortest of some calls."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for root in ROOTS:
        name = root.DESCRIPTOR.name
        for case in cases(root):
            if wanted in f"{name}.{case.name}":
                body = largest(case)
                taken = decoded_bytes(case, body)
                held = seconds(lambda case=case, body=body: case.root.FromString(body))  # type: ignore[misc]
                print(
                    f"{name}.{case.name}: {len(body)} B, {taken / 1e6:.1f} MB decoded, "
                    f"{max(0, taken - limits.FREE) / max(len(body), 1):.1f} x + 1 MB, {held * 1e3:.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
