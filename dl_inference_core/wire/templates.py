"""What messages have in common, found once: those of one client differ in the numbers of their tensors and in their
ids, and seldom in anything else.

To take a message apart, or to write one, costs some µs for its fields, whatever they hold. So when a request has been
decoded, each tensor's numbers and the id are looked for in its bytes, others are put in their place, and the codec
decodes that. If nothing has changed but these, then every request that has the same bytes around them means the same
but for them. Answers are learnt likewise, from what the codec writes for other numbers and another id. Nothing here
knows a protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dl_inference_core.errors import InferenceError
from dl_inference_core.tensors import Payload, Request, Response, Tensor

if TYPE_CHECKING:
    from dl_inference_core.wire.codecs import Codec

_LARGE = 32_768
"""Bytes from which on it is the numbers that cost."""
_MOST_AROUND = 4096
"""Bytes of a message beside its numbers."""
_MOST, _MOST_OF_A_SIZE, _MOST_ANSWERS = 256, 8, 16

# A client whose messages always differ in something else is not to pay for what is never used again: learning costs,
# each hit and, a little, each miss pays.
_CREDIT = 4096
_PRICE, _HIT, _MISS = 256, 8, 1

# The bytes of numbers that are tried. A varint goes on after each of the larger ones and ends with each of the smaller
# ones: what is a number's only byte in some of them is found out by the others. No float of either is a NaN.
_LARGER, _SMALLER = range(0x80, 0xC0), range(0x40)
_TRIED_IDS = {_LARGER: "~", _SMALLER: "0"}
"""The letter of the ids that are tried with these numbers. "~" is not the tag of a field, and a length only
of 126 bytes: so it stands nowhere else in an answer."""

_Key: TypeAlias = "str | None"
"""The name of a tensor; None of one that has none."""


@dataclass(frozen=True, slots=True)
class _Hole:
    """Where a tensor's numbers stand, those of `dtype` on the wire."""

    start: int
    stop: int
    name: _Key
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Id:
    """Where the id of the request stands, in ASCII."""

    start: int
    stop: int


class Template:
    """Requests that differ in the values of their tensors and in their ids alone.

    Attributes:
        notes: what the user of the codec keeps of them.
        used: whether one has come since this was last looked at.
    """

    __slots__ = ("_around", "_holes", "_id", "_said", "answers", "notes", "used")

    def __init__(self, body: bytes, request: Request, holes: Sequence[_Hole], id_: _Id | None) -> None:
        """Args:
        id_: None where the id is the same for all of them.
        """
        self._around = tuple(_pieces(body, [*holes, id_] if id_ else holes))
        self._holes = tuple((hole.name, hole.start, hole.stop, hole.dtype, hole.shape) for hole in holes)
        self._id = id_
        self._said = replace(request, payload=None, tags=dict(request.tags), parameters=dict(request.parameters))
        self.used = False
        self.notes: Any = None
        self.answers: dict[Any, _Answer | None] = {}

    def matches(self, body: bytes) -> bool:
        """Whether `body`, which is as long as they are, is one of them."""
        for start, stop, piece in self._around:
            if body[start:stop] != piece:
                return False
        return self._id is None or body[self._id.start : self._id.stop].isascii()

    def says(self, request: Request) -> bool:
        """Whether what an answer repeats of `request` is what it came with: a handler may have written in it."""
        said, id_, size = self._said, request.id, len(self._said.id)
        return bool(
            (id_ == said.id if self._id is None else len(id_) == size and id_.isascii())
            and request.tags == said.tags
            and request.form is said.form
            and request.model == said.model
            and request.signature == said.signature
        )

    def request(self, body: bytes) -> Request:
        """The request in `body`, which matches."""
        self.used = True
        said, id_ = self._said, self._id
        payload: Any = {
            name: np.ndarray(shape, dtype, body[start:stop]) for name, start, stop, dtype, shape in self._holes
        }
        request = Request.__new__(Request)  # to call the class takes three times as long, 0.9 µs
        request.payload = payload.get(None, payload)
        request.form = said.form
        request.layout = said.layout
        request.model = said.model
        request.version = said.version
        request.label = said.label
        request.method = said.method
        request.signature = said.signature
        request.outputs = said.outputs
        request.names = said.names
        # Each has tags of its own, should somebody write in them.
        request.tags = dict(said.tags)
        request.parameters = dict(said.parameters)
        request.id = said.id if id_ is None else body[id_.start : id_.stop].decode()
        request.call = said.call
        return request

    def other(self, within: range) -> str:
        """Another id, for trials with numbers of such bytes; the same where all of them have the same."""
        return self._said.id if self._id is None else _TRIED_IDS[within] * len(self._said.id)


class _Answer:
    """Answers to one template's requests, whose tensors have the same names, dtypes and shapes."""

    __slots__ = ("_holes", "_id_at", "_parts")

    def __init__(self, encoded: bytes, holes: Sequence[_Hole], id_: _Id | None) -> None:
        """Args:
        id_: None where the answers do not repeat the id, or all have the same.
        """
        around = {start: piece for start, _, piece in _pieces(encoded, [*holes, id_] if id_ else holes)}
        starts = sorted([*around, *(hole.start for hole in holes), *((id_.start,) if id_ else ())])
        self._parts = [around.get(start, b"") for start in starts]
        self._holes = tuple((starts.index(hole.start), hole.name, hole.dtype) for hole in holes)
        self._id_at = None if id_ is None else starts.index(id_.start)

    def encoded(self, payload: Any, request_id: str) -> bytes:
        parts = self._parts.copy()
        for at, name, dtype in self._holes:
            array = payload if name is None else payload[name]
            parts[at] = array.tobytes() if array.dtype == dtype else array.astype(dtype).tobytes()
        if self._id_at is not None:
            parts[self._id_at] = request_id.encode()
        return b"".join(parts)


class Templates:
    """One protocol's codec for one version of a model, whose requests and answers are soon known. Any thread."""

    def __init__(self, codec: Codec, model: str, version: int) -> None:
        self._codec = codec
        self._model = model
        self._version = version
        self._by_size: dict[int, tuple[Template, ...]] = {}
        self._count = 0
        self._credit = _CREDIT

    def find(self, body: bytes | memoryview) -> Template | None:
        """The template that the request in `body` matches; None if it matches no known one."""
        if type(body) is bytes:
            for template in self._by_size.get(len(body), ()):
                if template.matches(body):
                    return template
        return None

    def decode_request(
        self, body: bytes | memoryview, template: Template | None = None
    ) -> tuple[Request, Template | None]:
        """The request, and the template that it matches; None if it matches no known one.

        Args:
            template: what `find` gave for `body`; None looks for it.

        Raises:
            BadRequest: as the codec.
        """
        template = template or self.find(body)
        if template is not None and type(body) is bytes:
            if self._credit < _CREDIT:
                self._credit += _HIT
            return template.request(body), template
        request = self._codec.decode_request(body)
        if type(body) is not bytes or len(body) >= _LARGE:
            return request, None
        self._credit += _MISS
        if self._credit >= _PRICE:
            self._credit -= _PRICE
            self._learn(body, request)
        return request, None

    def encode_response(self, payload: Payload, request: Request, template: Template | None = None) -> bytes:
        """The answer of this version, with that payload.

        Args:
            template: that `request` came with.

        Raises:
            TypeError: as the codec.
        """
        if template is None or not template.says(request):
            return self._encode(payload, request)
        described: list[Any] = []
        for name, array in _named(payload).items():
            if not isinstance(array, np.ndarray):
                return self._encode(payload, request)
            described += (name, array.dtype, array.shape)
        key = tuple(described)
        try:
            answer = template.answers[key]
        except KeyError:
            return self._learn_answer(template, key, payload, request)
        return self._encode(payload, request) if answer is None else answer.encoded(payload, request.id)

    def _encode(self, payload: Payload, request: Request) -> bytes:
        response = Response(payload=payload, model=self._model, version=self._version, tags=request.tags, id=request.id)
        return self._codec.encode_response(response, request)

    def _learn(self, body: bytes, request: Request) -> None:
        """Find out what `request`, which was in `body`, has in common with others."""
        tensors = _tensors(request.payload)
        if tensors is None or any(
            isinstance(value, dict | list) for value in (*request.tags.values(), *request.parameters.values())
        ):
            return
        holes = _find(body, {name: (array,) for name, array in tensors.items()})
        if holes is None:
            return
        id_ = _find_id(body, request.id, holes)
        template = Template(body, request, holes, id_)
        for within in (_LARGER, _SMALLER):
            others = _others(tensors, within)
            trial = bytearray(body)
            for hole in holes:
                trial[hole.start : hole.stop] = others[hole.name].tobytes()
            if id_ is not None:
                trial[id_.start : id_.stop] = template.other(within).encode()
            try:
                decoded = self._codec.decode_request(bytes(trial))
            except InferenceError:
                return
            if not _same(decoded, template.request(bytes(trial))):
                return
        self._keep(len(body), template)

    def _keep(self, size: int, template: Template) -> None:
        """In the place of one that is not used, where there is no other."""
        if self._count >= _MOST:
            self._by_size, self._count = {}, 0
        kept = self._by_size.get(size, ())
        if len(kept) < _MOST_OF_A_SIZE:
            self._by_size[size] = (*kept, template)
            self._count += 1
            return
        used = tuple(each for each in kept if each.used)
        if len(used) < len(kept):
            self._by_size[size] = (*used, template)
            self._count -= len(kept) - len(used) - 1
        for each in used:
            each.used = False

    def _learn_answer(self, template: Template, key: Any, payload: Payload, request: Request) -> bytes:
        """The answer; and what others have in common with it."""
        encoded = self._encode(payload, request)
        if len(template.answers) < _MOST_ANSWERS and len(encoded) < _LARGE:
            template.answers[key] = self._answer(template, encoded, payload, request)
        return encoded

    def _answer(self, template: Template, encoded: bytes, payload: Payload, request: Request) -> _Answer | None:
        tensors = _tensors(payload)
        if tensors is None:
            return None
        others = _others(tensors)
        asked = replace(request, id=template.other(_LARGER))
        try:
            trial = self._encode(_payload(others), asked)
        except InferenceError:  # the protocol cannot hold all numbers of their dtype, so each answer is looked at
            return None
        # Seldon's tensors are of float64, whatever the model's are.
        holes = _find(trial, {name: (array, array.astype(np.float64)) for name, array in others.items()})
        if holes is None:
            return None
        answer = _Answer(trial, holes, _find_id(trial, asked.id, holes))
        small, other = _payload(_others(tensors, _SMALLER)), replace(request, id=template.other(_SMALLER))
        for values, id_, expected in ((payload, request.id, encoded), (small, other.id, self._encode(small, other))):
            written = answer.encoded(values, id_)
            if len(written) != len(expected) or not _same(*map(self._codec.decode_response, (written, expected))):
                return None
        return answer


def _named(payload: Any) -> Mapping[_Key, Any]:
    # To ask for a dict first takes 0.2 µs less.
    return payload if type(payload) is dict or isinstance(payload, Mapping) else {None: payload}


def _tensors(payload: Any) -> Mapping[_Key, Tensor] | None:
    """`payload` by name; None if there is anything in it but numbers, as many machines have them."""
    named = _named(payload)
    if named is payload and None in named:
        return None
    for array in named.values():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.dtype.isnative:
            return None
    return named


def _payload(tensors: dict[_Key, Tensor]) -> Any:
    """The reverse of `_named`."""
    return tensors.get(None, tensors)


def _others(tensors: Mapping[_Key, Tensor], within: range = _LARGER) -> dict[_Key, Tensor]:
    """Tensors like these, with numbers of such bytes."""
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(within.start, within.stop, array.nbytes, np.uint8)
        .view(array.dtype)
        .reshape(array.shape)
        for name, array in tensors.items()
    }


def _find(body: bytes, tensors: Mapping[_Key, Sequence[Tensor]]) -> list[_Hole] | None:
    """Where the numbers of each tensor stand in `body`, as one of several arrays, in order; None unless each stands in
    one place alone, and not much else is there."""
    holes: list[_Hole] = []
    for name, ways in tensors.items():
        for array in ways:
            numbers = array.tobytes()
            start = body.find(numbers) if numbers else -1
            if start >= 0:
                break
        else:
            return None
        if body.find(numbers, start + 1) >= 0:
            return None
        holes.append(_Hole(start, start + len(numbers), name, array.dtype, array.shape))
    holes.sort(key=lambda hole: hole.start)
    if any(hole.stop > following.start for hole, following in pairwise(holes)):
        return None
    if not holes or len(body) - sum(hole.stop - hole.start for hole in holes) > _MOST_AROUND:
        return None
    return holes


def _find_id(body: bytes, id_: str, holes: Sequence[_Hole]) -> _Id | None:
    """Where `id_` stands in `body` beside the numbers; None unless it stands in one place alone, in ASCII."""
    if not id_ or not id_.isascii():
        return None
    text, found = id_.encode(), []
    for start, _, piece in _pieces(body, holes):
        position = piece.find(text)
        while position >= 0:
            found.append(start + position)
            position = piece.find(text, position + 1)
    return _Id(found[0], found[0] + len(text)) if len(found) == 1 else None


def _pieces(body: bytes, holes: Sequence[_Hole | _Id]) -> Iterator[tuple[int, int, bytes]]:
    """What stands around `holes`: where each piece begins and ends, and its bytes."""
    start = 0
    for hole in sorted(holes, key=lambda hole: hole.start):
        if start < hole.start:
            yield start, hole.start, body[start : hole.start]
        start = hole.stop
    if start < len(body):
        yield start, len(body), body[start:]


def _same(one: Any, other: Any) -> bool:
    """Whether two requests or answers mean the same, to the last bit of a number."""
    ours, theirs = _named(one.payload), _named(other.payload)
    if ours.keys() != theirs.keys():
        return False
    for name, array in ours.items():
        twin = theirs[name]
        if (array.dtype, array.shape, array.tobytes()) != (twin.dtype, twin.shape, twin.tobytes()):
            return False
    return bool(replace(one, payload=None) == replace(other, payload=None))
