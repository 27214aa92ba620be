"""Whether a torch.export program holds only what torch.export writes, so that no Python code in the file runs when it
is loaded or called.

torch evaluates size expressions and guards as Python, writes names and constants into the Python source that it
generates, calls operators by the names in the graph, and imports the classes that a container's description names.
The checks here read these strings and evaluate none of them. They follow the serializer of torch 2.13
(`torch/_export/serde`): a newer one may write more, which is refused until it is listed here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch._export.serde import schema
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree


class UnsafeProgramError(ValueError):
    """The program holds something that torch.export does not write; the message names it."""


def check_program(kind: Any, value: Any, rule: Callable[[Any], None] | None = None) -> None:
    """Check a program, the list of its weights, or a part of them.

    Args:
        kind: what torch reads `value` as: a class of `torch._export.serde.schema`, or a type of a member of one.
        value: parsed JSON.
        rule: what is checked of each string; of names that stand for nothing else if left out.

    Raises:
        UnsafeProgramError: a string in it is not one that torch.export writes there.
    """
    if get_origin(kind) in (Union, UnionType):  # with None, which is JSON's null
        kind = get_args(kind)[0]
    if is_dataclass(kind):
        if value is not None:
            _check_members(kind, value)
    elif isinstance(value, list):
        for item in value:
            check_program(next(iter(get_args(kind)), str), item, rule)
    elif isinstance(value, dict):
        for key, item in value.items():
            _text(key)
            check_program(next(iter(get_args(kind)[1:]), str), item, rule)
    elif isinstance(value, str):
        (rule or _text)(value)


def _check_members(kind: Any, value: Any) -> None:
    if not isinstance(value, dict):
        raise UnsafeProgramError(f"a {kind.__name__} that is not an object of JSON")
    types = _types(kind)
    for name, item in value.items():
        if name == "metadata":
            _metadata(item)
        elif name in types:  # torch leaves out the others
            rule = _RULES.get((kind.__name__, name)) or _RULES.get(("", name))
            if kind is schema.NamedArgument and name == "arg" and _is_literal(item):
                kind_of_item, rule = Any, _literal
            else:
                kind_of_item = types[name]
            check_program(kind_of_item, item, rule)


@cache
def _types(kind: Any) -> dict[str, Any]:
    """The types of a class's members; torch looks for them at each object, which takes most of its time."""
    return get_type_hints(kind, globalns=vars(schema))


def _is_literal(argument: Any) -> bool:
    return isinstance(argument, dict) and not argument.keys().isdisjoint(("as_string", "as_strings"))


def check_examples(value: Any) -> None:
    """Check the example inputs of a program, whose keys become part of the source of its guards.

    Raises:
        UnsafeProgramError: a key is not a plain one.
    """
    for path, _ in pytree.tree_flatten_with_path(value)[0]:
        for part in path:
            if isinstance(part, pytree.MappingKey):
                _text(str(part.key))


# Strings that torch only compares, or writes into source


def _text(value: str) -> None:
    """Without these characters no source can call anything or begin a new statement."""
    if re.search(r"[\x00-\x1f\x7f\"'`\\()\[\]{}@;#]", value):
        raise UnsafeProgramError(f"the name {_shown(value)}")


def _name(value: str) -> None:
    if not re.fullmatch(r"\w*", value):
        raise UnsafeProgramError(f"the name {_shown(value)}")


def _literal(value: str) -> None:
    """An operator's argument, which is written as a literal of Python or, for AOTInductor, of C++."""
    if re.search(r"[\x00-\x1f\x7f\"\\]", value):
        raise UnsafeProgramError(f"the argument {_shown(value)}")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 120 else value[:117] + "...")


# Operators

_OPERATOR = re.compile(r"torch\.ops\.(?P<namespace>\w+)\.(?P<name>\w+)(\.(?P<overload>\w+))?")
_SYMBOLIC = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)"
    r"|math\.[a-z]\w*|torch\._?sym_\w+"
    r"|torch\._functorch\.predispatch\.(lazy_load_decompositions|_(add|remove)_batch_dim|_vmap_(in|de)crement_nesting)"
)
_HIGHER_ORDER = re.compile(
    r"associative_scan|auto_functionalized(_v2)?|cond|flex_attention|hints_wrapper|invoke_subgraph|map_impl|out_dtype"
    r"|scan|strict_mode|tag_activation_checkpoint|while_loop|with_effects|wrap(_with_(autocast|set_grad_enabled))?"
)
"""Others load libraries (`aoti_call_delegate`), call methods by name (`call_torchbind`) or Python functions."""
_FILES = frozenset({"save", "from_file"})
"""Operators of aten that write or map files."""
_MAY_TAKE_STRINGS = frozenset({"aten", "prims", "quantized_decomposed"})
"""The namespaces whose operators may take strings: elsewhere these can be the names of files or of hosts. A string need
not stand beside its operator in the graph: other operators return strings, and call operators with theirs.
"""


def _operator(value: str) -> None:
    found = _OPERATOR.fullmatch(value)
    known = _SYMBOLIC.fullmatch(value) is not None if found is None else _is_operator(**found.groupdict())
    if not known:
        raise UnsafeProgramError(f"the operator {_shown(value)}")


def _is_operator(namespace: str, name: str, overload: str | None) -> bool:
    """Whether it is an operator that may be called; one that is not registered is torch's to refuse.

    Raises:
        UnsafeProgramError: it takes strings, and is not torch's own.
    """
    if namespace == "higher_order":
        return overload is None and _HIGHER_ORDER.fullmatch(name) is not None
    operators = getattr(torch.ops, namespace)
    if not isinstance(operators, torch._ops._OpNamespace) or (namespace == "aten" and name in _FILES):
        return False
    packet = getattr(operators, name, None)
    if packet is None:
        return True
    if not isinstance(packet, OpOverloadPacket):
        return False
    names = [overload] if overload else packet.overloads()  # type: ignore[no-untyped-call]
    overloads = [getattr(packet, each, None) for each in names]
    if not all(isinstance(each, OpOverload | None) for each in overloads):
        return False
    if namespace not in _MAY_TAKE_STRINGS and any(each is not None and _takes_strings(each) for each in overloads):
        raise UnsafeProgramError(f"the operator {_shown(f'torch.ops.{namespace}.{name}')}, which takes strings")
    return True


def _takes_strings(operator: OpOverload) -> bool:
    return any(re.search(r"\b(str|Any)\b", str(argument.type)) for argument in operator._schema.arguments)


# Metadata: free text, but for the names of functions, which kernels may be named by


def _metadata(value: Any) -> None:
    functions = value.get("source_fn_stack", "") if isinstance(value, Mapping) else None
    if not isinstance(functions, str):
        raise UnsafeProgramError("metadata of an unknown form")
    _text(functions.replace(";", ""))


# The description of nested containers, JSON in JSON

_FACTORIES = frozenset({"bool", "dict", "float", "int", "list", "set", "str", "tuple"})


def _container(value: str) -> None:
    try:
        parsed = json.loads(value)
    except ValueError:
        _text(value)
        return
    _container_part(parsed)


def _container_part(value: Any) -> None:
    if isinstance(value, str):
        _container(value)
    elif isinstance(value, list):
        for item in value:
            _container_part(item)
    elif isinstance(value, dict):
        if "__enum__" in value:
            raise UnsafeProgramError(f"the enumeration {_shown(str(value.get('fqn')))}")
        factory = value.get("default_factory_module", "builtins"), value.get("default_factory_name", "dict")
        if factory[0] != "builtins" or factory[1] not in _FACTORIES:
            raise UnsafeProgramError(f"the default factory {_shown('.'.join(map(str, factory)))}")
        for key, item in value.items():
            _text(key)
            _container_part(item)


# Expressions

_FUNCTIONS = re.compile(
    # sympy's
    r"Abs|Add|And|Eq|Equality|ExprCondPair|Ge|GreaterThan|Gt|Integer|Le|LessThan|Lt|Max|Min|Mod|Mul|Ne|Not|Or|Piecewise"
    r"|Pow|Rational|StrictGreaterThan|StrictLessThan|Unequality|ceiling|floor|sqrt"
    # torch's
    r"|CeilDiv|CeilToInt|CleanDiv|FloatPow|FloatTrueDiv|FloorDiv|FloorToInt|Identity|IntTrueDiv|LShift|ModularIndexing"
    r"|IsNonOverlappingAndDenseIndicator|PowByNatural|PythonMod|RShift|RoundDecimal|RoundToInt|ToFloat|TruncToFloat"
    r"|TruncToInt|Where|(OpaqueUnaryFn|BitwiseFn)_[a-z0-9_]+"
)
_POWERS = re.compile(r"Pow|PowByNatural|FloatPow|LShift|math\.pow|torch\._sym_pow")
_ATOMS = ("Integer", "Rational", "Symbol")
_MOST_EXPONENT = 64
"""A size has 63 bits, so it is not a higher power of a whole number."""
_GUARD_CALLS = re.compile(
    r"abs|max|min|round|math\.(ceil|floor|trunc|sqrt|pow|cosh?|acos|sinh?|asinh?|tanh?|atan|exp|log|log2|isnan)"
    r"|torch\.sym_(float|int|max|min|not|ite)|torch\._sym_\w+|IsNonOverlappingAndDenseIndicator"
)
_GUARD_NAMES = re.compile(r"math\.(inf|nan)|inf")
_SIZES = ("size", "stride", "storage_offset")
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
_SIGNS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


def _expression(value: str) -> None:
    """A size: numbers, symbols, arithmetic, comparisons, and calls of functions of sympy and torch by name."""
    if not _is_expression(value, _parts_of_size):
        raise UnsafeProgramError(f"the size expression {_shown(value)}")


def _guard(value: str) -> None:
    """A condition on inputs: as a size, but with Python's functions and the sizes of inputs, as `L['x'].size()[0]`."""
    if not _is_expression(value, _parts_of_condition):
        raise UnsafeProgramError(f"the guard {_shown(value)}")


def _is_expression(value: str, parts: Callable[[ast.AST], Sequence[ast.AST] | None]) -> bool:
    """Args:
    parts: the nodes below one that is not plain arithmetic that are expressions too; None: it is not allowed.
    """
    # sympy drops newlines before it parses: what follows a comment here would be code there.
    if not re.fullmatch(r"[\w .,()\[\]'+\-*/%<>=!&|^~]*", value, re.ASCII):
        return False
    try:
        left: list[ast.AST] = [ast.parse(value.strip(), mode="eval")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    while left:
        node = left.pop()
        if (power := _power(node)) is not None and not _is_small(*power):
            return False
        if isinstance(node, _ARITHMETIC):
            left += (part for part in ast.iter_child_nodes(node) if not isinstance(part, _SIGNS))
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float)):
            below = parts(node)
            if below is None:
                return False
            left += below
    return True


def _power(node: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    """The base and the exponent of a power, or of a shift to the left, which grows as fast."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return node.left, node.right
    if isinstance(node, ast.Call) and _POWERS.fullmatch(ast.unparse(node.func)) and len(node.args) == 2:
        return node.args[0], node.args[1]
    return None


def _is_small(base: ast.AST, exponent: ast.AST) -> bool:
    """Whether a power is computed fast: `9**9**9` would hold the interpreter, and so all models, for ever."""
    for part in ast.walk(exponent):
        if isinstance(part, ast.Constant) and isinstance(part.value, int | float) and abs(part.value) > _MOST_EXPONENT:
            return False
        if isinstance(part, ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp):
            return False
        if isinstance(part, ast.Call) and not _is_of_input(part) and ast.unparse(part.func) not in _ATOMS:
            return False
    return not any(_power(part) for part in ast.walk(base))


def _parts_of_size(node: ast.AST) -> Sequence[ast.AST] | None:
    if isinstance(node, ast.Name):
        return None if node.id.startswith("_") else ()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    name = node.func.id
    if name in ("Symbol", "Float"):
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg)]
        plain = len(values) == len(node.args) + len(node.keywords) and all(
            isinstance(value, ast.Constant) and re.fullmatch(r"[\w.+\-]+", str(value.value)) for value in values
        )
        return () if plain else None
    return node.args if _FUNCTIONS.fullmatch(name) and not node.keywords else None


def _parts_of_condition(node: ast.AST) -> Sequence[ast.AST] | None:
    if _is_of_input(node):
        return ()
    if isinstance(node, ast.Call):
        return node.args if _GUARD_CALLS.fullmatch(ast.unparse(node.func)) and not node.keywords else None
    return () if isinstance(node, ast.Name | ast.Attribute) and _GUARD_NAMES.fullmatch(ast.unparse(node)) else None


def _is_of_input(node: ast.AST) -> bool:
    """Whether `node` is a part or a size of an input, such as `L['x'][0].size()[1]`."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            place = node.slice
            if not (isinstance(place, ast.Constant) and re.fullmatch(r"[\w .\-]+", str(place.value))):
                return False
            node = node.value
        elif isinstance(node, ast.Attribute) and not node.attr.startswith("_"):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SIZES:
            if node.args or node.keywords:
                return False
            node = node.func.value
        else:
            return False
    return node.id == "L"


_RULES: Mapping[tuple[str, str], Callable[[Any], None]] = {
    ("", "name"): _name,
    ("", "as_name"): _name,
    ("", "forward_arg_names"): _name,
    ("SymExpr", "expr_str"): _expression,
    ("ExportedProgram", "guards_code"): _guard,
    ("Node", "target"): _operator,
    ("Argument", "as_operator"): _operator,
    ("ModuleCallSignature", "in_spec"): _container,
    ("ModuleCallSignature", "out_spec"): _container,
}
"""By class and member, or by member alone; elsewhere `_text`."""
