"""For plugin authors: a conformance suite per kind of plugin, and fakes of what a plugin is given.

A suite is a class of pytest tests: subclass it in a test file, as its docstring shows, and the tests run against
your class. With `pytest.register_assert_rewrite("dl_inference_core.testing")` in `conftest.py`, a failed assertion
shows its values.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import inspect
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
from pydantic import ValidationError

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import (
    BadRequest,
    Blame,
    Code,
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    MessageTooLarge,
    ModelError,
    NodeFailed,
    NodeUnreachable,
    from_status,
)
from dl_inference_core.gateway.balancing import Balancer, Outcome
from dl_inference_core.node.backend import Backend, Model, Signature, TensorSpec
from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Payload, Request, Tensor, Tensors, as_json, as_tensors
from dl_inference_core.transport import (
    Call,
    Connection,
    Limits,
    Methods,
    Server,
    StreamHandler,
    Transport,
    UnaryHandler,
)


@dataclass(slots=True, eq=False, weakref_slot=True)
class FakeNode:
    """A node for balancers; its fields may be set at will."""

    address: str = "127.0.0.1:8500"
    weight: int = 1
    in_flight: int = 0


class FakeModel(Model):
    """Gives back each numeric input times `factor`, under the same name and dtype; strings as they came.

    Attributes:
        calls: what it was called with, in order.
        closed: whether `close` was called.
        device: the device that it was loaded for.
    """

    def __init__(
        self,
        factor: float = 1,
        signature: Signature | None = None,
        *,
        sleep_s: float = 0.0,
        fail: str = "",
        device: str = "cpu",
    ) -> None:
        """Args:
        factor: a whole number keeps integer tensors exact.
        signature: by default the model does not say what it takes.
        sleep_s: seconds that each call takes, holding its thread.
        fail: the message of the RuntimeError that each call raises; "" is none.
        """
        self.factor = factor
        self.signature = signature or Signature()
        self.sleep_s = sleep_s
        self.fail = fail
        self.device = device
        self.calls: list[dict[str, Any]] = []
        self.closed = False

    @property
    def native(self) -> FakeModel:
        return self

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        self.calls.append(dict(inputs))
        if self.sleep_s:
            time.sleep(self.sleep_s)
        if self.fail:
            raise RuntimeError(self.fail)
        return {
            name: value.copy() if value.dtype.kind == "O" else (value * self.factor).astype(value.dtype)
            for name, value in inputs.items()
        }

    def to_native(self, value: Any) -> Any:
        return value

    def to_numpy(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self.closed = True


class FakeBackend(Backend):
    """A backend without a framework, for tests of what loads and runs models.

    Its models are folders with a `fake.json`::

        {"factor": 2, "inputs": {"x": ["float32", [null, 3]]}, "sleep_s": 0.01, "fail": "…", "fail_load": "…"}

    Every key may be left out; but for `fail_load`, the message of a ModelError at load, they are `FakeModel`'s
    arguments.

    Attributes:
        models: what it has loaded, in order.
    """

    name = "fake"

    class ModelOptions(PluginOptions):
        """Attributes:
        factor: takes precedence over the file's.
        """

        factor: float | None = None

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options or self.Options())
        self.models: list[FakeModel] = []

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        return (directory / "fake.json").is_file()

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        assert isinstance(options, FakeBackend.ModelOptions)
        file = directory / "fake.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            specs = tuple(
                TensorSpec(name=name, dtype=np.dtype(dtype), shape=tuple(shape) if shape is not None else None)
                for name, (dtype, shape) in content.pop("inputs", {}).items()
            )
            failure = content.pop("fail_load", "")
            model = FakeModel(
                **({"factor": 1} | content | options.model_dump(exclude_none=True)),
                signature=Signature(inputs=specs, outputs=specs),
                device=device,
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: {error}") from error
        if failure:
            raise ModelError(f"{file}: {failure}")
        self.models.append(model)
        return model

    @staticmethod
    def write(directory: Path, **content: Any) -> Path:
        """Makes `directory` a model with that `fake.json`, which no reader ever sees half written."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / "fake.json.part"
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(directory / "fake.json")
        return directory


class _PluginConformance:
    """What holds for the classes of every kind."""

    options: ClassVar[Mapping[str, Any]] = {}
    """What the config says to it."""

    @staticmethod
    def _check_class(cls: type[Any], interface: type[Any], plain: Sequence[str]) -> None:
        assert issubclass(cls, interface)
        assert not inspect.isabstract(cls), f"abstract: {sorted(cls.__abstractmethods__)}"
        assert isinstance(cls.name, str)
        assert cls.name, "a class without a name cannot be named in a config"
        for method in plain:
            assert not inspect.iscoroutinefunction(getattr(cls, method)), f"{method} must be a plain function"

    @staticmethod
    def _check_options(model: type[PluginOptions], values: Mapping[str, Any]) -> None:
        assert issubclass(model, PluginOptions)
        model(**values)
        with pytest.raises(ValidationError, match="no_such_option"):
            model.model_validate({**values, "no_such_option": 1})


class BalancerConformance(_PluginConformance):
    """What every balancing strategy must keep::

    class TestFewestInFlight(BalancerConformance):
        balancer_class = FewestInFlight
    """

    balancer_class: ClassVar[type[Balancer]]
    spreads: ClassVar[bool] = True
    """Whether nodes that are alike in all things each get requests."""
    weighs: ClassVar[bool] = False
    """Whether it heeds weights: then a node of weight 0 gets nothing while another has weight."""
    learns: ClassVar[bool] = False
    """Whether it sends less to a node that fails."""

    @pytest.fixture
    def balancer(self) -> Balancer:
        return self.balancer_class(self.balancer_class.Options(**self.options))

    @pytest.fixture
    def nodes(self) -> list[FakeNode]:
        return [FakeNode(f"10.0.0.{number}:8500") for number in range(1, 5)]

    def test_is_a_balancer_with_a_name_and_plain_methods(self) -> None:
        self._check_class(self.balancer_class, Balancer, ["choose", "record", "forget"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.balancer_class.Options, self.options)

    def test_chooses_one_of_those_given_and_leaves_the_sequence_alone(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        for given in (nodes, tuple(nodes)):
            before = list(given)
            for _ in range(50):
                assert _is_among(balancer.choose(given), before)
                assert list(given) == before

    def test_chooses_the_only_node(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes * 3:
            assert balancer.choose([node]) is node

    def test_never_chooses_a_node_that_is_not_given_this_time(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        outcomes = list(Outcome)
        for turn in range(1, 300):
            given = [node for bit, node in enumerate(nodes) if turn >> bit & 1] or nodes
            if turn % 2:
                given.reverse()
            chosen = balancer.choose(given)
            assert _is_among(chosen, given)
            balancer.record(chosen, outcomes[turn % 7 % len(outcomes)], 0.001 * turn)

    def test_tells_nodes_apart_by_identity(self, balancer: Balancer) -> None:
        twins = [FakeNode("10.0.0.1:8500"), FakeNode("10.0.0.1:8500")]
        balancer.choose(twins)
        balancer.forget(twins[0])
        for _ in range(10):
            assert balancer.choose(twins[1:]) is twins[1]

    def test_takes_new_nodes_and_new_weights_while_running(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for turn in range(60):
            nodes[turn % 4].weight = turn % 3
            nodes[turn % 4].in_flight = turn % 5
            given = [*nodes, FakeNode(f"10.0.1.{turn}:8500")]
            assert _is_among(balancer.choose(given), given)

    def test_copes_with_weights_that_are_all_zero(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        for node in nodes:
            node.weight = 0
        for _ in range(20):
            chosen = balancer.choose(nodes)
            assert _is_among(chosen, nodes)
            balancer.record(chosen, Outcome.FAILURE, 0.1)

    @pytest.mark.parametrize("outcome", Outcome)
    def test_takes_no_harm_from_a_node_it_does_not_know(
        self, balancer: Balancer, nodes: list[FakeNode], outcome: Outcome
    ) -> None:
        stranger = FakeNode("10.9.9.9:8500")
        balancer.record(stranger, outcome, 0.1)
        balancer.forget(stranger)
        balancer.choose(nodes)
        balancer.record(stranger, outcome, 0.1)
        balancer.forget(stranger)
        assert _is_among(balancer.choose(nodes), nodes)

    def test_keeps_nothing_of_a_forgotten_node_even_if_an_attempt_ends_later(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        leaving = nodes.pop()
        for _ in range(20):
            chosen = balancer.choose([*nodes, leaving])
            balancer.record(chosen, Outcome.SUCCESS, 0.1)
        balancer.forget(leaving)
        balancer.record(leaving, Outcome.FAILURE, 0.1)
        trace = weakref.ref(leaving)
        del leaving, chosen
        gc.collect()
        assert trace() is None, "the balancer still holds on to the node"
        assert _is_among(balancer.choose(nodes), nodes)

    def test_does_not_block(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        started = time.perf_counter()
        for _ in range(1000):
            balancer.record(balancer.choose(nodes), Outcome.SUCCESS, 0.01)
        each = (time.perf_counter() - started) / 1000
        assert each < 200e-6, f"{each * 1e6:.0f} µs for one choice and its outcome; a few are expected"

    def test_gives_each_of_equal_nodes_something(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        if not self.spreads:
            pytest.skip("spreads is False")
        taken = _drive(balancer, nodes, 400)
        assert all(taken.values())

    def test_gives_nothing_to_weight_zero_while_another_has_weight(
        self, balancer: Balancer, nodes: list[FakeNode]
    ) -> None:
        if not self.weighs:
            pytest.skip("weighs is False")
        nodes[1].weight = 0
        taken = _drive(balancer, nodes, 400)
        assert taken[nodes[1]] == 0

    def test_sends_less_to_a_node_that_fails(self, balancer: Balancer, nodes: list[FakeNode]) -> None:
        if not self.learns:
            pytest.skip("learns is False")
        taken = _drive(balancer, nodes, 2000, failing=nodes[1])
        assert taken[nodes[1]] < 2000 / len(nodes) / 2


def _is_among(node: Any, nodes: Sequence[Any]) -> bool:
    return any(node is other for other in nodes)


def _drive(
    balancer: Balancer, nodes: Sequence[FakeNode], times: int, failing: FakeNode | None = None
) -> dict[FakeNode, int]:
    """How often each node is chosen, one request after the other."""
    taken = dict.fromkeys(nodes, 0)
    for _ in range(times):
        chosen = balancer.choose(nodes)
        assert isinstance(chosen, FakeNode)
        taken[chosen] += 1
        if chosen is failing:
            balancer.record(chosen, Outcome.FAILURE, 0.0001)
        else:
            balancer.record(chosen, Outcome.SUCCESS, 0.01)
    return taken


class BackendConformance(_PluginConformance):
    """What every backend must keep. The subclass gives a model whose answers are known::

    class TestTorch(BackendConformance):
        backend_class = TorchBackend
        framework = "torch"

        @pytest.fixture
        def directory(self, tmp_path):
            return write_a_model_that_doubles(tmp_path / "model")

        inputs = {"x": np.ones((2, 3), np.float32)}
        outputs = {"y": np.full((2, 3), 2, np.float32)}
    """

    backend_class: ClassVar[type[Backend]]
    framework: ClassVar[str] = ""
    """The framework's top module, which neither importing the class nor `recognises` may import; "" is none."""
    model_options: ClassVar[Mapping[str, Any]] = {}
    """The `[options]` of the model's `model.toml`."""
    device: ClassVar[str] = "cpu"
    inputs: ClassVar[Tensors]
    outputs: ClassVar[Tensors]
    tolerance: ClassVar[float] = 1e-5
    """How far a floating-point output may be off, relative and absolute."""
    dtypes: ClassVar[Sequence[str]] = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
    """What `to_native` takes and `to_numpy` gives back."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """A folder that holds the model."""
        raise NotImplementedError("override the fixture `directory`")

    @pytest.fixture
    def backend(self) -> Backend:
        return self.backend_class(self.backend_class.Options(**self.options))

    @pytest.fixture
    def thread(self) -> Iterator[ThreadPoolExecutor]:
        """The model's own thread."""
        with ThreadPoolExecutor(1) as executor:
            yield executor

    @pytest.fixture
    def model(self, backend: Backend, directory: Path, thread: ThreadPoolExecutor) -> Iterator[Model]:
        model = thread.submit(self._load, backend, directory).result()
        yield model
        model.close()

    def _load(self, backend: Backend, directory: Path) -> Model:
        return backend.load(directory, backend.ModelOptions(**self.model_options), self.device)

    def _check_answer(self, model: Model, native: bool = False) -> None:
        with model.session():
            inputs = model.signature.bind(self.inputs)
            outputs = model(model.to_native(inputs) if native else inputs)
        assert isinstance(outputs, dict)
        assert outputs.keys() == self.outputs.keys()
        for name, expected in self.outputs.items():
            assert isinstance(outputs[name], np.ndarray), f"{name} is a {type(outputs[name]).__name__}"
            assert outputs[name].dtype == expected.dtype, name
            _assert_equal(outputs[name], expected, self.tolerance)

    def test_is_a_backend_with_a_name_and_plain_methods(self) -> None:
        self._check_class(self.backend_class, Backend, ["recognises", "load"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.backend_class.Options, self.options)
        self._check_options(self.backend_class.ModelOptions, self.model_options)

    def test_recognises_its_model_and_nothing_else(self, directory: Path, tmp_path: Path) -> None:
        empty = tmp_path / "an empty folder"
        empty.mkdir()
        assert self.backend_class.recognises(directory) is True
        assert self.backend_class.recognises(empty) is False
        assert self.backend_class.recognises(tmp_path / "no such folder") is False
        (empty / "notes.txt").write_text("not a model")
        assert self.backend_class.recognises(empty) is False

    def test_recognises_without_importing_the_framework(self, directory: Path) -> None:
        if not self.framework:
            pytest.skip("framework is not given")
        program = (
            "import importlib, pathlib, sys\n"
            "module, name, directory, framework = sys.argv[1:]\n"
            "backend = getattr(importlib.import_module(module), name)\n"
            "assert backend.recognises(pathlib.Path(directory))\n"
            "assert framework not in sys.modules, f'{framework} was imported'\n"
        )
        backend = self.backend_class
        ran = subprocess.run(  # noqa: S603 - this interpreter, and a program of our own
            [sys.executable, "-c", program, backend.__module__, backend.__name__, directory, self.framework],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr

    def test_loads_and_answers_on_a_thread_of_its_own(self, model: Model, thread: ThreadPoolExecutor) -> None:
        assert isinstance(model, Model)
        thread.submit(self._check_answer, model).result()

    def test_takes_the_frameworks_tensors_as_well(self, model: Model, thread: ThreadPoolExecutor) -> None:
        thread.submit(self._check_answer, model, native=True).result()

    def test_says_what_it_takes_and_gives(self, model: Model) -> None:
        assert isinstance(model.signature, Signature)
        if model.signature.inputs:
            assert {spec.name for spec in model.signature.inputs} == self.inputs.keys()
        for spec in model.signature.outputs:
            assert spec.name in self.outputs
            expected = self.outputs[spec.name]
            assert spec.dtype is None or spec.dtype == expected.dtype
            if spec.shape is not None:
                assert len(spec.shape) == expected.ndim
                for size, given in zip(spec.shape, expected.shape, strict=True):
                    assert size is None or size == given

    def test_leaves_its_inputs_as_they_were(self, model: Model, thread: ThreadPoolExecutor) -> None:
        before = copy.deepcopy(dict(self.inputs))
        thread.submit(self._check_answer, model).result()
        for name, value in before.items():
            np.testing.assert_array_equal(self.inputs[name], value)

    def test_answers_on_several_threads_at_once(self, model: Model) -> None:
        together = threading.Barrier(4)

        def answer() -> None:
            together.wait(10)
            for _ in range(5):
                self._check_answer(model)

        with ThreadPoolExecutor(4) as threads:
            for task in [threads.submit(answer) for _ in range(4)]:
                task.result(60)

    def test_two_loads_are_independent(
        self, backend: Backend, directory: Path, model: Model, thread: ThreadPoolExecutor
    ) -> None:
        other = thread.submit(self._load, backend, directory).result()
        assert other is not model
        thread.submit(self._check_answer, other).result()
        other.close()
        thread.submit(self._check_answer, model).result()

    def test_a_folder_without_a_model_is_a_model_error(self, backend: Backend, tmp_path: Path) -> None:
        empty = tmp_path / "an empty folder"
        empty.mkdir()
        for wrong in (empty, tmp_path / "no such folder"):
            with pytest.raises(ModelError) as error:
                self._load(backend, wrong)
            assert str(error.value), "an operator is not told what is wrong"

    def test_damaged_files_are_a_model_error(self, backend: Backend, directory: Path, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(directory, damaged)
        for path in damaged.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.raises(ModelError) as error:
            self._load(backend, damaged)
        assert str(error.value), "an operator is not told what is wrong"

    def test_arrays_survive_the_way_to_the_framework_and_back(self, model: Model) -> None:
        with model.session():
            for dtype in self.dtypes:
                whole = (np.arange(12).reshape(3, 4) % 2 * 3).astype(dtype)
                fixed = whole.copy()
                fixed.flags.writeable = False
                for array in (whole, whole[:, ::2], whole.T, whole[:0], whole[:1, :1].reshape(()), fixed):
                    back = model.to_numpy(model.to_native(array))
                    assert isinstance(back, np.ndarray)
                    assert back.dtype == array.dtype
                    assert back.shape == array.shape
                    np.testing.assert_array_equal(back, array)

    def test_converts_inside_containers_and_leaves_other_values_alone(self, model: Model) -> None:
        array = np.arange(3, dtype=np.float32)
        value = {"a": array, "b": [array, {"c": (array, 1)}], "d": "text", "e": None, "f": 2.5}
        with model.session():
            back = model.to_numpy(model.to_native(value))
        assert as_json(back) == as_json(value)
        assert isinstance(back["b"], list)
        assert isinstance(back["b"][1]["c"], tuple)
        assert isinstance(back["b"][1]["c"][0], np.ndarray)


def _assert_equal(given: Any, expected: Any, tolerance: float) -> None:
    """Payloads, or tensors: the same kinds, names, shapes and values, floating point within `tolerance`."""
    if isinstance(expected, np.ndarray):
        assert isinstance(given, np.ndarray)
        assert given.shape == expected.shape
        if expected.dtype.kind in "fcV":
            np.testing.assert_allclose(
                given.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
            )
        else:
            np.testing.assert_array_equal(given, expected)
    elif isinstance(expected, Mapping):
        assert isinstance(given, Mapping)
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            _assert_equal(given[name], value, tolerance)
    elif isinstance(expected, list | tuple):
        assert isinstance(given, list | tuple)
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            _assert_equal(one, other, tolerance)
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert type(given) is type(expected)
        assert given == expected


class HandlerConformance(_PluginConformance):
    """What every handler must keep. The subclass gives requests, and what comes of them with its model::

    class TestSentiment(HandlerConformance):
        handler_class = Sentiment
        samples = [
            (Request(payload="good", form=Form.TEXT), {"score": np.array([0.9], np.float32)}),
            (Request(payload="bad", form=Form.TEXT), {"score": np.array([0.1], np.float32)}),
        ]
        rejected = [Request(payload=b"\\x00", form=Form.BYTES)]

        @pytest.fixture
        def model(self):
            return FakeModel(2)
    """

    handler_class: ClassVar[type[Handler]]
    samples: ClassVar[Sequence[tuple[Request, Payload]]]
    """Requests, and the payload that answers each."""
    rejected: ClassVar[Sequence[Request]] = ()
    """Requests that are the client's mistake: BadRequest, from any of the three steps."""
    tolerance: ClassVar[float] = 1e-5
    """How far a floating-point value may be off, relative and absolute."""

    @pytest.fixture
    def model(self) -> Model:
        return FakeModel()

    @pytest.fixture
    def handler(self, model: Model) -> Handler:
        handler = self.handler_class(self.handler_class.Options(**self.options))
        with model.session():
            handler.load(model)
        return handler

    def _answer(self, handler: Handler, model: Model, request: Request) -> Payload:
        with model.session():
            inputs = handler.preprocess(request)
            outputs = handler.run_model(model, inputs, request)
            return handler.postprocess(outputs, request)

    def test_is_a_handler_with_a_name_and_plain_methods(self) -> None:
        self._check_class(self.handler_class, Handler, ["load", "preprocess", "run_model", "postprocess"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.handler_class.Options, self.options)

    def test_answers_its_samples_each_time_alike(self, handler: Handler, model: Model) -> None:
        assert self.samples, "a handler without samples proves nothing"
        for request, expected in [*self.samples, *self.samples]:
            _assert_equal(self._answer(handler, model, request), expected, self.tolerance)

    def test_answers_with_what_a_wire_can_carry(self, handler: Handler, model: Model) -> None:
        for request, _ in self.samples:
            payload = self._answer(handler, model, request)
            try:
                as_tensors(payload)
            except TypeError:
                json.dumps(as_json(payload), allow_nan=True)

    def test_keeps_requests_apart_that_are_under_way_together(self, handler: Handler, model: Model) -> None:
        """Several threads may be between two steps of different requests, so nothing of one may be kept on `self`."""
        with model.session():
            inputs = [handler.preprocess(request) for request, _ in self.samples]
            outputs = [
                handler.run_model(model, given, request)
                for given, (request, _) in zip(inputs, self.samples, strict=True)
            ]
            for given, (request, expected) in reversed(list(zip(outputs, self.samples, strict=True))):
                _assert_equal(handler.postprocess(given, request), expected, self.tolerance)

    def test_leaves_requests_as_they_were(self, handler: Handler, model: Model) -> None:
        for request, _ in self.samples:
            before = copy.deepcopy(request)
            self._answer(handler, model, request)
            _assert_equal(request.payload, before.payload, 0.0)
            assert (request.tags, request.parameters) == (before.tags, before.parameters)

    def test_tells_the_client_of_its_mistakes_and_goes_on(self, handler: Handler, model: Model) -> None:
        for request in self.rejected:
            with pytest.raises(BadRequest) as error:
                self._answer(handler, model, request)
            assert str(error.value), "the client is not told what is wrong"
        request, expected = self.samples[0]
        _assert_equal(self._answer(handler, model, request), expected, self.tolerance)


SelfT = TypeVar("SelfT", bound="TransportConformance")
P = ParamSpec("P")


def _asynchronous(
    test: Callable[Concatenate[SelfT, P], Coroutine[Any, Any, None]],
) -> Callable[Concatenate[SelfT, P], None]:
    """A test that is a coroutine, run by the suite's `run`."""

    @functools.wraps(test)
    def run(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.run(test(self, *args, **kwargs))

    return run


ECHO = "/conformance.Test/Echo"
HOLD = "/conformance.Test/Hold"
WARM = "/conformance.Test/Warm"
LOOPBACK = ("127.0.0.1:0",)


async def _echo(call: Call) -> bytes:
    return call.request


class _Hold:
    """A handler, of either kind, that holds its calls until told, and notes how they ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, call: Call) -> bytes:
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return call.request

    async def stream(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self(call)


class TransportConformance(_PluginConformance):
    """What every transport must keep, over real sockets on the loopback interface::

    class TestGrpcioTransport(TransportConformance):
        transport_class = GrpcioTransport
    """

    transport_class: ClassVar[type[Transport]]
    prompt_s: ClassVar[float] = 1.0
    """How many seconds something may take that is to happen at once."""

    @pytest.fixture
    def transport(self) -> Transport:
        return self.transport_class(self.transport_class.Options(**self.options))

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Runs one test on an event loop of its own, for at most a minute. Override it if the loop must be another."""

        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test

        with asyncio.Runner() as runner:
            runner.run(bounded())

    def test_is_a_transport_with_a_name(self) -> None:
        self._check_class(self.transport_class, Transport, ["connect"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.transport_class.Options, self.options)

    # Messages and metadata

    @pytest.mark.parametrize(
        "message", [b"", b"\0", bytes(range(256)), b"x" * 1_000_000], ids=["empty", "zero", "all", "1 MB"]
    )
    @_asynchronous
    async def test_bytes_go_there_and_back(self, transport: Transport, message: bytes) -> None:
        seen: list[Call] = []

        async def reverse(call: Call) -> bytes:
            seen.append(call)
            return call.request[::-1]

        async with _pair(transport, reverse) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message[::-1]
        assert [(call.method, call.request) for call in seen] == [(ECHO, message)]

    @_asynchronous
    async def test_handlers_run_on_the_loop_that_made_the_server(self, transport: Transport) -> None:
        loops = []

        async def note(call: Call) -> bytes:
            loops.append(asyncio.get_running_loop())
            return b""

        async with _pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b""))
        assert loops == [asyncio.get_running_loop()]

    @_asynchronous
    async def test_an_unknown_method_is_unimplemented(self, transport: Transport) -> None:
        async with _pair(transport, _echo) as connection:
            for method in ("/conformance.Test/Unknown", "/conformance.Other/Echo"):
                error = await _error(connection.call(Call(method=method, request=b"")))
                assert error.code is Code.UNIMPLEMENTED
                assert error.blame is Blame.CLIENT
            assert await connection.call(Call(method=ECHO, request=b"still here")) == b"still here"

    @_asynchronous
    async def test_metadata_arrive_in_order_and_nothing_of_the_protocol_with_them(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        sent = (
            ("x-request-id", "7"),
            ("x-tag", "one"),
            ("trace-bin", bytes(range(256))),
            ("x-tag", "two, three"),
            ("empty-bin", b""),
        )
        deadline = time.monotonic() + 10
        async with _pair(transport, note) as connection:
            await connection.call(Call(method=ECHO, request=b"", metadata=sent, deadline=deadline))
        assert _by_key(seen[0].metadata) == _by_key(sent)

    @_asynchronous
    async def test_metadata_of_an_official_client_hold_nothing_of_the_protocol(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        async with _serving(transport, {ECHO: note}) as address, _official(address) as channel:
            sent = (("x-request-id", "7"), ("trace-bin", b"\0\xff"))
            await channel.unary_unary(ECHO)(b"", metadata=sent, timeout=10)
        assert _by_key(seen[0].metadata) == _by_key(sent)

    @_asynchronous
    async def test_trailers_come_back_with_an_answer_and_with_an_error(self, transport: Transport) -> None:
        sent: list[tuple[str, str | bytes]] = [
            ("x-load", "0.5"),
            ("x-report-bin", b"\0\x01\xff"),
            ("x-load", "0.6"),
        ]

        async def answer(call: Call) -> bytes:
            call.trailers.extend(sent)
            if call.request == b"fail":
                raise NodeFailed("failed on purpose")
            return b"answered"

        async with _pair(transport, answer) as connection:
            good = Call(method=ECHO, request=b"")
            await connection.call(good)
            bad = Call(method=ECHO, request=b"fail")
            await _error(connection.call(bad))
        assert _by_key(good.trailers) == _by_key(sent)
        assert _by_key(bad.trailers) == _by_key(sent)

    @_asynchronous
    async def test_an_official_client_that_compresses_is_answered(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return call.request

        message = b"compress me " * 10_000
        async with (
            _serving(transport, {ECHO: note}) as address,
            _official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            assert await channel.unary_unary(ECHO)(message, timeout=10) == message
        assert seen[0].request == message
        assert seen[0].metadata == ()

    @_asynchronous
    async def test_500_calls_in_flight_are_answered_in_any_order(self, transport: Transport) -> None:
        count = 500
        arrived = asyncio.Event()
        waiting: dict[bytes, asyncio.Future[None]] = {}

        async def wait(call: Call) -> bytes:
            future = waiting[call.request] = asyncio.get_running_loop().create_future()
            if len(waiting) == count:
                arrived.set()
            await future
            return b"answer to " + call.request

        async with _pair(transport, wait) as connection:
            calls = [
                asyncio.ensure_future(connection.call(Call(method=ECHO, request=b"%d" % number)))
                for number in range(count)
            ]
            async with asyncio.timeout(20):
                await arrived.wait()
            for future in reversed(waiting.values()):
                future.set_result(None)
            answers = await asyncio.gather(*calls)
        assert answers == [b"answer to %d" % number for number in range(count)]

    # Sizes

    @pytest.mark.parametrize("smaller", ["client", "server", "both"])
    @pytest.mark.parametrize("large", ["request", "answer"])
    @_asynchronous
    async def test_messages_over_the_limit_are_refused_and_those_at_it_pass(
        self, transport: Transport, smaller: str, large: str
    ) -> None:
        limit = 64 * 1024

        async def answer(call: Call) -> bytes:
            return call.request if large == "request" else b"x" * int(call.request)

        def call(size: int) -> Call:
            return Call(method=ECHO, request=b"x" * size if large == "request" else b"%d" % size)

        async with _pair(
            transport,
            answer,
            Limits(message_bytes=limit if smaller != "client" else 4 * limit),
            Limits(message_bytes=limit if smaller != "server" else 4 * limit),
        ) as connection:
            assert len(await connection.call(call(limit))) == limit
            for size in (limit + 1, 3 * limit):
                error = await _error(connection.call(call(size)))
                assert isinstance(error, MessageTooLarge)
            assert len(await connection.call(call(limit))) == limit

    @_asynchronous
    async def test_ten_megabytes_pass_by_default(self, transport: Transport) -> None:
        message = b"\x01" * (10 * 1024 * 1024)
        async with _pair(transport, _echo) as connection:
            assert await connection.call(Call(method=ECHO, request=message)) == message

    @_asynchronous
    async def test_what_is_over_the_limit_only_when_unpacked_is_refused(self, transport: Transport) -> None:
        """A compressed request of a few kilobytes must not fill the memory."""
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        limits = Limits(message_bytes=64 * 1024)
        async with (
            _serving(transport, {ECHO: note}, limits=limits) as address,
            _official(address, compression=grpc.Compression.Gzip) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(ECHO)(bytes(4 * 1024 * 1024), timeout=10)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not seen

    # Errors

    @pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
    @_asynchronous
    async def test_each_status_arrives_with_its_message(self, transport: Transport, code: Code) -> None:
        class Failure(InferenceError):
            pass

        Failure.code = code
        messages = ["plain", "", "100 % of “naïve” 輸入\nand a second line\t%41", " blanks around "]

        async def fail(call: Call) -> bytes:
            raise Failure(messages[int(call.request)])

        async with _pair(transport, fail) as connection:
            for number, message in enumerate(messages):
                error = await _error(connection.call(Call(method=ECHO, request=b"%d" % number)))
                expected = from_status(code, message)
                assert type(error) is type(expected)
                assert error.code is expected.code
                assert str(error) == message

    @_asynchronous
    async def test_a_message_too_long_for_a_header_does_not_hide_the_status(self, transport: Transport) -> None:
        """gRPC carries messages in headers, which peers limit to 8 or 16 KiB after percent-encoding."""
        message = "輸入形狀" * 5000

        async def fail(call: Call) -> bytes:
            raise BadRequest(message)

        async with _pair(transport, fail) as connection:
            for _ in range(5):
                error = await _error(connection.call(Call(method=ECHO, request=b"")))
                assert error.code is Code.INVALID_ARGUMENT
                assert str(error)[:300] == message[:300]

    @_asynchronous
    async def test_what_nobody_foresaw_is_a_failure_and_never_ok(self, transport: Transport) -> None:
        async def fail(call: Call) -> bytes:
            raise ZeroDivisionError("an exception outside the tree")

        async with _pair(transport, fail) as connection:
            error = await _error(connection.call(Call(method=ECHO, request=b"")))
            assert isinstance(error, NodeFailed)
            await _warm(connection)

    # Deadlines and cancellation

    @_asynchronous
    async def test_the_deadline_reaches_the_server(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def note(call: Call) -> bytes:
            seen.append(call)
            return b""

        async with _pair(transport, note) as connection:
            for seconds in (0.9, 5.0, 100.0):
                deadline = time.monotonic() + seconds
                await connection.call(Call(method=ECHO, request=b"", deadline=deadline))
                received = seen[-1].deadline
                assert received is not None
                # gRPC rounds a timeout up, to 1 % at worst.
                assert deadline - 0.5 < received <= deadline + 0.05 + 0.01 * seconds
            await connection.call(Call(method=ECHO, request=b""))
            assert seen[-1].deadline is None

    @_asynchronous
    async def test_a_deadline_that_passes_ends_the_call_on_both_sides(self, transport: Transport) -> None:
        hold = _Hold()
        async with _pair(transport, hold) as connection:
            await _warm(connection)
            started = time.monotonic()
            error = await _error(connection.call(Call(method=HOLD, request=b"", deadline=started + 0.3)))
            took = time.monotonic() - started
            assert isinstance(error, DeadlineExceeded)
            assert 0.25 < took < 0.3 + self.prompt_s
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    @_asynchronous
    async def test_a_deadline_already_passed_sends_nothing(self, transport: Transport) -> None:
        hold = _Hold()
        async with _pair(transport, hold) as connection:
            await _warm(connection)
            past = time.monotonic() - 1
            error = await _error(connection.call(Call(method=HOLD, request=b"", deadline=past)))
            assert isinstance(error, DeadlineExceeded)
            await _warm(connection)
            assert not hold.entered.is_set()

    @_asynchronous
    async def test_cancelling_the_caller_cancels_the_handler_and_no_other_call(self, transport: Transport) -> None:
        one, other = _Hold(), _Hold()
        methods: dict[str, UnaryHandler] = {HOLD: one, ECHO: other}
        async with _serving(transport, methods) as address, _connected(transport, address) as connection:
            leaving = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
            staying = asyncio.ensure_future(connection.call(Call(method=ECHO, request=b"stays")))
            async with asyncio.timeout(10):
                await one.entered.wait()
                await other.entered.wait()
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            async with asyncio.timeout(self.prompt_s):
                await one.cancelled.wait()
            other.release.set()
            assert await staying == b"stays"
            assert not other.cancelled.is_set()

    @_asynchronous
    async def test_an_official_client_that_hangs_up_cancels_the_handler(self, transport: Transport) -> None:
        hold = _Hold()
        async with _serving(transport, {HOLD: hold}) as address:
            async with _official(address) as channel:
                call = channel.unary_unary(HOLD)(b"")
                async with asyncio.timeout(10):
                    await hold.entered.wait()
                await channel.close()
                with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await call
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    @_asynchronous
    async def test_closing_a_connection_ends_its_calls(self, transport: Transport) -> None:
        hold = _Hold()
        async with _serving(transport, {HOLD: hold}) as address:
            connection = transport.connect(address, Limits())
            call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"")))
            async with asyncio.timeout(10):
                await hold.entered.wait()
            await connection.close()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                with pytest.raises((asyncio.CancelledError, InferenceError)):
                    await call
            await _error(connection.call(Call(method=HOLD, request=b"")))

    # Streaming, which a connection has not; so through official clients

    @_asynchronous
    async def test_one_request_may_have_many_answers(self, transport: Transport) -> None:
        async def count(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            call.trailers.append(("x-load", "0.5"))
            async for request in requests:
                for number in range(int(request)):
                    yield b"%d" % number

        async with _serving(transport, streaming={ECHO: count}) as address, _official(address) as channel:
            call = channel.unary_stream(ECHO)(b"3", metadata=(("x-request-id", "7"),), timeout=10)
            assert [answer async for answer in call] == [b"0", b"1", b"2"]
            assert ("x-load", "0.5") in [tuple(item) for item in await call.trailing_metadata()]
            assert [answer async for answer in channel.unary_stream(ECHO)(b"0", timeout=10)] == []

    @_asynchronous
    async def test_a_stream_answers_each_message_as_it_comes(self, transport: Transport) -> None:
        seen: list[Call] = []

        async def reverse(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            seen.append(call)
            async for request in requests:
                yield request[::-1]
            yield b"end"

        async with _serving(transport, streaming={ECHO: reverse}) as address, _official(address) as channel:
            call = channel.stream_stream(ECHO)(metadata=(("x-request-id", "7"),), timeout=10)
            for message in (b"ab", b"", b"x" * 200_000, b"cd"):
                await call.write(message)
                assert await call.read() == message[::-1]
            await call.done_writing()
            assert await call.read() == b"end"
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
        assert [(each.method, each.request, tuple(each.metadata)) for each in seen] == [
            (ECHO, b"", (("x-request-id", "7"),))
        ]
        assert seen[0].deadline is not None

    @_asynchronous
    async def test_a_stream_that_fails_keeps_what_was_sent_and_says_why(self, transport: Transport) -> None:
        async def fail(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            yield b"one"
            yield b"two"
            raise BadRequest("no third for “你”")

        async with _serving(transport, streaming={ECHO: fail}) as address, _official(address) as channel:
            call = channel.unary_stream(ECHO)(b"", timeout=10)
            assert [await call.read(), await call.read()] == [b"one", b"two"]
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "no third for “你”"

    @_asynchronous
    async def test_a_client_that_leaves_its_stream_cancels_the_handler(self, transport: Transport) -> None:
        hold = _Hold()
        async with (
            _serving(transport, streaming={HOLD: hold.stream}) as address,
            _official(address) as channel,
        ):
            call = channel.stream_stream(HOLD)()
            await call.write(b"")
            assert await call.read() == b"first"
            async with asyncio.timeout(10):
                await hold.entered.wait()
            call.cancel()
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()

    # Servers and their addresses

    @_asynchronous
    async def test_one_server_answers_on_several_addresses(self, transport: Transport) -> None:
        server = await transport.serve(Methods(unary={ECHO: _echo, WARM: _echo}), LOOPBACK * 2, Limits())
        try:
            assert len(set(server.ports)) == 2
            for port in server.ports:
                async with _connected(transport, f"127.0.0.1:{port}") as connection:
                    await _warm(connection)
        finally:
            await server.drain(0)

    @_asynchronous
    async def test_two_servers_share_a_port_if_both_say_so(self, transport: Transport) -> None:
        answered = [0, 0]

        def count(number: int) -> UnaryHandler:
            async def answer(call: Call) -> bytes:
                answered[number] += 1
                return b""

            return answer

        one = await transport.serve(Methods(unary={ECHO: count(0)}), LOOPBACK, Limits(), share_port=True)
        address = f"127.0.0.1:{one.ports[0]}"
        two = await transport.serve(Methods(unary={ECHO: count(1)}), (address,), Limits(), share_port=True)
        try:
            assert two.ports == one.ports
            for _ in range(40):  # the kernel picks by the client's port: all on one side is 1 in 2**39
                async with _connected(transport, address) as connection:
                    await connection.call(Call(method=ECHO, request=b""))
            assert sum(answered) == 40
            assert all(answered)
        finally:
            await one.drain(0)
            await two.drain(0)

    @_asynchronous
    async def test_a_port_in_use_is_a_config_error(self, transport: Transport) -> None:
        async with _serving(transport, {ECHO: _echo}) as address:
            with pytest.raises(ConfigError, match=address):
                await transport.serve(Methods(unary={}), (address,), Limits())
            async with _connected(transport, address) as connection:
                await _warm(connection)

    @pytest.mark.parametrize("address", ["127.0.0.1:70000", "127.0.0.1:http?", "192.0.2.1:0", "no address"])
    @_asynchronous
    async def test_a_bad_address_is_a_config_error_and_leaves_no_port_taken(
        self, transport: Transport, address: str
    ) -> None:
        good = f"127.0.0.1:{_free_port()}"
        with pytest.raises(ConfigError) as error:
            await transport.serve(Methods(unary={}), (good, address), Limits())
        assert address in str(error.value)
        server = await transport.serve(Methods(unary={ECHO: _echo}), (good,), Limits())
        await server.drain(0)

    # Draining

    @_asynchronous
    async def test_a_drain_lets_calls_finish_and_refuses_new_ones_so_that_another_node_is_tried(
        self, transport: Transport
    ) -> None:
        for attempt in range(20):  # calls that cross with the server's goodbye are the ones that go wrong, sometimes
            hold = _Hold()
            server = await transport.serve(Methods(unary={HOLD: hold, ECHO: _echo}), LOOPBACK, Limits())
            address = f"127.0.0.1:{server.ports[0]}"
            async with _connected(transport, address) as connection, _connected(transport, address) as other:
                call = asyncio.ensure_future(connection.call(Call(method=HOLD, request=b"finishes")))
                async with asyncio.timeout(10):
                    await hold.entered.wait()
                drain = asyncio.ensure_future(server.drain(10))
                crossing = [
                    connection.call(Call(method=ECHO, request=b"")) for _ in range(10 if attempt % 4 == 0 else 0)
                ]
                for result in await asyncio.gather(*crossing, return_exceptions=True):
                    assert result == b"" or isinstance(result, NodeUnreachable), repr(result)
                for each in (connection, other):
                    error = await _refusal(each, self.prompt_s)
                    assert isinstance(error, NodeUnreachable), repr(error)
                assert not drain.done()
                assert not hold.cancelled.is_set()
                hold.release.set()
                assert await call == b"finishes"
                async with asyncio.timeout(self.prompt_s):
                    await drain

    @_asynchronous
    async def test_a_call_that_outlasts_the_grace_is_cancelled(self, transport: Transport) -> None:
        hold = _Hold()
        server = await transport.serve(Methods(unary={HOLD: hold}), LOOPBACK, Limits())
        async with _connected(transport, f"127.0.0.1:{server.ports[0]}") as connection:
            call = asyncio.ensure_future(_error(connection.call(Call(method=HOLD, request=b""))))
            async with asyncio.timeout(10):
                await hold.entered.wait()
            started = time.monotonic()
            await server.drain(0.3)
            assert 0.25 < time.monotonic() - started < 0.3 + self.prompt_s
            async with asyncio.timeout(self.prompt_s):
                await hold.cancelled.wait()
                error = await call
            assert error.another_node, "the node took the call and gave it up: another may answer it"

    @_asynchronous
    async def test_a_drain_with_nothing_in_flight_returns_at_once_and_frees_the_port(
        self, transport: Transport
    ) -> None:
        server = await transport.serve(Methods(unary={WARM: _echo}), LOOPBACK, Limits())
        address = f"127.0.0.1:{server.ports[0]}"
        async with _connected(transport, address) as connection:
            await _warm(connection)
            async with asyncio.timeout(self.prompt_s):
                await server.drain(10)
        again = await transport.serve(Methods(unary={ECHO: _echo}), (address,), Limits())
        await again.drain(0)

    # Nodes that are not there

    @_asynchronous
    async def test_a_dead_port_is_unreachable_at_once_and_reached_again_in_1500_ms(self, transport: Transport) -> None:
        address = f"127.0.0.1:{_free_port()}"
        async with _connected(transport, address) as connection:
            for _ in range(5):
                started = time.monotonic()
                error = await _error(connection.call(Call(method=ECHO, request=b"")))
                assert isinstance(error, NodeUnreachable)
                assert time.monotonic() - started < 1
            for _ in range(2):
                server = await transport.serve(Methods(unary={ECHO: _echo}), (address,), Limits())
                await _reached(connection, 1.5)
                await server.drain(0)
                await _refusal(connection, self.prompt_s)

    @_asynchronous
    async def test_a_peer_that_says_nothing_costs_no_more_than_the_deadline(self, transport: Transport) -> None:
        async with _peer(None) as address, _connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 0.4)
            error = await _error(connection.call(call))
            assert isinstance(error, DeadlineExceeded | NodeUnreachable)
            assert time.monotonic() - started < 0.4 + self.prompt_s

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"])
    @_asynchronous
    async def test_a_peer_that_hangs_up_or_is_no_grpc_server_is_the_nodes_failure(
        self, transport: Transport, answer: bytes
    ) -> None:
        async with _peer(answer) as address, _connected(transport, address) as connection:
            started = time.monotonic()
            call = Call(method=ECHO, request=b"", deadline=started + 10)
            error = await _error(connection.call(call))
            assert error.blame is Blame.NODE
            assert error.another_node
            assert time.monotonic() - started < 1 + self.prompt_s


@asynccontextmanager
async def _serving(
    transport: Transport,
    unary: Mapping[str, UnaryHandler] | None = None,
    streaming: Mapping[str, StreamHandler] | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[str]:
    """A server on the loopback interface, on which `_warm` works too: its address."""
    methods = Methods(unary={**(unary or {}), WARM: _echo}, streaming=streaming or {})
    server = await transport.serve(methods, LOOPBACK, limits or Limits())
    assert isinstance(server, Server)
    try:
        yield f"127.0.0.1:{server.ports[0]}"
    finally:
        await server.drain(0)


@asynccontextmanager
async def _connected(transport: Transport, address: str, limits: Limits | None = None) -> AsyncIterator[Connection]:
    connection = transport.connect(address, limits or Limits())
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _pair(
    transport: Transport,
    handler: UnaryHandler,
    server_limits: Limits | None = None,
    client_limits: Limits | None = None,
) -> AsyncIterator[Connection]:
    """A connection to a server whose methods ECHO and HOLD are `handler`."""
    methods = {ECHO: handler, HOLD: handler}
    async with (
        _serving(transport, methods, limits=server_limits) as address,
        _connected(transport, address, client_limits) as connection,
    ):
        yield connection


@asynccontextmanager
async def _official(address: str, **options: Any) -> AsyncIterator[Any]:
    """A channel of the grpcio package's own."""
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)], **options
    ) as channel:
        yield channel


@asynccontextmanager
async def _peer(answer: bytes | None) -> AsyncIterator[str]:
    """The address of a TCP server that answers so to whatever comes, and hangs up; None never answers."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            await done.wait()
        else:
            await reader.read(100)
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        done.set()
        server.close()


def _by_key(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str | bytes]]:
    """In the order of the keys, equal ones as they stood: gRPC promises no order between different keys."""
    return sorted(((key, value) for key, value in metadata), key=lambda item: item[0])


async def _error(call: Coroutine[Any, Any, bytes]) -> InferenceError:
    with pytest.raises(InferenceError) as error:
        await call
    return error.value


async def _warm(connection: Connection) -> None:
    """A call there and back, so that the connection stands."""
    assert await connection.call(Call(method=WARM, request=b"warm")) == b"warm"


async def _refusal(connection: Connection, within_s: float) -> InferenceError:
    """The error of the first call that is not answered any more."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await connection.call(Call(method=ECHO, request=b""))
            except InferenceError as error:
                return error


async def _reached(connection: Connection, within_s: float) -> None:
    """Calls until one is answered."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await connection.call(Call(method=ECHO, request=b""))
            except InferenceError:
                await asyncio.sleep(0.02)
            else:
                return


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
