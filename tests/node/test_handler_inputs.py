"""What a handler's own `preprocess` may return, and who is told when the model cannot take it."""

from __future__ import annotations

import array
import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, HandlerFailed, InferenceError
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.handler_inputs import inputs_of
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.model import ServedModel
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request, Tensor, as_tensors, mapped
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

OIP = PROTOCOLS["openinference"]
REQUEST = Request(payload="text", form=Form.TEXT)
FLOAT32 = np.dtype(np.float32)

X = TensorSpec(name="x", dtype=FLOAT32, shape=(None, 2))
TOKENS = TensorSpec(name="tokens", dtype=np.dtype(np.int64), shape=(None, 16))
FREE = TensorSpec(name="free", number_dtype=FLOAT32)
MASK = TensorSpec(name="mask", dtype=np.dtype(bool), shape=(None,), optional=True, default=np.array([True]))

MAYBE = TensorSpec(name="maybe", optional=True)


class _Image:
    """What numpy reads, but no array: an image of PIL's, a data frame of pandas'."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Tensor:
        return np.array([[1, 2]], np.uint8)


class _Column(_Image):
    """The same with a dtype and a shape, as a series of pandas'."""

    dtype = np.dtype(np.uint8)
    shape = (1, 2)


class _Tensor:
    """A framework's own."""

    shape = (1, 2)
    dtype = "framework.float32"


def handler_of(returned: Any, *specs: TensorSpec, checks_shapes: bool = True) -> Handler:
    """A handler whose `preprocess` returns that, of a model with those inputs."""

    class Own(Handler):
        def preprocess(self, request: Request) -> Any:
            return returned() if callable(returned) else returned

    handler = Own(PluginOptions())
    handler.prepare(FakeModel(1, Signature(inputs=specs, checks_shapes=checks_shapes)), Path())
    return handler


@pytest.mark.parametrize(
    ("returned", "specs", "expected"),
    [
        ({"x": [[1, 2]]}, (X,), {"x": np.array([[1, 2]], np.float32)}),
        ({"x": [(1.5, 2), [3, 4]]}, (X,), {"x": np.array([[1.5, 2], [3, 4]], np.float32)}),
        ([[1, 2]], (X,), {"x": np.array([[1, 2]], np.float32)}),
        ({"x": [np.ones(2, np.float32)] * 3}, (X,), {"x": np.ones((3, 2), np.float32)}),
        ({"free": 3}, (FREE,), {"free": np.array(3, np.float32)}),
        ({"free": np.float64(3)}, (FREE,), {"free": np.array(3, np.float32)}),
        ({"any": ["a", b"b"]}, (), {"any": np.array([b"a", b"b"], object)}),
        ([1, 2], (), {"input": np.array([1, 2])}),
        ({"x": [[1, 2]]}, (X, MASK), {"x": np.array([[1, 2]], np.float32), "mask": np.array([True])}),
        ([[1, 2]], (X, MASK), {"x": np.array([[1, 2]], np.float32), "mask": np.array([True])}),
        ({"x": [[1, 2]], "mask": None}, (X, MASK), {"x": np.array([[1, 2]], np.float32), "mask": np.array([True])}),
        ({"x": [[1, 2]], "maybe": None}, (X, MAYBE), {"x": np.array([[1, 2]], np.float32)}),
        ({"x": np.ones((1, 2), np.float64)}, (X,), {"x": np.ones((1, 2), np.float32)}),
        ({"x": np.array([[1, 2.5]], object)}, (X,), {"x": np.array([[1, 2.5]], np.float32)}),
        ({"x": np.ones((1, 2), ">f4")}, (X,), {"x": np.ones((1, 2), np.float32)}),
        ({"tokens": np.ones((1, 16), np.int32)}, (TOKENS,), {"tokens": np.ones((1, 16), np.int64)}),
        ({"tokens": [range(16)]}, (TOKENS,), {"tokens": np.arange(16)[None]}),
        ({"free": range(3)}, (TensorSpec(name="free"),), {"free": np.arange(3)}),
        ({"free": array.array("d", [1, 2])}, (TensorSpec(name="free"),), {"free": np.array([1.0, 2.0])}),
        ({"free": memoryview(b"ab")}, (TensorSpec(name="free"),), {"free": np.array([97, 98], np.uint8)}),
        ({"free": deque([1, 2])}, (TensorSpec(name="free"),), {"free": np.array([1, 2])}),
        ({"x": _Image()}, (X,), {"x": np.array([[1, 2]], np.float32)}),
        (_Image(), (X,), {"x": np.array([[1, 2]], np.float32)}),
        ({"x": _Column()}, (X,), {"x": np.array([[1, 2]], np.float32)}),
    ],
)
def test_what_numpy_accepts_is_accepted_in_the_dtype_of_the_input(
    returned: Any, specs: tuple[TensorSpec, ...], expected: Mapping[str, Tensor]
) -> None:
    inputs = inputs_of(handler_of(returned, *specs), REQUEST)
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert inputs[name].dtype == value.dtype
        np.testing.assert_array_equal(inputs[name], value)


def test_arrays_that_fit_and_the_frameworks_tensors_stay_as_they_are() -> None:
    for value in (np.ones((1, 2), np.float32), _Tensor()):
        assert inputs_of(handler_of({"x": value}, X), REQUEST)["x"] is value
        assert inputs_of(handler_of(value, X), REQUEST)["x"] is value
    for unstated in (FREE, TensorSpec(name="free")):
        value = np.ones(2, np.int64)
        assert inputs_of(handler_of({"free": value}, unstated), REQUEST)["free"] is value
    several = [_Tensor(), _Tensor()]
    assert inputs_of(handler_of({"several": several}), REQUEST)["several"] is several


async def _late() -> Any:
    return {"x": [[1, 2]]}


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, 'preprocess returned None; expected by name the inputs "x" \\(float32, \\[\\?, 2\\]\\)'),
        (lambda: _late(), "preprocess returned a coroutine; it must be a plain function, not async"),
        (lambda: (n for n in ()), "preprocess returned a generator; expected by name"),
        ({1, 2}, "preprocess returned a set; expected by name"),
        ({"x": None}, 'preprocess returned None for the input "x"; expected an array'),
        (
            {"x": [[1], [2, 3]]},
            'preprocess returned a list for the input "x": .*nested lists differ in length',
        ),
        (
            {"x": [np.ones(1), np.ones(2)]},
            'preprocess returned a list for the input "x": no tensor can hold this value',
        ),
        ({"x": "text"}, "does not take dtype string"),
        (
            {"x": np.array([["a", "b"]])},
            'preprocess returned a ndarray for the input "x": .*does not take dtype string',
        ),
        ({"x": np.ones((1, 2), complex)}, "does not take dtype complex128"),
        ({"x": np.full((1, 2), 1e39)}, "does not take the value 1e\\+39"),
        ({"x": np.array([[1, None]], object)}, "expected numbers, or booleans, or strings; got a number, null"),
        ({"x": object()}, 'preprocess returned an object for the input "x"; expected an array'),
        ({"x": [[1, 2, 3]]}, r'preprocess returned "x" of shape \[1, 3\]; expected by name'),
        ({"x": np.ones(2)}, r'preprocess returned "x" of shape \[2\]; expected by name'),
        ({"y": [[1, 2]]}, 'preprocess returned an input "y"; expected by name'),
        ({}, 'preprocess did not return the input "x"; expected by name'),
    ],
)
def test_anything_else_is_named(returned: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        inputs_of(handler_of(returned, X), REQUEST)


PASSED_ON = {
    "typed tensors": (Form.TENSORS, {"x": np.ones((1, 2), np.float32)}, {"x": np.ones((1, 3), np.float32)}),
    "a dtype": (Form.TENSORS, {"x": np.ones((1, 2), np.float32)}, {"x": np.ones((1, 2))}),
    "a name": (Form.TENSORS, {"x": np.ones((1, 2), np.float32)}, {"y": np.ones((1, 2), np.float32)}),
    "an array": (Form.TENSOR, np.ones((1, 2)), np.ones((1, 3))),
    "JSON": (Form.JSON, {"x": [[1, 2]]}, {"x": [[1, 2, 3]]}),
    "a JSON list": (Form.JSON, [[1, 2]], [["a", 2]]),
}


@pytest.mark.parametrize("case", PASSED_ON)
def test_what_a_preprocess_passes_on_is_checked_as_the_clients_own(case: str) -> None:
    class PassesOn(Handler):
        def preprocess(self, request: Request) -> Any:
            return dict(request.payload) if isinstance(request.payload, dict) else request.payload

    handler = PassesOn(PluginOptions())
    handler.prepare(FakeModel(1, Signature(inputs=(X,))), Path())
    form, good, bad = PASSED_ON[case]
    inputs = inputs_of(handler, Request(payload=good, form=form))
    np.testing.assert_array_equal(inputs["x"], [[1, 1]] if "JSON" not in case else [[1, 2]])
    assert inputs["x"].dtype == FLOAT32
    with pytest.raises(BadRequest):
        inputs_of(handler, Request(payload=bad, form=form))


def test_one_value_cannot_stand_for_several_inputs() -> None:
    with pytest.raises(ValueError, match="preprocess returned a list without a name; expected by name"):
        inputs_of(handler_of([[1, 2]], X, FREE), REQUEST)


def test_shapes_are_left_to_the_model_where_the_signature_says_so() -> None:
    value = np.ones((1, 3), np.float32)
    assert inputs_of(handler_of({"x": value}, X, checks_shapes=False), REQUEST)["x"] is value


def test_a_run_model_of_ones_own_is_given_what_preprocess_returned() -> None:
    class Own(Handler):
        def preprocess(self, request: Request) -> Any:
            return None

        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            return {}

    assert inputs_of(Own(PluginOptions()), REQUEST) is None


class Refusing(FakeModel):
    """Refuses a number over 100 as the client's fault, as a framework's checks do."""

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        if any((value > 100).any() for value in inputs.values()):
            raise BadRequest("a number is over 100")
        return super().__call__(inputs, signature)


class RefusingBackend(FakeBackend):
    name = "refusing"

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        return Refusing(2, super().load(directory, options, device).signature)


@asynccontextmanager
async def served(
    folder: Path, handler: type[Handler], toml: str = "", backend: FakeBackend | None = None, **inputs: Any
) -> AsyncIterator[ServedModel]:
    FakeBackend.write(folder / "m" / "1", inputs=inputs or {"x": ["float32", [None, 2]]})
    (folder / "m" / "model.toml").write_text(f'handler = "it"\n{toml}', encoding="utf-8")
    repository = Repository(folder, backends={"refusing": backend or RefusingBackend()}, handlers={"it": handler})
    await repository.start()
    assert repository.models["m"].ready, repository.models["m"].versions
    try:
        yield repository.models["m"]
    finally:
        await repository.close()


async def ask(model: ServedModel, *values: float, name: str = "x") -> list[Any]:
    payload = {name: np.array([values], np.float32)}
    body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
    answer = await answered(model, OIP, body)
    found: Any = OIP.codec.decode_response(answer).payload
    return found["x"].tolist()  # type: ignore[no-any-return]


async def failure(model: ServedModel, *values: float, name: str = "x") -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        await ask(model, *values, name=name)
    return caught.value


class Scales(Handler):
    """Its own preprocess makes what the model refuses of numbers over 10; it refuses negative ones itself."""

    shares_calls = True

    def preprocess(self, request: Request) -> Any:
        values = super().preprocess(request)["x"]
        if (values < 0).any():
            raise BadRequest("a number is negative")
        return {"x": (values * 10).tolist()}


class RunsItself(Scales):
    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        if inputs["x"][0][0] == 0:
            raise BadRequest("a number is zero")
        return model({"x": np.array(inputs["x"], np.float32)})


class Catches(Scales):
    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        try:
            return model({"x": np.array(inputs["x"], np.float32)})
        except BadRequest:
            raise BadRequest("the client's numbers are too large") from None


def logged_cause(caplog: pytest.LogCaptureFixture) -> str:
    """The traceback of the cause of the error that was logged last."""
    return (caplog.records[-1].exc_text or "").partition("The above exception was the direct cause")[0]


@pytest.mark.parametrize("handler", [Scales, RunsItself])
@pytest.mark.parametrize("toml", ["", "[batching]\nenabled = false"])
def test_what_the_model_refuses_of_a_handlers_own_is_not_the_clients_fault(
    tmp_path: Path, handler: type[Handler], toml: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with served(tmp_path, handler, toml) as model:
            assert await ask(model, 1, 2) == [[20, 40]]
            error = await failure(model, 11, 2)
            assert type(error) is HandlerFailed
            said = 'model "m" version 1: it refuses what preprocess returned: a number is over 100'
            assert str(error).startswith(f"{said} (request id ")
            assert "BadRequest: a number is over 100" in logged_cause(caplog)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("handler", "values", "name", "said"),
    [
        (Handler, (101, 0), "x", "a number is over 100"),
        (Scales, (-1, 0), "x", "a number is negative"),
        (Scales, (1, 2, 3), "x", "does not take shape"),
        (Scales, (1, 2), "z", "input size does not match signature"),
        (RunsItself, (0, 0), "x", "a number is zero"),
        (Catches, (11, 0), "x", "the client's numbers are too large"),
    ],
)
def test_what_a_handler_refuses_itself_or_passes_on_stays_the_clients_fault(
    tmp_path: Path, handler: type[Handler], values: tuple[float, ...], name: str, said: str
) -> None:
    async def main() -> None:
        async with served(tmp_path, handler) as model:
            error = await failure(model, *values, name=name)
            assert type(error) is BadRequest
            assert said in str(error)

    asyncio.run(main())


def test_a_preprocess_that_looks_at_the_clients_arrays_and_passes_them_on_blames_nobody_else(tmp_path: Path) -> None:
    class Looks(Handler):
        def preprocess(self, request: Request) -> Any:
            return super().preprocess(request)

    async def main() -> None:
        async with served(tmp_path, Looks) as model:
            assert type(await failure(model, 101, 0)) is BadRequest

    asyncio.run(main())


class Explaining(FakeModel):
    """Its native callable fails as frameworks do; it can say whose fault that is."""

    @property
    def native(self) -> Any:
        return self._fail

    def _fail(self, inputs: Any) -> Any:
        raise RuntimeError("an operation failed\nthe sizes differ")

    def explain(self, error: BaseException) -> BaseException:
        return BadRequest("the sizes differ") if isinstance(error, RuntimeError) else error


class ExplainingBackend(FakeBackend):
    name = "refusing"

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        return Explaining(2, super().load(directory, options, device).signature)


def test_what_the_frameworks_own_model_refuses_is_named_as_the_handlers_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Around(Handler):
        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            return model.native(inputs)

    async def main() -> None:
        async with served(tmp_path, Around, backend=ExplainingBackend()) as model:
            error = await failure(model, 1, 2)
            assert type(error) is HandlerFailed
            assert str(error).startswith('model "m" version 1: run_model failed: the sizes differ (request id ')
            assert "RuntimeError" in logged_cause(caplog)

    asyncio.run(main())


@pytest.mark.parametrize("shares", [False, True])
def test_a_shape_that_the_model_does_not_take_never_gets_into_a_batch(tmp_path: Path, shares: bool) -> None:
    class Flat(Handler):
        shares_calls = shares

        def preprocess(self, request: Request) -> Any:
            return {"x": super().preprocess(request)["x"][0]}  # which loses the rows

    async def main() -> None:
        async with served(tmp_path, Flat) as model:
            error = await failure(model, 1, 2)
            assert type(error) is HandlerFailed
            assert 'preprocess failed: ValueError: preprocess returned "x" of shape [2]; expected' in str(error)

    asyncio.run(main())


def _returns(value: Callable[[], Any]) -> type[Handler]:
    class Own(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            return value()

    return Own


@pytest.mark.parametrize(
    ("value", "said"),
    [(lambda: None, "postprocess returned None; expected tensors"), (object, "postprocess returned an object")],
)
@pytest.mark.parametrize("protocol", ["openinference", "tfserving", "seldon"])
def test_an_answer_that_nobody_can_encode_names_postprocess(
    tmp_path: Path, value: Any, said: str, protocol: str
) -> None:
    async def main() -> None:
        async with served(tmp_path, _returns(value)) as model:
            with pytest.raises(HandlerFailed, match=said):
                await _answer(model, protocol)

    asyncio.run(main())


async def _answer(model: ServedModel, protocol: str) -> Any:
    codec = PROTOCOLS[protocol].codec
    payload: Any = np.ones((1, 2)) if protocol == "seldon" else {"x": np.ones((1, 2), np.float32)}
    request = Request(payload=payload, form=Form.TENSOR if protocol == "seldon" else Form.TENSORS, model="m")
    answer = await answered(model, PROTOCOLS[protocol], codec.encode_request(request))
    return codec.decode_response(answer).payload


class _Native:
    """A framework's tensor, which numpy cannot read: one on a GPU, say."""


@pytest.mark.parametrize("protocol", ["openinference", "tfserving", "seldon"])
@pytest.mark.parametrize("form", ["named", "alone"])
def test_the_frameworks_tensors_in_an_answer_become_arrays(tmp_path: Path, protocol: str, form: str) -> None:
    class Converts(FakeModel):
        def to_numpy(self, value: Any) -> Any:
            return mapped(value, _Native, lambda _: np.array([7.0]))

    class Converting(FakeBackend):
        def load(self, directory: Path, options: Any, device: str) -> Model:
            return Converts()

    async def main() -> None:
        answer = _Native() if form == "alone" else {"y": _Native()}
        async with served(tmp_path, _returns(lambda: answer), backend=Converting()) as model:
            (value,) = as_tensors(await _answer(model, protocol)).values()
            np.testing.assert_array_equal(value, [7.0])

    asyncio.run(main())


@pytest.mark.parametrize("method", ["preprocess", "run_model", "run_batch", "postprocess", "load"])
def test_an_asynchronous_method_is_refused_at_load(tmp_path: Path, method: str) -> None:
    async def late(*_: Any) -> Any:
        return None

    class Own(Handler):
        name = "own"

    setattr(Own, method, late)

    async def main() -> None:
        FakeBackend.write(tmp_path / "m" / "1")
        (tmp_path / "m" / "model.toml").write_text('handler = "own"', encoding="utf-8")
        repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={"own": Own})
        await repository.start()
        status = repository.models["m"].versions[1]
        await repository.close()
        assert status.error == (
            f'handler "own": {method} is async; expected a plain function: a model has threads of its own'
        )

    asyncio.run(main())


def test_a_handler_whose_load_does_not_call_super_keeps_the_checks_and_casts(tmp_path: Path) -> None:
    class Own(Handler):
        def load(self, model: Model, directory: Path) -> None:
            assert self.signature is model.signature
            self.loaded = True

    async def main() -> None:
        async with served(tmp_path, Own) as model:
            error = await failure(model, 1, 2, name="y")
            assert type(error) is BadRequest
            assert "input size does not match signature" in str(error)
            seldon = PROTOCOLS["seldon"]
            request = Request(payload=np.array([[1.0, 2.0]]), form=Form.NDARRAY, model="m", tags={"taskId": "m"})
            body = seldon.codec.encode_request(request)
            answer = seldon.codec.decode_response(await answered(model, seldon, body))
            assert np.asarray(answer.payload).tolist() == [[2.0, 4.0]]

    asyncio.run(main())
