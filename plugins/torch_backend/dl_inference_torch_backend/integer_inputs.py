"""Which inputs of a module hold integers, such as the indices of an embedding; a module does not state it.

An input holds integers if it, or what becomes of it by shifts and reshapes, is an index or is converted to integers,
and meets no operator with floating-point weights. Operators that make indices of floats, such as `bucketize` and
`floor`, tell nothing. A TorchScript module says so by its graph. The forward of another
module is run on probes, which stand for tensors and note the operators that they meet. torch.fx could trace it too, but
it replaces `Module.__call__` for every thread while it does, and other models answer requests meanwhile.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch.utils import _pytree as pytree

_INDICES = frozenset({"embedding", "embedding_bag", "one_hot", "bincount", "long", "int", "_cast_Long", "_cast_Int"})
"""Operators that take integers, or make integers of their input."""
_INDEXED = frozenset({"index", "index_select", "gather", "take", "take_along_dim", "__getitem__", "getitem"})
"""Operators of which every tensor but the first is an index."""
_WEIGHTED = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "bilinear", "prelu", "lstm", "gru", "rnn_")
"""How the names of operators begin that take floating-point weights; so do convolutions and norms."""
_CONVERSIONS = frozenset({"to", "type"})
_TELLS_NOTHING = frozenset(
    {"size", "dim", "len", "numel", "device", "dtype", "item", "Int", "Float", "Bool", "__is__", "__isnot__"}
    | {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "float", "double", "half", "bfloat16", "type_as"}
    | {"bucketize", "searchsorted", "argmax", "argmin", "argsort", "sort", "topk", "nonzero"}
    | {"floor", "ceil", "round", "trunc", "frac", "sigmoid", "tanh", "softmax", "exp", "log", "log1p", "log2", "sqrt"}
)
"""Operators that take any numbers, and whose results tell nothing of their input's kind."""
_ARITHMETIC = frozenset({"add", "sub", "mul", "add_", "sub_", "mul_"})
_DIVISIONS = frozenset({"div", "div_", "divide", "true_divide", "truediv"})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_INTEGER_NUMBERS = frozenset({0, 1, 2, 3, 4})
"""The same dtypes, by the numbers that TorchScript has for them."""
_SIZE = 2
"""Of every dimension of a probe."""
_RANKS = (2, 3, 4, 1)
"""The numbers of dimensions that probes have, one after the other, until the forward takes them."""
_MOST_QUESTIONS = 10_000
"""A forward that asks probes more often for their truth or items is taken to loop for ever."""


class _Uses:
    """What the inputs of a module meet.

    Attributes:
        integers, floats: the names of inputs that are used as indices, or meet weights.
    """

    def __init__(self) -> None:
        self.integers: set[str] = set()
        self.floats: set[str] = set()

    def note(
        self, sources: Iterable[str], operation: str, place: int, *, converts: bool, makes_fractions: bool
    ) -> bool:
        """Note that values made of the inputs `sources` meet an operator.

        Args:
            place: 0 if they are its first argument.
            converts: whether it converts them to integers.
            makes_fractions: as of `_makes_fractions`.

        Returns:
            whether its result is made of them, too.
        """
        if operation in _INDICES or converts or (operation in _INDEXED and place):
            self.integers.update(sources)
            return False
        if operation.startswith(("conv", "_conv", *_WEIGHTED)) or operation.endswith("_norm"):
            self.floats.update(sources)
            return False
        return not makes_fractions and operation not in _TELLS_NOTHING and operation not in _CONVERSIONS

    def found(self) -> frozenset[str]:
        return frozenset(self.integers - self.floats)


def of_scripted(module: torch.jit.ScriptModule) -> frozenset[str]:
    """The names of the inputs of `module` that hold integers."""
    graph: Any = module.forward.inlined_graph  # type: ignore[attr-defined]
    becomes: dict[str, list[Any]] = defaultdict(list)
    for node in _nodes(graph):
        for block in node.blocks():
            loops = node.kind() == "prim::Loop"  # its first input, and the first output of its block, is a condition
            for inner, outer in zip(list(block.outputs())[loops:], node.outputs(), strict=False):
                becomes[inner.debugName()].append(outer)
            for outer, inner in zip(list(node.inputs())[2:], list(block.inputs())[1:], strict=False):
                becomes[outer.debugName()].append(inner)
    uses = _Uses()
    arguments: Any = module.forward.schema.arguments  # type: ignore[attr-defined]
    for argument, value in list(zip(arguments, graph.inputs(), strict=True))[1:]:
        seen: set[str] = set()
        values = [value]
        while values:
            value = values.pop()
            if value.debugName() in seen:
                continue
            seen.add(value.debugName())
            values += becomes[value.debugName()]
            for use in value.uses():
                operation = use.user.kind().partition("::")[2]
                operands = [operand.type() for operand in use.user.inputs()]
                has_float = any(isinstance(kind, torch.FloatType) for kind in operands)
                makes_fractions = _makes_fractions(operation, len(operands), has_float)
                converts = _converts(use.user, operation)
                if uses.note(
                    {argument.name}, operation, use.offset, converts=converts, makes_fractions=makes_fractions
                ):
                    values += use.user.outputs()
    return uses.found()


def _makes_fractions(operation: str, operands: int, has_float: bool) -> bool:
    """Whether an operator gives fractions for integers, so that its result tells nothing of their kind.

    Args:
        operands: how many arguments it has; a division has a third one only to round.
        has_float: whether a floating-point number is among them.
    """
    return (operation in _DIVISIONS and operands == 2) or (operation in _ARITHMETIC and has_float)


def constants(module: torch.jit.ScriptModule) -> Iterator[torch.Tensor]:
    """The tensors that the graph of `module` holds."""
    for node in _nodes(module.forward.inlined_graph):  # type: ignore[attr-defined]
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.t("value")


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _converts(node: Any, operation: str) -> bool:
    """Whether a node of TorchScript's graph converts its input to integers."""
    if operation not in _CONVERSIONS:
        return False
    constants = [value.toIValue() for value in list(node.inputs())[1:3]]
    return any(type(value) is int and value in _INTEGER_NUMBERS for value in constants)


def of_module(module: torch.nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of `names`, parameters of the forward of `module`, that hold integers.

    The forward runs on probes until it ends or a probe makes it fail; what it would do afterwards counts for nothing.
    It is the forward of a copy that shares the weights, since a forward may write to buffers and attributes.
    """
    uses = _Uses()
    weights = {id(weight): weight for weight in module.parameters()}
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    with torch.no_grad(), suppress(Exception):  # a module that cannot be copied
        forward = copy.deepcopy(module, weights).forward
        parameters = inspect.signature(forward).parameters.values()
        by_place = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
        for rank, truth in product(_RANKS, (False, True)):
            probing = _Probing(uses, rank, truth, device)
            given = {name: _Probe(probing, {name}) for name in names}
            with suppress(Exception, SystemExit):  # a forward may raise anything for values that are not tensors
                forward(*[given.pop(name) for name in by_place if name in given], **given)
                break
    return uses.found()


class _Probing:
    """One run of a forward on probes.

    Attributes:
        rank: the number of dimensions of each probe.
        truth: the truth of each probe.
        device: the device of the weights.
    """

    def __init__(self, uses: _Uses, rank: int, truth: bool, device: torch.device) -> None:
        self.uses = uses
        self.rank = rank
        self.truth = truth
        self.device = device
        self._questions = 0

    def ask(self) -> None:
        self._questions += 1
        if self._questions > _MOST_QUESTIONS:
            raise RuntimeError("the forward does not end")

    def call(self, operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operator returns for arguments in which there are probes."""
        self.ask()
        operands = (*args, *kwargs.values())
        dtypes = [value for value in operands if isinstance(value, torch.dtype)]
        converts = operation in _CONVERSIONS and not _INTEGERS.isdisjoint(dtypes)
        has_float = any(isinstance(value, float) for value in operands)
        makes_fractions = _makes_fractions(operation, len(operands), has_float)
        made_of: set[str] = set()
        for place, value in enumerate(operands):
            sources = {name for leaf in pytree.tree_leaves(value) if isinstance(leaf, _Probe) for name in leaf.sources}
            if sources and self.uses.note(
                sources, operation, place, converts=converts, makes_fractions=makes_fractions
            ):
                made_of |= sources
        if operation in ("size", "dim"):
            sizes = torch.Size([_SIZE] * self.rank)
            return self.rank if operation == "dim" else sizes if len(args) == 1 and not kwargs else _SIZE
        return _Probe(self, made_of)


class _Probe:
    """Stands for a tensor. It is not a `torch.Tensor`, so no operator computes anything."""

    is_sparse = is_nested = is_quantized = requires_grad = False
    dtype = torch.float32

    def __init__(self, probing: _Probing, sources: set[str]) -> None:
        """Args:
        sources: the inputs that it is made of.
        """
        self.probing = probing
        self.sources = sources

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        probe = next(leaf for leaf in leaves if isinstance(leaf, cls))
        return probe.probing.call(function.__name__, args, kwargs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([_SIZE] * self.probing.rank)

    @property
    def device(self) -> torch.device:
        return self.probing.device

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        return self.probing.call("t", (self,), {})

    mT = data = T  # noqa: N815

    @property
    def ndim(self) -> int:
        return self.probing.rank

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.probing.call(name, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self.probing.call("getitem", (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.probing.call("getitem", (self, index), {})

    def __iter__(self) -> Iterator[Any]:
        return iter([self[0]] * _SIZE)

    def __len__(self) -> int:
        return _SIZE

    def __bool__(self) -> bool:
        self.probing.ask()
        return self.probing.truth

    def __index__(self) -> int:
        return _SIZE

    def __float__(self) -> float:
        return float(_SIZE)


def _operator(name: str, *, reflected: bool = False) -> Callable[..., Any]:
    def call(self: _Probe, *others: Any) -> Any:
        return self.probing.call(name, (*others, self) if reflected else (self, *others), {})

    return call


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(_Probe, f"__{_name}__", _operator(_name))
    setattr(_Probe, f"__r{_name}__", _operator(_name, reflected=True))
for _name in ("neg", "invert", "abs", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Probe, f"__{_name}__", _operator(_name))
_Probe.__hash__ = object.__hash__  # type: ignore[method-assign]
