"""How much memory and time a message takes to decode, counted in its bytes before protobuf parses it.

Two bytes of a message can become a hundred in memory: an empty submessage, an empty string in a list. protobuf parses
a whole message in one call, during which no other Python thread of the process runs. So each field is charged what it
costs, and a message that costs too much is refused after as many fields as that takes. What a field costs follows from
the descriptor of its type; `docs/limits.md` has the measurements.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

from dl_inference_core.errors import BadRequest

SMALL = 4096
"""Bytes of a message up to which it is not counted: at 200 bytes for two, the most of all, it takes 0.4 MB."""
FREE = 1_000_000
"""Bytes that a message may cost whatever its size."""
MOST = 10_000_000
"""Bytes that a message may cost at most: protobuf takes 1 to 2 ns for each, and 20 ms at most."""

FACTOR, FACTOR_OF_TREES = 8, 20
"""How many bytes each byte of a message may cost. Honest JSON values (Seldon's ndarray and jsonData) and examples
(Classify, Regress) are trees of submessages of few bytes each, and cost more than honest tensors."""
_TREES = frozenset({"google.protobuf.Value", "tensorflow.Example"})

# In bytes, as upb (protobuf 6) allocates them; amortized where an array or a table grows by doubling. What takes longer
# than its memory suggests is charged for its time: about 1 ns for each byte.
_FIELD = 16
_MESSAGE = 8
_ARRAY, _SLOTS = 24, 4
_POINTER, _STRING = 24, 32
_MAP, _ENTRY = 160, 112
_VARINT = 8

_MOST_DEPTH = 100
"""Of messages in each other: protobuf's own limit."""
_PIECE = 1 << 18
_CONTINUED = bytes(range(128, 256))
"""The bytes of a varint but for its last."""

_Cost: TypeAlias = "tuple[int, int, _Message | None, int]"
"""What a field costs: each time; the first time in a row; the message in it; each value of it, if those are packed
varints."""
_UNKNOWN: _Cost = (_FIELD, 0, None, 0)


class _Message:
    """A type of messages: what its fields cost and their names, by tag."""

    __slots__ = ("fields", "name", "names")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[int, _Cost] = {}
        self.names: dict[int, str] = {}


class Malformed(ValueError):
    """The bytes are not fields of protobuf's."""


def check(descriptor: Any, body: bytes) -> None:
    """Refuse `body`, a message of the type that `descriptor` describes, if it costs too much.

    It takes 0.2 µs for each field that is not within a string, bytes or packed numbers, and lets other threads run.

    Raises:
        BadRequest: it costs too much.
        Malformed: protobuf would not take it, either.
    """
    message, _ = _described(descriptor)
    _count(message, body, most_for(descriptor, len(body)))


def most_for(descriptor: Any, size: int) -> int:
    """Bytes that a message of `size` bytes of that type may cost."""
    _, factor = _described(descriptor)
    return min(factor * size + FREE, MOST)


def _count(message: _Message, body: bytes, most: int) -> None:
    position, end = 0, len(body)
    count = cost = before = 0
    fields = message.fields
    outer: list[tuple[_Message, int, int]] = []
    try:
        while True:
            while position >= end:
                if position > end:
                    raise Malformed
                if not outer:
                    return
                message, end, before = outer.pop()
                fields = message.fields
            tag = body[position]
            position += 1
            if tag > 127:
                tag, position = _varint(body, position - 1)
            each, first, inner, packed = fields.get(tag, _UNKNOWN)
            names = message
            count += 1
            cost += each if tag == before else each + first
            before = tag
            kind = tag & 7
            if kind == 2:
                size = body[position]
                position += 1
                if size > 127:
                    size, position = _varint(body, position - 1)
                if packed:
                    cost += packed * _values(body, position, position + size, (most - cost) // packed)
                if inner is None or not size:
                    position += size
                else:
                    if position + size > end or len(outer) == _MOST_DEPTH:
                        raise Malformed
                    outer.append((message, end, before))
                    message, end, before = inner, position + size, 0
                    fields = message.fields
            else:
                position = _after(body, position, kind)
            if cost > most:
                raise _too_costly(names, tag, count, position, most)
    except IndexError:
        raise Malformed from None


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """The varint that begins there, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise Malformed


def _after(body: bytes, position: int, kind: int) -> int:
    """Where the value of a field ends that has no length. The fields of a group are counted as if they stood alone."""
    if kind == 0:
        return position + 1 if body[position] < 128 else _varint(body, position)[1]
    if kind == 5:
        return position + 4
    if kind == 1:
        return position + 8
    if kind in (3, 4):
        return position
    raise Malformed


def _values(body: bytes, start: int, end: int, most: int) -> int:
    """How many varints there are; any number above `most` if there are more. In pieces: other threads run between."""
    count = 0
    for piece in range(start, end, _PIECE):
        count += len(body[piece : min(piece + _PIECE, end)].translate(None, _CONTINUED))
        if count > most:
            break
    return count


def _too_costly(message: _Message, tag: int, count: int, position: int, most: int) -> BadRequest:
    name = message.names.get(tag, f"field {tag >> 3}, which is unknown")
    return BadRequest(
        f"the message has too many values: its first {position} bytes are {count} fields, the last of them "
        f"{message.name}.{name}, and would take more than {most} bytes to decode; expected fewer fields, "
        "or packed or raw numbers"
    )


@functools.cache
def _described(descriptor: Any) -> tuple[_Message, int]:
    """The type, and how much each byte of a message of it may cost."""
    known: dict[str, _Message] = {}
    message = _describe(descriptor, known)
    return message, FACTOR if _TREES.isdisjoint(known) else FACTOR_OF_TREES


def _describe(descriptor: Any, known: dict[str, _Message]) -> _Message:
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    message = known[descriptor.full_name] = _Message(descriptor.full_name)
    is_entry = descriptor.GetOptions().map_entry
    for field in descriptor.fields:
        for tag, cost in _costs(field, is_entry, known).items():
            message.fields[tag] = cost
            message.names[tag] = field.name
    return message


def _costs(field: Any, is_entry: bool, known: dict[str, _Message]) -> dict[int, _Cost]:
    """What `field` costs, by each tag with which it is read."""
    tag = field.number << 3
    repeated = field.is_repeated
    if field.message_type is not None:
        inner = _describe(field.message_type, known)
        if field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"].message_type
            return {tag | 2: (_ENTRY + (_size(value) if value else 0), _MAP, inner, 0)}
        size = _FIELD if is_entry else _size(field.message_type)  # an entry's value is charged with the entry
        if repeated:
            return {tag | 2: (size + _POINTER, _ARRAY + _SLOTS * 8, inner, 0)}
        return {tag | 2: (size, 0, inner, 0)}
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        return {tag | 2: (_STRING, _ARRAY + _SLOTS * 16, None, 0) if repeated else (_FIELD, 0, None, 0)}
    kind = 0
    if field.type in (field.TYPE_DOUBLE, field.TYPE_FIXED64, field.TYPE_SFIXED64):
        kind = 1
    elif field.type in (field.TYPE_FLOAT, field.TYPE_FIXED32, field.TYPE_SFIXED32):
        kind = 5
    if not repeated:
        return {tag | kind: (_FIELD, 0, None, 0)}
    first = _ARRAY + _SLOTS * 8
    return {tag | kind: (_FIELD, first, None, 0), tag | 2: (_FIELD, first, None, 0 if kind else _VARINT)}


def _size(descriptor: Any) -> int:
    """Bytes of an empty message."""
    in_a_oneof = {field.name for oneof in descriptor.oneofs for field in oneof.fields}
    alone = [16 if _is_string(field) else 8 for field in descriptor.fields if field.name not in in_a_oneof]
    has_bits = any(field.message_type and not field.is_repeated for field in descriptor.fields)
    return _MESSAGE + 8 * has_bits + sum(alone) + 24 * len(descriptor.oneofs)


def _is_string(field: Any) -> bool:
    return field.type in (field.TYPE_STRING, field.TYPE_BYTES) and not field.is_repeated
