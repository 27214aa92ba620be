"""The suites pass what is right, and find what is wrong."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.gateway.balancing import Balancer, Node, Outcome
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Form, Payload, Request, Tensor
from dl_inference_core.testing import (
    BackendConformance,
    BalancerConformance,
    FakeBackend,
    FakeModel,
    FakeNode,
    HandlerConformance,
)
from dl_inference_core.transport import Exchange


class TestFakeBackend(BackendConformance):
    backend_class = FakeBackend
    inputs: ClassVar = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    outputs: ClassVar = {"x": np.arange(6, dtype=np.float32).reshape(2, 3) * 2.5}

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return FakeBackend.write(tmp_path / "model", factor=2.5, inputs={"x": ["float32", [None, 3]]})


class TestDefaultHandler(HandlerConformance):
    handler_class = Handler
    samples: ClassVar = [
        (Request(payload={"x": np.ones((1, 2), np.float32)}, form=Form.TENSORS), {"x": np.full((1, 2), 2.0)}),
        (Request(payload=np.ones((3, 2)), form=Form.TENSOR), {"x": np.full((3, 2), 2.0)}),
        (Request(payload={"x": [[1, 2]]}, form=Form.JSON), {"x": np.array([[2.0, 4.0]])}),
    ]
    rejected: ClassVar = [
        Request(payload=b"\x00", form=Form.BYTES),
        Request(payload="text", form=Form.TEXT),
        Request(payload={"y": np.ones((1, 2), np.float32)}, form=Form.TENSORS),
        Request(payload=np.ones((1, 3)), form=Form.TENSOR),
    ]

    @pytest.fixture
    def model(self) -> Model:
        spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 2))
        return FakeModel(2, Signature(inputs=(spec,), outputs=(spec,)))


def test_a_fake_model_keeps_dtypes_and_strings() -> None:
    strings = np.array([b"a", b"b"], dtype=object)
    model = FakeModel(3)
    outputs = model({"i": np.array([2**62 // 3], np.int64), "s": strings})
    assert outputs["i"].dtype == np.int64
    assert outputs["i"][0] == 2**62 // 3 * 3
    assert outputs["s"].tolist() == [b"a", b"b"]
    assert [sorted(call) for call in model.calls] == [["i", "s"]]
    assert not model.closed
    model.close()
    assert model.closed


def test_a_fake_backend_fails_as_its_file_says(tmp_path: Path) -> None:
    backend = FakeBackend()
    with pytest.raises(ModelError, match="out of memory"):
        backend.load(FakeBackend.write(tmp_path / "a", fail_load="out of memory"), FakeBackend.ModelOptions(), "cpu")
    with pytest.raises(ModelError, match="no_such_key"):
        backend.load(FakeBackend.write(tmp_path / "b", no_such_key=1), FakeBackend.ModelOptions(), "cpu")
    model = backend.load(FakeBackend.write(tmp_path / "c", fail="boom"), FakeBackend.ModelOptions(), "cpu")
    with pytest.raises(RuntimeError, match="boom"):
        model({"x": np.ones(1)})
    assert backend.models == [model]


def test_model_options_take_precedence_over_the_file(tmp_path: Path) -> None:
    directory = FakeBackend.write(tmp_path / "model", factor=2)
    model = FakeBackend().load(directory, FakeBackend.ModelOptions(factor=5), "cuda:1")
    assert model({"x": np.ones(1)})["x"].tolist() == [5.0]
    assert model.device == "cuda:1"


class Right(Balancer):
    name = "right"

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return nodes[0]


class Remembers(Right):
    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.first: Node | None = None

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        self.first = self.first or nodes[0]
        return self.first


class Leaks(Right):
    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.outcomes: dict[Node, Outcome] = {}

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        self.outcomes[node] = outcome

    def forget(self, node: Node) -> None:
        self.outcomes.pop(node, None)


class KnowsNoStrangers(Right):
    def forget(self, node: Node) -> None:
        raise KeyError(node.address)


class Divides(Right):
    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return min(nodes, key=lambda node: 1 / sum(each.weight for each in nodes))


class Sorts(Right):
    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        if isinstance(nodes, list):
            nodes.reverse()
        return nodes[0]


class Sinks(Right):
    """To it a node that fails at once looks idle."""

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return min(nodes, key=lambda node: (node.in_flight, self.random.random()))


class RollsItsOwnDice(Right):
    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.dice = random.Random()

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return self.dice.choice(nodes)


class BlamesNodesForClients(Right):
    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self.avoided = ""

    def choose(self, nodes: Sequence[Node], exchange: Exchange) -> Node:
        return next((node for node in nodes if node.address != self.avoided), nodes[0])

    def record(self, node: Node, outcome: Outcome, seconds: float) -> None:
        if outcome is not Outcome.SUCCESS:
            self.avoided = node.address


class NeverForgives(BlamesNodesForClients):
    """Nor does it take notice of a node's return."""


class Nameless(Right):
    name = ""


class Lenient(Right):
    class Options(PluginOptions):
        model_config: ClassVar = {"extra": "ignore"}


@pytest.mark.parametrize(
    ("wrong", "found_by"),
    [
        (Remembers, "test_chooses_the_only_node"),
        (Remembers, "test_never_chooses_a_node_that_is_not_given_this_time"),
        (Leaks, "test_keeps_nothing_of_a_forgotten_node_even_if_an_attempt_ends_later"),
        (KnowsNoStrangers, "test_tells_nodes_apart_by_identity"),
        (Divides, "test_copes_with_weights_that_are_all_zero"),
        (Sorts, "test_chooses_one_of_those_given_and_leaves_the_sequence_alone"),
        (Right, "test_gives_each_of_equal_nodes_something"),
        (Sinks, "test_a_node_that_fails_at_once_attracts_nothing"),
        (RollsItsOwnDice, "test_is_the_same_under_the_same_clock_and_chance"),
        (BlamesNodesForClients, "test_what_says_nothing_of_a_node_changes_nothing"),
        (NeverForgives, "test_a_node_that_is_back_soon_gets_its_part_again"),
        (Nameless, "test_is_a_balancer_with_a_name_and_plain_methods"),
        (Lenient, "test_options_are_strict"),
    ],
)
def test_the_balancer_suite_finds(wrong: type[Balancer], found_by: str) -> None:
    class Suite(BalancerConformance):
        balancer_class = wrong

    nodes = [FakeNode(f"10.0.0.{number}:8500") for number in range(4)]
    check(Suite(), found_by, balancer=wrong(wrong.Options()), nodes=nodes)


class KeepsTheRequest(Handler):
    """Holds a request's factor on itself, where the next request overwrites it."""

    name = "keeps"

    def preprocess(self, request: Request) -> Any:
        self.text = request.payload
        return {"x": np.ones(1)}

    def postprocess(self, outputs: Any, request: Request) -> Payload:
        return str(self.text)


class Scribbles(Handler):
    name = "scribbles"

    def preprocess(self, request: Request) -> Any:
        assert isinstance(request.payload, np.ndarray)
        request.payload[:] = 0
        return {"x": request.payload}


@pytest.mark.parametrize(
    ("wrong", "samples", "found_by"),
    [
        (
            KeepsTheRequest,
            [(Request(payload=text, form=Form.TEXT), text) for text in ("one", "two")],
            "test_keeps_requests_apart_that_are_under_way_together",
        ),
        (
            Scribbles,
            [(Request(payload=np.ones(2), form=Form.TENSOR), {"x": np.zeros(2)})],
            "test_leaves_requests_as_they_were",
        ),
        (
            Handler,
            [(Request(payload=np.ones(2), form=Form.TENSOR), {"input": np.zeros(2)})],
            "test_answers_its_samples_each_time_alike",
        ),
    ],
)
def test_the_handler_suite_finds(wrong: type[Handler], samples: Any, found_by: str) -> None:
    class Suite(HandlerConformance):
        handler_class = wrong

    Suite.samples = samples
    check(Suite(), found_by, handler=wrong(wrong.Options()), model=FakeModel())


class Truncates(FakeModel):
    def to_native(self, value: Any) -> Any:
        return value.astype(np.float32) if isinstance(value, np.ndarray) else value


class Overwrites(FakeModel):
    def __call__(self, inputs: Mapping[str, Any], signature: str = "serving_default") -> dict[str, Tensor]:
        for value in inputs.values():
            value *= 2
        return dict(inputs)


@pytest.mark.parametrize(
    ("wrong", "found_by"),
    [
        (Truncates(2), "test_arrays_survive_the_way_to_the_framework_and_back"),
        (FakeModel(3), "test_takes_the_frameworks_tensors_as_well"),
        (Overwrites(), "test_leaves_its_inputs_as_they_were"),
    ],
)
def test_the_backend_suite_finds(wrong: FakeModel, found_by: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    class Suite(BackendConformance):
        backend_class = FakeBackend
        inputs: ClassVar = {"x": np.ones(2)}
        outputs: ClassVar = {"x": np.full(2, 2.0)}

    with ThreadPoolExecutor(1) as thread:
        check(Suite(), found_by, model=wrong, thread=thread)


def check(suite: object, test: str, **fixtures: Any) -> None:
    """That test of the suite fails; with those of the fixtures that it takes."""
    method: Callable[..., None] = getattr(suite, test)
    wanted = inspect.signature(method).parameters
    with pytest.raises((AssertionError, KeyError, ZeroDivisionError, pytest.fail.Exception)):
        method(**{name: value for name, value in fixtures.items() if name in wanted})
