"""What a hostile `.pt2` archive may do when it is loaded: nothing, unless the operator pinned it; and that what
torch.export writes is loaded."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dl_inference_torch_backend.testing import Evil, exported, load, refusal, saved, sha256, zipped
from torch._export.serde.schema import SCHEMA_VERSION
from torch.export.pt2_archive import PT2ArchiveWriter


def records_of_program() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(exported())) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def altered(change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """A program whose records were changed."""
    records = records_of_program()
    change(records)
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            if not name.startswith(".data") and name != "byteorder":
                writer.write_bytes(name, content)
    return buffer.getvalue()


def edited(content: bytes, change: Callable[[Any], Any]) -> bytes:
    value = json.loads(content)
    change(value)
    return json.dumps(value).encode()


def pickled_weight(records: dict[str, bytes], trace: Path) -> None:
    name = "data/weights/model_weights_config.json"
    records["data/weights/weight_0"] = saved(Evil(trace))
    records[name] = edited(records[name], lambda value: value["config"]["weight"].update(use_pickle=True))


def opaque_constant(records: dict[str, bytes], trace: Path) -> None:
    constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    name = "data/constants/model_constants_config.json"
    records["data/constants/opaque_obj_0"] = pickle.dumps(Evil(trace))
    records[name] = edited(records[name], lambda value: value["config"].update(c=constant))


HOSTILE_RECORDS: dict[str, tuple[Callable[[dict[str, bytes], Path], Any], str]] = {
    "example inputs": (
        lambda records, trace: records.update({"data/sample_inputs/model.pt": saved((Evil(trace),))}),
        "data/sample_inputs/model.pt",
    ),
    "example inputs in capitals": (
        lambda records, trace: (
            records.pop("data/sample_inputs/model.pt"),
            records.update({"DATA/Sample_Inputs/model.PT": saved((Evil(trace),))}),
        ),
        "DATA/Sample_Inputs/model.PT",
    ),
    "weights of an older format": (
        lambda records, trace: records.update({"data/weights/model.pt": saved({"weight": Evil(trace)})}),
        "data/weights/model.pt",
    ),
    "a pickled weight": (pickled_weight, "weight_0"),
    "an opaque constant": (opaque_constant, "opaque_obj_0"),
    "compiled code": (
        lambda records, trace: records.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
        "data/aotinductor/model/x.so",
    ),
}


@pytest.mark.parametrize(("change", "named"), HOSTILE_RECORDS.values(), ids=HOSTILE_RECORDS)
def test_a_program_with_a_pickle_or_compiled_code_in_it_is_refused(folder, trace, change, named):
    path = folder / "model.pt2"
    path.write_bytes(altered(lambda records: change(records, trace)))
    message = refusal(folder)
    assert named in message
    assert f'`sha256 = ["{sha256(path)}"]`' in message
    assert not trace.exists()


def named_apart(records: dict[str, bytes], trace: Path) -> dict[str, bytes]:
    """The longest name of a model of which torch's reader lists all records but the example inputs by their whole
    names."""
    long = "x" * 485
    return {
        **{name: records[name] for name in ("archive_format", "archive_version", "byteorder")},
        "version": b"3\n",
        f"models/{long}.json": records["models/model.json"],
        f"data/weights/{long}.pt": saved({}),
        f"data/constants/{long}.pt": saved({}),
        f"data/sample_inputs/{long}.pt": saved((Evil(trace),)),
    }


def repeated(records: dict[str, bytes], trace: Path) -> dict[str, bytes]:
    """The same, and a harmless record of the name that is listed."""
    named = named_apart(records, trace)
    listed = f"data/sample_inputs/{'x' * 485}"[: 511 - len("archive/")]
    return {**named, listed: saved(())}


@pytest.mark.parametrize("change", [named_apart, repeated])
def test_a_record_that_torch_finds_by_another_name_than_it_lists_is_refused(folder, trace, change):
    (folder / "model.pt2").write_bytes(zipped(change(records_of_program(), trace), root="archive/"))
    assert "names are too long or not unique" in refusal(folder)
    assert not trace.exists()
    refusal(folder, sha256=[sha256(folder / "model.pt2")])
    assert trace.exists(), "or this test proves nothing"


def test_an_archive_of_torch_2_7_is_not_loaded_since_it_is_all_pickles(folder, trace):
    """Nor where it is appended to a new one that fails: torch.export.load would go on with it."""
    program: list[bytes] = []

    def change(records: dict[str, bytes]) -> None:
        program.append(records["models/model.json"])
        del records["data/sample_inputs/model.pt"]

    new = io.BytesIO(altered(change))
    old = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": program[0],
        "serialized_state_dict.pt": saved({}),
        "serialized_constants.pt": saved({}),
        "serialized_example_inputs.pt": saved((Evil(trace),)),
    }
    with zipfile.ZipFile(new, "a") as archive:
        for name, content in old.items():
            archive.writestr(name, content)
    for content in (zipped(old), new.getvalue()):
        (folder / "model.pt2").write_bytes(content)
        assert "model.pt2" in refusal(folder)
        assert not trace.exists()


Change = Callable[[Any, str], Any]
"""Puts an expression into a program that is parsed JSON."""


def everywhere(value: Any, key: str, new: Any) -> None:
    """Replace each value of that key, at any depth."""
    for name, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
        if name == key:
            value[name] = new
        elif isinstance(item, dict | list):
            everywhere(item, key, new)


def rename_input(program: Any, name: str) -> None:
    """Give the input of the graph another name, wherever it stands."""
    graph = program["graph_module"]["graph"]
    old = graph["inputs"][-1]["as_tensor"]["name"]
    text = json.dumps(program).replace(json.dumps(old), json.dumps(name))
    program.update(json.loads(text))


def container(context: Any) -> str:
    """The description of the arguments of a program that takes one tensor."""
    leaf = {"type": None, "context": None, "children_spec": []}
    arguments = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    keywords = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [arguments, keywords]}])


def call(target: str, *arguments: Any) -> dict[str, Any]:
    """A node that calls something before all others."""
    inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
    return {"target": target, "inputs": inputs, "outputs": [], "metadata": {}, "name": "called"}


def first_signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def insert(program: Any, node: Any) -> None:
    program["graph_module"]["graph"]["nodes"].insert(0, node)


def rename_weight(program: Any, name: str) -> None:
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = name
            return


def as_string(value: str) -> dict[str, str]:
    return {"as_string": value}


TAKES_STRINGS = "torch.ops.profiler._record_function_enter"
"""An operator that is always registered, outside the namespaces whose operators may take strings."""

# By what is hostile: the change, and words of the refusal. `{code}` is an expression that makes the trace.
HOSTILE_GRAPHS: dict[str, tuple[Change, str]] = {
    "a size": (
        lambda program, code: everywhere(program, "expr_str", f"{code} or Symbol('s77', positive=True, integer=True)"),
        "the size expression",
    ),
    "a symbol's name": (
        lambda program, code: everywhere(program, "expr_str", f'Symbol("{code}", integer=True)'),
        "the size expression",
    ),
    "a guard": (lambda program, code: program.update(guards_code=[f"{code} == 0"]), "the guard"),
    "a guard with a method": (lambda program, code: program.update(guards_code=["L['input'].tolist()"]), "the guard"),
    "an operator": (
        lambda program, code: insert(program, call("torch.os.system", as_string(code))),
        "the operator 'torch.os.system'",
    ),
    "an operator among arguments by name": (
        lambda program, code: insert(
            program,
            call(
                "torch.ops.higher_order.flex_attention",
                {"as_string_to_argument": {"a": {"as_operator": "torch.os.system"}}},
            ),
        ),
        "the operator 'torch.os.system'",
    ),
    "an operator as an argument": (
        lambda program, code: insert(
            program, call("torch.ops.higher_order.with_effects", {"as_operator": "torch.os.system"}, as_string(code))
        ),
        "the operator 'torch.os.system'",
    ),
    "an attribute of an operator": (
        lambda program, code: insert(program, call("torch.ops.load_library.__call__", as_string("/x.so"))),
        "the operator 'torch.ops.load_library.__call__'",
    ),
    "an operator that loads a library": (
        lambda program, code: insert(program, call("torch.ops.higher_order.aoti_call_delegate", as_string("/x.so"))),
        "the operator 'torch.ops.higher_order.aoti_call_delegate'",
    ),
    "an operator that writes files": (
        lambda program, code: insert(program, call("torch.ops.aten.save.default", as_string("/x"))),
        "the operator 'torch.ops.aten.save.default'",
    ),
    "an operator of another library that takes strings": (
        lambda program, code: insert(program, call(f"{TAKES_STRINGS}.default", as_string("/x"))),
        f"the operator '{TAKES_STRINGS}', which takes strings",
    ),
    "an operator of another library that is called with strings by another operator": (
        lambda program, code: insert(
            program,
            call("torch.ops.higher_order.auto_functionalized", {"as_operator": TAKES_STRINGS}, as_string("/x")),
        ),
        f"the operator '{TAKES_STRINGS}', which takes strings",
    ),
    "a string for C++": (
        lambda program, code: insert(program, call("torch.ops.aten.add.Tensor", as_string('"); evil(); ("'))),
        "the argument",
    ),
    "an input's name": (lambda program, code: rename_input(program, f"x={code}"), "the name"),
    "a parameter's name": (
        lambda program, code: first_signature(program).update(forward_arg_names=[f"x={code}"]),
        "the name",
    ),
    "a weight's name": (lambda program, code: rename_weight(program, f'"+str({code})+"'), "the name"),
    "a keyword": (
        lambda program, code: first_signature(program).update(
            in_spec=container(json.dumps([f"x={code}"])), forward_arg_names=None
        ),
        "the name",
    ),
    "an enumeration": (
        lambda program, code: first_signature(program).update(
            in_spec=container(json.dumps([{"__enum__": True, "fqn": "os:environ", "name": "PATH"}]))
        ),
        "the enumeration 'os:environ'",
    ),
    "a default factory": (
        lambda program, code: first_signature(program).update(
            out_spec=container({"default_factory_module": "os", "default_factory_name": "abort", "dict_context": ["x"]})
        ),
        "the default factory 'os.abort'",
    ),
    "a constant": (
        lambda program, code: program["graph_module"]["graph"]["inputs"].append(as_string(f"' + {code} + '")),
        "the name",
    ),
    "a function's name in the metadata": (
        lambda program, code: program["graph_module"]["graph"]["nodes"][0]["metadata"].update(
            source_fn_stack=f"x,{code}"
        ),
        "the name",
    ),
}


def hostile_graph(change: Change, trace: Path) -> bytes:
    code = f"open('{trace}', 'w').close()"
    name = "models/model.json"
    return altered(lambda records: records.update({name: edited(records[name], lambda value: change(value, code))}))


@pytest.mark.parametrize(("change", "words"), HOSTILE_GRAPHS.values(), ids=HOSTILE_GRAPHS)
def test_a_graph_that_torch_export_would_not_write_is_refused_unless_it_is_pinned(folder, trace, change, words):
    path = folder / "model.pt2"
    path.write_bytes(hostile_graph(change, trace))
    message = refusal(folder)
    assert words in message
    assert f'`sha256 = ["{sha256(path)}"]`' in message
    assert not trace.exists()


POWERS = (
    "9**9**9",
    "Pow(Integer(9), Integer(99999999))",
    "PowByNatural(Integer(3), Pow(Integer(9), Integer(9)))",
    "LShift(Integer(1), Integer(99999999999))",
    "((2**60)**60)**60",
    "Pow(Integer(9), Add(Integer(60), Integer(60), Integer(60)))",
    "Symbol('s77', integer=True) + (1 << 10**11)",
)


@pytest.mark.parametrize("size", POWERS)
@pytest.mark.parametrize("where", ["size", "guard"])
def test_a_power_that_would_take_for_ever_is_refused(folder, trace, size, where):
    def put(program: Any, code: str) -> None:
        if where == "size":
            everywhere(program, "expr_str", size)
        else:
            program.update(guards_code=[f"{size} == 0"])

    (folder / "model.pt2").write_bytes(hostile_graph(put, trace))
    assert f"the {where}" in refusal(folder)


@pytest.mark.parametrize("what", ["a size", "a guard"])
def test_a_hostile_graph_runs_once_it_is_pinned(folder, trace, what):
    (folder / "model.pt2").write_bytes(hostile_graph(HOSTILE_GRAPHS[what][0], trace))
    with suppress(Exception):
        model = load(folder, sha256=[sha256(folder / "model.pt2")])
        with model.session():
            model({"input": np.ones((4, 3), np.float32)})
    assert trace.exists(), "or the test above proves nothing"


def test_a_key_of_the_example_inputs_cannot_become_code(folder, trace):
    path = folder / "model.pt2"
    hostile = saved((({f"'+__import__('os').system('touch {trace}')+'": torch.ones(4, 3)},), {}))
    path.write_bytes(altered(lambda records: records.update({"data/sample_inputs/model.pt": hostile})))
    assert "the name" in refusal(folder)
    assert not trace.exists()


class Shapes(torch.nn.Module):
    """Sizes, conditions and containers of every kind that torch.export writes."""

    def forward(self, x: torch.Tensor, more: dict[str, Any], *, scale: torch.Tensor) -> dict[str, Any]:
        rows, columns = x.shape
        torch._check(rows > 3)
        torch._check(columns != 3)
        functional = torch.nn.functional
        image = x[None, None]
        return {
            "half": x[: rows // 2],
            "mod": x[rows % 3 :],
            "joined": torch.cat([x, x, x[:1]]) * scale,
            "padded": functional.pad(x, (0, 0, 0, max(10 - rows, 0))),
            "least": x[: min(rows, 5)],
            "square": x.new_zeros(rows**2),
            "product": x.new_zeros(rows**3 * (columns + 1) ** 2),
            "ratio": x * (rows / 3),
            "floor": x[: int(rows * 0.5)],
            "resized": functional.interpolate(image, scale_factor=1.5),
            "pooled": functional.max_pool2d(image, 3, stride=2, padding=1, ceil_mode=True),
            "unfolded": functional.unfold(image, 2, stride=2),
            "shifted": x.new_zeros(rows << 2),
            "chosen": x * torch.sym_ite(rows > 4, 2, 3),
            "steps": torch.arange(0, rows * 1.5, 0.5),
            "found": torch.nonzero(x),
            "counted": x.new_zeros(more["a b"].sum().abs().int().item() + 3),
            "branch": torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
            "mapped": torch.vmap(lambda row: row + 1)(x),
            "einsum": torch.einsum("ij,kj->ik", x, x),
            "nested": [(x, more["rest"][0]), None],
        }


@pytest.mark.parametrize("strict", [False, True])
def test_what_torch_export_writes_is_loaded(folder, strict):
    auto = torch.export.Dim.AUTO
    more = {"a b": torch.ones(2), "rest": [torch.ones(1)]}
    program = torch.export.export(
        Shapes(),
        (torch.randn(8, 6), more),
        {"scale": torch.ones(1)},
        dynamic_shapes={"x": {0: auto, 1: auto}, "more": {"a b": {}, "rest": [{}]}, "scale": {}},
        strict=strict,
    )
    torch.export.save(program, folder / "model.pt2")
    load(folder)


def test_a_wrapped_decomposed_or_quantized_program_is_loaded(folder):
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x * 2
            with torch.autocast("cpu", torch.bfloat16):
                return torch.nn.functional.scaled_dot_product_attention(y, y, y)

    program = torch.export.export(Net(), (torch.randn(1, 2, 4, 8),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        decomposed = program.run_decompositions()
    for number, written in enumerate((program, decomposed)):
        (folder / str(number)).mkdir()
        torch.export.save(written, folder / str(number) / "model.pt2")
        load(folder / str(number))
