"""The original's `processor.py`, unchanged, in every subset of its functions."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Payload, Request, Response, Tensor
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS


@dataclass(slots=True)
class Native:
    """A framework's tensor: no array, and no array can be made of it."""

    array: Tensor


class NativeModel(Model):
    """Its native callable notes what it was called with and gives back `answer`, or its first argument."""

    def __init__(self, *inputs: str, answer: Any = None) -> None:
        self.signature = Signature(inputs=tuple(TensorSpec(name=name) for name in inputs))
        self.answer = answer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def native(self) -> Any:
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return args[0] if self.answer is None else self.answer

    def __call__(self, inputs: Any, signature: str = "serving_default") -> dict[str, Tensor]:
        raise AssertionError("the original calls the framework's own model")

    def to_native(self, value: Any) -> Any:
        return _each(value, np.ndarray, Native)

    def to_numpy(self, value: Any) -> Any:
        return _each(value, Native, lambda native: native.array)


def _each(value: Any, kind: type, change: Any) -> Any:
    if isinstance(value, dict):
        return {name: _each(item, kind, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(item, kind, change) for item in value)
    return change(value) if isinstance(value, kind) else value


def ask(model: Model, payload: Payload, form: Form, source: str, *, options: Any = None, **tags: Any) -> Any:
    module = ModuleType("processor")
    module.__file__ = "processor.py"
    exec(source, vars(module))
    handler = Processor(Processor.Options(**(options or {})), module)
    handler.prepare(model, Path())
    request = Request(payload=payload, form=form, tags=tags)
    return handler.postprocess(handler.run_model(model, handler.preprocess(request), request), request)


PREPROCESS = "def preprocess(x, **kwargs): seen.append((x, kwargs)); return ('pre', x)\nseen = []"
RUN_MODEL = "def run_model(model, x, **kwargs): return ('run', model(x), x, kwargs['meta']['tags']['user'])"
POSTPROCESS = "def postprocess(x, **kwargs): return {'was': repr(x), 'user': kwargs['meta']['tags']['user']}"
ARRAY = np.array([[1.0, 2.0]])


def test_each_function_gets_what_the_one_before_gave() -> None:
    model = NativeModel()
    answer = ask(model, "text", Form.TEXT, "\n".join([PREPROCESS, RUN_MODEL, POSTPROCESS]), user="u")
    assert answer == {"was": "('run', ('pre', 'text'), ('pre', 'text'), 'u')", "user": "u"}
    assert model.calls == [((("pre", "text"),), {})]


def test_preprocess_alone() -> None:
    model = NativeModel(answer=[Native(ARRAY), Native(ARRAY)])
    answer = ask(model, b"bytes", Form.BYTES, "def preprocess(x, **kwargs): return x[:1]")
    assert model.calls == [((b"b",), {})]
    np.testing.assert_array_equal(answer, [ARRAY, ARRAY])


def test_array_from_preprocess_becomes_the_frameworks_tensor() -> None:
    model = NativeModel()
    ask(model, b"ab", Form.BYTES, "import numpy\ndef preprocess(x, **kwargs): return numpy.frombuffer(x, 'u1')")
    ((native,), _) = model.calls[0]
    assert isinstance(native, Native)


def test_run_model_alone_gets_native_model_and_tensor_and_may_call_it_twice() -> None:
    model = NativeModel()
    source = "def run_model(model, x, **kwargs): return [model(x), model(x)]"
    answer = ask(model, ARRAY, Form.NDARRAY, source)
    np.testing.assert_array_equal(answer, [ARRAY, ARRAY])
    assert [type(args[0]) for args, _ in model.calls] == [Native, Native]


def test_postprocess_alone_gets_the_models_own_tensor() -> None:
    source = "def postprocess(x, **kwargs): return type(x).__name__"
    assert ask(NativeModel(), ARRAY, Form.TENSOR, source) == "Native"


@pytest.mark.parametrize(
    ("payload", "form", "seen"),
    [
        ("text", Form.TEXT, "text"),
        (b"bytes", Form.BYTES, b"bytes"),
        ([1, {"a": 2}], Form.JSON, [1, {"a": 2}]),
        ({"only": [1]}, Form.JSON, {"only": [1]}),
        (ARRAY, Form.TFTENSOR, ARRAY),
        ({"one": ARRAY}, Form.TENSORS, ARRAY),
        ({"one": ARRAY, "two": ARRAY}, Form.TENSORS_RAW, {"one": ARRAY, "two": ARRAY}),
    ],
)
def test_what_preprocess_sees(payload: Payload, form: Form, seen: Any) -> None:
    source = f"{PREPROCESS}\ndef run_model(model, x, **kwargs): return seen"
    ((x, kwargs),) = ask(NativeModel(), payload, form, source, user="u", number=1.0)
    assert kwargs == {"meta": {"tags": {"user": "u", "number": 1.0}}}
    np.testing.assert_equal(x, seen)


@pytest.mark.parametrize(
    ("result", "payload"),
    [
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("(0.5, 1)", (0.5, 1)),
        ("[True, 3]", [True, 3]),
        ("[[1], [2, 3]]", [[1], [2, 3]]),
        ("[1, 'a']", [1, "a"]),
        ("['a', 'b']", ["a", "b"]),
        ("[{'a': 1}]", [{"a": 1}]),
        ("[None]", [None]),
        ("[]", []),
        ("'text'", "text"),
        ("b'bytes'", b"bytes"),
        ("0.5", 0.5),
        ("None", None),
        ("{'score': [0.5], 'label': 'a', 'more': {'deep': [[1]]}}",
         {"score": [0.5], "label": "a", "more": {"deep": [[1]]}}),
        ("{1: x}", {"1": ARRAY}),
        ("[x, x]", [ARRAY, ARRAY]),
        ("(x, 'a')", (ARRAY, "a")),
        ("x", ARRAY),
        ("numpy.float32(2)", np.array(2, np.float32)),
    ],
)  # fmt: skip
def test_what_postprocess_may_return(result: str, payload: Any) -> None:
    answer = ask(NativeModel(), ARRAY, Form.TENSOR, f"import numpy\ndef postprocess(x, **kwargs): return {result}")
    assert type(answer) is type(payload)
    np.testing.assert_equal(answer, payload)


def test_outputs_of_one_name_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="two values would have the same name"):
        ask(NativeModel(), ARRAY, Form.TENSOR, "def postprocess(x, **kwargs): return {0: x, '0': x}")


def test_optional_inputs_become_keyword_arguments_where_a_request_has_them() -> None:
    source = "def postprocess(x, **kwargs): return 0"
    for payload, form, names in (
        ({"a": ARRAY}, Form.TENSORS, []),
        ({"a": ARRAY, "b": ARRAY}, Form.TENSORS, ["a", "b"]),
        ({"a": [[1, 2]], "b": [[3]]}, Form.JSON, ["a", "b"]),
        (ARRAY, Form.TENSOR, []),
    ):
        model = NativeModel("a", "b", answer=0)
        model.signature = Signature(inputs=(TensorSpec(name="a"), TensorSpec(name="b", optional=True)))
        ask(model, payload, form, source)
        ((args, kwargs),) = model.calls
        assert sorted(kwargs) == names
        assert len(args) == (not names)
        assert all(isinstance(value, Native) for value in (*args, *kwargs.values()))


def test_where_every_input_is_optional_each_goes_by_its_name() -> None:
    model = NativeModel("a", "b", answer=0)
    model.signature = Signature(
        inputs=(TensorSpec(name="a", optional=True), TensorSpec(name="b", optional=True)), positional=True
    )
    ask(model, {"b": ARRAY}, Form.TENSORS, "def postprocess(x, **kwargs): return 0")
    ask(model, b"1", Form.BYTES, "import numpy\ndef preprocess(x, **kwargs): return {'b': numpy.ones(1)}")
    assert [list(kwargs) for _, kwargs in model.calls] == [["b"], ["b"]]


class Refusing(NativeModel):
    """A framework whose errors say in their second line what was wrong."""

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an operation failed\nthe sizes differ")

    def explain(self, error: BaseException) -> BaseException:
        return BadRequest(str(error).splitlines()[1]) if isinstance(error, RuntimeError) else error


def test_what_the_model_refuses_is_the_clients_fault_unless_a_preprocess_made_it() -> None:
    postprocess = "def postprocess(x, **kwargs): return 0"
    with pytest.raises(BadRequest, match=r"^the sizes differ$"):
        ask(Refusing("a"), ARRAY, Form.TENSOR, postprocess)
    with pytest.raises(RuntimeError, match="an operation failed"):
        ask(Refusing("a"), ARRAY, Form.TENSOR, "def preprocess(x, **kwargs): return x")


@pytest.mark.parametrize(("inputs", "names"), [(("a", "b"), ["a", "b"]), ((), [])])
def test_tensors_become_keyword_arguments_only_under_the_models_own_names(
    inputs: tuple[str, ...], names: list[str]
) -> None:
    model = NativeModel(*inputs, answer=0)
    ask(model, {"a": ARRAY, "b": ARRAY}, Form.TENSORS, "def postprocess(x, **kwargs): return 0")
    ((args, kwargs),) = model.calls
    assert sorted(kwargs) == names
    assert len(args) == (not names)


@pytest.mark.parametrize("inputs", [("a", "b", "c"), ("a",)])
def test_tensors_of_other_names_than_the_models_are_the_clients_fault(inputs: tuple[str, ...]) -> None:
    model = NativeModel(*inputs, answer=0)
    with pytest.raises(BadRequest, match="expected the inputs"):
        ask(model, {"a": ARRAY, "b": ARRAY}, Form.TENSORS, "def postprocess(x, **kwargs): return 0")
    assert not model.calls


def test_input_of_a_stated_dtype_is_cast_and_checked() -> None:
    model = NativeModel()
    model.signature = Signature(inputs=(TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 2)),))
    source = "def postprocess(x, **kwargs): return x"
    assert ask(model, ARRAY, Form.NDARRAY, source).dtype == np.float32
    with pytest.raises(BadRequest, match="float32"):
        ask(model, {"x": ARRAY}, Form.TENSORS, source)
    assert ask(model, ARRAY, Form.NDARRAY, "def run_model(model, x, **kwargs): return x").dtype == np.float64
    assert len(model.calls) == 1


def test_tags_pass_to_the_model_only_where_the_config_names_them() -> None:
    source = "def postprocess(x, **kwargs): return 0"
    model = NativeModel()
    ask(model, ARRAY, Form.NDARRAY, source, beams=3, path="/etc/passwd")
    options = {"model_arguments": ["beams", "depth"]}
    ask(model, ARRAY, Form.NDARRAY, source, options=options, beams=3, path="/etc/passwd")
    assert [kwargs for _, kwargs in model.calls] == [{}, {"beams": 3}]


@pytest.mark.parametrize(("payload", "form"), [("text", Form.TEXT), (b"bytes", Form.BYTES)])
def test_bytes_that_nothing_turns_into_a_tensor(payload: Payload, form: Form) -> None:
    model = NativeModel()
    with pytest.raises(BadRequest, match=form.value):
        ask(model, payload, form, POSTPROCESS)
    assert ask(model, payload, form, "def run_model(model, x, **kwargs): return x") == payload


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def predict(x): ...", "processor.py: defines none of preprocess, run_model and postprocess"),
        ("preprocess = 3", "processor.py: preprocess is 3; expected a function"),
        ("async def preprocess(x, **kwargs): ...", "processor.py: preprocess is async; expected a plain function"),
        ("async def preprocess(x, **kwargs): yield x", "processor.py: preprocess is async; expected a plain function"),
        ("def preprocess(x): ...", r"processor.py: preprocess does not take its arguments, x, \*\*kwargs"),
        (
            "def run_model(x, **kwargs): ...",
            r"processor.py: run_model does not take its arguments, model, x, \*\*kwargs",
        ),
    ],
)
def test_file_without_a_function(source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ask(NativeModel(), ARRAY, Form.TENSOR, source)


def test_flat_folder_with_processor_over_the_wire(tmp_path: Path) -> None:
    folder = FakeBackend.write(tmp_path / "textcnn", factor=3)
    (folder / "model.toml").write_text("task_id = 69\n", encoding="utf-8")
    (folder / "words.py").write_text("LENGTH = 4\n", encoding="utf-8")
    (folder / "processor.py").write_text(
        "import numpy\n"
        "from words import LENGTH\n"
        "def preprocess(x, **kwargs):\n"
        "    return {'ids': numpy.array([ord(c) for c in x[:LENGTH]], 'float32')}\n"
        "def postprocess(x, **kwargs):\n"
        "    return {'score': x['ids'] / 3, 'user': kwargs['meta']['tags']['user']}\n",
        encoding="utf-8",
    )
    seldon = PROTOCOLS["seldon"]

    async def main() -> Response:
        repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={"processor": Processor})
        await repository.start()
        model = repository.tasks[69]
        assert model.ready, model.versions
        request = Request(payload="abcdef", form=Form.TEXT, tags={"taskId": 69, "user": "u"})
        body = seldon.codec.encode_request(request)
        answer = await answered(model, seldon, body)
        await repository.close()
        return seldon.codec.decode_response(answer)

    payload: Any = asyncio.run(main()).payload
    assert payload == {"score": [97.0, 98.0, 99.0, 100.0], "user": "u"}
