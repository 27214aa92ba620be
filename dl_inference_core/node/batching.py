"""Rows of several requests in one call of the model: who may share one, how they are put together and taken apart.

The first dimension of every input and output is rows. A batch is counted in rows, not in requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from dl_inference_core.config import PluginOptions
from dl_inference_core.node.backend import Signature
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Request

Key: TypeAlias = "tuple[Any, ...]"
"""What requests of one batch have in common: the signature, and of each input its name, dtype and size of a row."""

Join: TypeAlias = "Callable[[Sequence[Any]], Any]"
"""Puts arrays, or the framework's tensors, together along their first dimension."""


class NotRowwise(Exception):
    """A model's outputs have other rows than its inputs."""


class Bucket(PluginOptions):
    """How inputs of several lengths may share a batch: each numpy array is padded to the next of some lengths; the
    framework's own tensors stay as they are."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    to: tuple[int, ...] = Field(min_length=1, strict=False)
    """the lengths; what is longer than all of them stays as it is"""
    axis: int = Field(default=1, ge=1)
    """the dimension that is padded"""
    value: float = 0
    """what it is padded with; the model must know it for padding"""
    outputs: tuple[str, ...] = Field(default=(), strict=False)
    """the outputs that have that dimension too, and are cut to the length that the input had"""


class BatchingConfig(PluginOptions):
    """How requests share a call of the model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    enabled: bool | Literal["auto"] = True
    """whether they do; "auto", which holds where there is no table, is where the first dimension of every input and
    output is free, samples show that a row's answer is the same alone and among others, and the handler's methods are
    the default's, or it says that it may be (`shares_calls`, or a `run_batch` of its own)"""
    max_rows: int = Field(default=64, ge=1)
    """rows of a batch at most; a request that has more is answered in several calls, or, with "auto", in one of its
    own"""
    max_delay_us: int = Field(default=0, ge=0, le=10_000_000)
    """how long, from its arrival, the first request of a batch that is not full may be held for others to come; 0 takes
    what is there. It is not held once as many requests are there as were at one time in the last second or two: who
    waits for an answer sends no more"""
    preferred_rows: tuple[int, ...] = Field(default=(), strict=False)
    """a batch of so many rows is not held"""
    allowed_rows: tuple[int, ...] = Field(default=(), strict=False)
    """the sizes that the model is called with, padded by copies of the last row; any if empty"""
    buckets: dict[str, Bucket] = Field(default={})
    """by input"""
    tolerance: float = Field(default=1e-3, ge=0)
    """by how much of its largest value an answer may differ from that of the same row alone; looked at when the model
    is loaded, where there are samples"""

    @model_validator(mode="after")
    def _sizes(self) -> BatchingConfig:
        for name, sizes in (("preferred_rows", self.preferred_rows), ("allowed_rows", self.allowed_rows)):
            if any(not 1 <= size <= self.max_rows for size in sizes):
                raise ValueError(f"{name}: expected sizes from 1 to max_rows, {self.max_rows}; got {list(sizes)}")
        if self.allowed_rows and max(self.allowed_rows) != self.max_rows:
            raise ValueError(f"allowed_rows: the largest is {max(self.allowed_rows)}, and max_rows {self.max_rows}")
        return self


@dataclass(slots=True)
class Part:
    """What one request brings into a batch.

    Attributes:
        inputs: may be the request's own payload, which nobody changes: see `taken_inputs`.
        rows: 0 if it can share none.
        cut: by output the dimension and the length to which it is cut; None cuts none.
    """

    queued: Any
    request: Request
    inputs: Mapping[str, Any]
    key: Key
    rows: int
    cut: Mapping[str, tuple[int, int]] | None = None

    @classmethod
    def alone(cls, queued: Any, request: Request, inputs: Any) -> Part:
        """That of a request which shares no call of the model."""
        return cls(queued, request, inputs, (queued,), 0)

    def taken_inputs(self) -> Any:
        """The inputs for a call of the model, which may change a dict that it is given."""
        given = self.inputs
        return dict(given) if type(given) is dict and given is self.request.payload else given


class Batching:
    """How one version batches. Any thread.

    Attributes:
        signatures: the names of those whose requests may share batches; None is all.
    """

    def __init__(
        self,
        config: BatchingConfig,
        join: Join,
        signatures: Iterable[str] | None = None,
        unchecked: Mapping[str, Signature] = MappingProxyType({}),
    ) -> None:
        """Args:
        unchecked: by name, the signatures that leave shapes to the model. A request whose inputs do not have such a
            signature's shapes is run alone, and is neither padded nor split.
        """
        self.max_rows = config.max_rows
        self.delay_s = config.max_delay_us / 1e6
        self.tolerance = config.tolerance
        self.preferred = frozenset((*config.preferred_rows, config.max_rows))
        self._allowed = tuple(sorted(config.allowed_rows))
        self._buckets = {name: (bucket, sorted(bucket.to)) for name, bucket in config.buckets.items()}
        self._splits = config.enabled is True
        self._join = join
        self._unchecked = unchecked
        self.signatures = None if signatures is None else frozenset(signatures)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that it is worth to run the model with before it is ready."""
        if self._allowed:
            return self._allowed
        return (*(2**n for n in range(self.max_rows.bit_length()) if 2**n < self.max_rows), self.max_rows)

    def next_size(self, rows: int) -> int:
        """The next size that is not held, of more than so many rows, which are fewer than `max_rows`."""
        return min(size for size in self.preferred if size > rows)

    @property
    def pads_inputs(self) -> bool:
        """Whether inputs of several lengths share batches: then parts with the same shapes may have different keys."""
        return bool(self._buckets)

    def part(self, queued: Any, request: Request, inputs: Any) -> Part:
        """What a request brings, whose `inputs` are what the handler made of it."""
        alone = Part.alone(queued, request, inputs)
        signature = request.signature or DEFAULT_SIGNATURE
        if self.signatures is not None and signature not in self.signatures:
            return alone
        if not isinstance(inputs, Mapping) or not inputs:
            return alone
        unchecked = self._unchecked.get(signature)
        if unchecked is not None and not unchecked.fits_shapes(inputs):
            return alone
        cut: Mapping[str, tuple[int, int]] | None = None
        if self._buckets:
            inputs, cut = self._bucketed(inputs)
        key: list[Any] = [signature]
        rows = -1
        try:
            for name, value in inputs.items():
                count, *row = value.shape
                if rows not in (-1, count):
                    return alone
                rows = count
                key += (name, value.dtype, tuple(row))
        except (AttributeError, TypeError, ValueError):  # no array, or one without dimensions
            return alone
        return Part(queued, request, inputs, tuple(key), rows, cut) if rows else alone

    def _bucketed(self, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, tuple[int, int]]]:
        padded = dict(inputs)
        cut: dict[str, tuple[int, int]] = {}
        for name, (bucket, sizes) in self._buckets.items():
            array = inputs.get(name)
            if not isinstance(array, np.ndarray) or array.ndim <= bucket.axis:
                continue
            length = array.shape[bucket.axis]
            index = bisect_left(sizes, length)
            if index == len(sizes):
                continue
            widths = [(0, 0)] * array.ndim
            widths[bucket.axis] = (0, sizes[index] - length)
            padded[name] = np.pad(array, widths, constant_values=array.dtype.type(bucket.value))
            cut.update((output, (bucket.axis, length)) for output in bucket.outputs)
        return padded, cut

    def batches(self, parts: list[Part]) -> list[list[Part]]:
        """`parts` in batches, the first ones first: none with more rows than it may have, unless one part alone has."""
        if len(parts) == 1:
            return [parts]
        by_key: dict[Key, list[Part]] = {}
        key: Key | None = None
        for part in parts:
            if part.key is not key:  # those of one kind have the same
                key = part.key
                alike = by_key.setdefault(key, [])
            alike.append(part)
        return [batch for alike in by_key.values() for batch in self._split(alike)]

    def _split(self, parts: list[Part]) -> Iterator[list[Part]]:
        if sum([part.rows for part in parts]) <= self.max_rows:
            yield parts
            return
        batch: list[Part] = []
        rows = 0
        for part in parts:
            if batch and rows + part.rows > self.max_rows:
                yield batch
                batch, rows = [], 0
            batch.append(part)
            rows += part.rows
        yield batch

    def run(
        self,
        parts: Sequence[Part],
        model: Callable[[Any], Any],
        between: Callable[[Sequence[Part]], None] = lambda parts: None,
        called: Callable[[int], None] = lambda rows: None,
    ) -> list[Any]:
        """Each part's outputs, of calls of `model` with the rows of all together.

        Args:
            between: called before each call of `model` but the first; it may raise to end the batch.
            called: told of each call of `model` that succeeded, with the number of rows of requests in it: copies that
                fill it up to one of `allowed_rows` do not count.

        Raises:
            NotRowwise: the outputs cannot be taken apart.
            Exception: what `model` raised.
        """
        rows = sum([part.rows for part in parts])
        inputs = parts[0].taken_inputs()
        if len(parts) == 1 and not self._is_remade(rows):
            outputs = model(inputs)
            called(rows)
            return [_cut(outputs, parts[0].cut)]
        if len(parts) > 1:
            inputs = {name: self._join([part.inputs[name] for part in parts]) for name in inputs}
        if rows <= self.max_rows:
            outputs = self._call(inputs, rows, model, called)
        else:
            outputs = self._in_pieces(inputs, rows, model, lambda: between(parts), called)
        shares: list[Any] = [{} for _ in parts]
        for name, value in outputs.items():
            for share, piece in zip(shares, _pieces(value, parts), strict=True):
                share[name] = piece
        return [_cut(share, part.cut) for share, part in zip(shares, parts, strict=True)] if self._buckets else shares

    def _is_remade(self, rows: int) -> bool:
        """Whether inputs of so many rows, of one request, are split or padded."""
        return self._splits if rows > self.max_rows else bool(self._allowed and rows) and rows not in self._allowed

    def _in_pieces(
        self,
        inputs: Mapping[str, Any],
        rows: int,
        model: Callable[[Any], Any],
        between: Callable[[], None],
        called: Callable[[int], None],
    ) -> Any:
        pieces = []
        for start in range(0, rows, self.max_rows):
            if start:
                between()
            piece = {name: value[start : start + self.max_rows] for name, value in inputs.items()}
            pieces.append(self._call(piece, min(self.max_rows, rows - start), model, called))
        return {name: self._join([piece[name] for piece in pieces]) for name in pieces[0]}

    def _call(
        self, inputs: Mapping[str, Any], rows: int, model: Callable[[Any], Any], called: Callable[[int], None]
    ) -> Any:
        size = self._allowed[bisect_left(self._allowed, rows)] if self._allowed else rows
        if size > rows:
            more = size - rows
            inputs = {name: self._join([value, *[value[-1:]] * more]) for name, value in inputs.items()}
        outputs = model(inputs)
        called(rows)
        for name, value in _named(outputs):
            if not getattr(value, "shape", None) or value.shape[0] != size:
                raise NotRowwise(
                    f'output "{name}" has the shape {list(getattr(value, "shape", ()))} for inputs of {size} rows'
                )
        return outputs if size == rows else {name: value[:rows] for name, value in outputs.items()}


def _named(outputs: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(outputs, Mapping):
        raise NotRowwise(f"the outputs are a {type(outputs).__qualname__}, no tensors by name")
    return outputs.items()


def _pieces(value: Any, parts: Sequence[Part]) -> Iterable[Any]:
    """The rows of each part, of an output that has those of all."""
    if isinstance(value, np.ndarray) and len(value) == len(parts):
        return value[:, None]  # a row each: to iterate takes 0.1 µs less than to slice
    stops = list(accumulate([part.rows for part in parts]))
    return [value[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _cut(outputs: Any, cut: Mapping[str, tuple[int, int]] | None) -> Any:
    if not cut:
        return outputs
    shorter = {
        name: outputs[name][(slice(None),) * axis + (slice(length),)]
        for name, (axis, length) in cut.items()
        if name in outputs
    }
    return {**outputs, **shorter}
