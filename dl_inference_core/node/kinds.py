"""Kinds of requests: those of one kind have the same signature, and tensors of the same names, dtypes and shapes.

The first request of a kind tells what is the same for all of them: where a handler's `preprocess` is the default's,
which looks at nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dl_inference_core.node.handler_inputs import unchanged
from dl_inference_core.tensors import Form

if TYPE_CHECKING:
    from dl_inference_core.node.batching import Batching, Key, Part
    from dl_inference_core.tensors import Request

Kind: TypeAlias = "str | tuple[Any, ...]"

_MOST_KINDS = 256
"""Kinds of requests that are known at one time: the models of one version have a few, with up to 64 numbers of rows."""
_MOST_TENSORS = 64
"""Of a request that has a kind: to hash or free tuples in tuples takes stack."""
# CPython 3.11 takes 0.1 µs to look up a member of an enumeration.
_RAW, _TYPED = Form.TENSORS_RAW, Form.TENSORS


def request_kind(request: Request) -> Kind | None:
    """None where the default handler may look at more than names, dtypes and shapes."""
    form = request.form
    if form is not _RAW and form is not _TYPED:
        return None
    payload: Any = request.payload  # a dict of arrays, in these forms
    if len(payload) > _MOST_TENSORS:
        return None
    kind: Any = request.signature
    for name in payload:  # tuples in tuples: to fill a list and make a tuple of it takes 0.1 µs longer
        tensor = payload[name]
        kind = kind, name, tensor.dtype, tensor.shape
    return kind  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of all requests of one kind.

    Attributes:
        inputs: the names of their tensors in the order in which the model takes them as they are; empty if it does not.
        ordered: whether the tensors are in that order.
        key, rows: as of their `Part`; `rows` is 0 where that is not known.
    """

    inputs: tuple[str, ...]
    ordered: bool
    key: Key
    rows: int


class Kinds:
    """The kinds of one version. Model threads only.

    Attributes:
        known: by kind.
    """

    def __init__(self) -> None:
        self.known: dict[Kind, Known] = {}

    def note(self, kind: Kind, batching: Batching | None, part: Part) -> None:
        """Keep what `part` tells of all requests of that kind."""
        payload: Any = part.request.payload
        if any(array.dtype.hasobject for array in payload.values()):  # strings: they are looked at each time
            return
        inputs = unchanged(part.inputs, payload)
        same = batching is not None and not batching.pads_inputs
        if len(self.known) >= _MOST_KINDS:
            self.known = {}
        rows = part.rows if same else 0
        key = part.key if rows else ()  # that of a request which shares no call leads to the request itself
        self.known[kind] = Known(inputs, inputs == tuple(payload), key, rows)
