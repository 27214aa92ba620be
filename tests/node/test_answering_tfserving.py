"""TensorFlow Serving's other methods, and version labels, on a model that has no TensorFlow in it."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving.protocols import CLASSIFY as CLASSIFY_PROTOCOL
from dl_inference_tfserving.protocols import MULTI_INFERENCE
from dl_inference_tfserving.protocols import REGRESS as REGRESS_PROTOCOL

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import (
    BadRequest,
    DeadlineExceeded,
    FailedPrecondition,
    HandlerFailed,
    ModelNotFound,
    ModelNotReady,
    Unimplemented,
)
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.model import ServedModel
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Method, Payload, Request, Tensor
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, SIGNATURES, VERSIONS

CLASSIFY, REGRESS = Method.CLASSIFY.value, Method.REGRESS.value
EXAMPLES = TensorSpec(name="inputs", dtype=np.dtype(object), shape=(None,), native_name="tf_example:0")
SCORES = TensorSpec(name="scores", dtype=np.dtype(np.float32), shape=(None, 2))
CLASSES = TensorSpec(name="classes", dtype=np.dtype(object), shape=(None, 2))
OUTPUTS = TensorSpec(name="outputs", dtype=np.dtype(np.float32), shape=(None, 1))
X = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=None)


class Scorer(FakeModel):
    """Of each example its feature "x" times `factor`, as the signature has it."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        return {
            "serving_default": self.signature,
            "classify": Signature(inputs=(EXAMPLES,), outputs=(CLASSES, SCORES), method=CLASSIFY),
            "regress": Signature(inputs=(EXAMPLES,), outputs=(OUTPUTS,), method=REGRESS),
            # TensorFlow 2 has no methods but this one.
            "scores_of_2": Signature(inputs=(EXAMPLES,), outputs=(SCORES,)),
            "values_of_2": Signature(inputs=(EXAMPLES,), outputs=(OUTPUTS,)),
            "own_method": Signature(inputs=(EXAMPLES,), outputs=(OUTPUTS,), method="somebody/elses/method"),
            "two_inputs": Signature(inputs=(EXAMPLES, X), outputs=(SCORES,)),
            "three_outputs": Signature(inputs=(EXAMPLES,), outputs=(CLASSES, SCORES, OUTPUTS)),
            "no_outputs": Signature(inputs=(EXAMPLES,)),
            "x_for_examples": Signature(inputs=(X,), outputs=(SCORES,)),
        }

    def __call__(self, inputs: Mapping[str, Any], signature: str = "serving_default") -> dict[str, Tensor]:
        if signature == "serving_default":
            return super().__call__(inputs)
        self.calls.append({**inputs, "signature": signature})
        if self.fail:
            raise RuntimeError(self.fail)
        features = [messages.Example.FromString(body).features.feature["x"] for body in inputs["inputs"]]
        values = np.array([[feature.float_list.value[0]] for feature in features], np.float32) * self.factor
        return {
            "scores": np.concatenate([-values, values], axis=1),
            "classes": np.array([[b"low", b"high"]] * len(values), object),
            "outputs": values,
        }


class ScorerBackend(FakeBackend):
    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        plain = super().load(directory, options, device)
        self.models[-1] = Scorer(
            plain.factor, Signature(inputs=(X,), outputs=(X,)), fail=plain.fail, sleep_s=plain.sleep_s
        )
        return self.models[-1]


@asynccontextmanager
async def served(
    folder: Path, *, versions: tuple[int, ...] = (1,), toml: str = "", handler: type[Handler] = Handler, **content: Any
) -> AsyncIterator[tuple[ServedModel, Repository, ScorerBackend]]:
    """A model "m" whose factor is ten times its version's number."""
    for number in versions:
        FakeBackend.write(folder / "m" / str(number), **{"factor": number * 10, **content})
    (folder / "m" / "model.toml").write_text(f'handler = "it"\n{toml}', encoding="utf-8")
    backend = ScorerBackend()
    repository = Repository(
        folder,
        backends={"fake": backend},
        handlers={"it": handler, "default": Handler, "processor": Processor},
        poll_interval_s=3600,
    )
    try:
        await repository.start()
        yield repository.models["m"], repository, backend
    finally:
        await repository.close()


async def look_twice(repository: Repository) -> None:
    await repository.look()
    await repository.look()
    await repository.settle()


async def infer(model: ServedModel, method: str, *x: float, **more: Any) -> Any:
    """The answer to one of the methods for examples with those values, as the message that it is."""
    protocol = {"classify": CLASSIFY_PROTOCOL, "regress": REGRESS_PROTOCOL}[method]
    request = Request(payload=[{"x": float(value)} for value in x or (1.0,)], form=Form.EXAMPLES, model="m", **more)
    body = protocol.codec.encode_request(request)
    answer = await answered(model, protocol, body)
    return (messages.ClassificationResponse if method == "classify" else messages.RegressionResponse).FromString(answer)


async def predict(model: ServedModel, **more: Any) -> Any:
    protocol = PROTOCOLS["tfserving"]
    request = Request(payload={"x": np.ones(1, np.float32)}, form=Form.TENSORS, model="m", **more)
    answer = await answered(model, protocol, protocol.codec.encode_request(request))
    return messages.PredictResponse.FromString(answer)


async def ask(model: ServedModel, **spec: Any) -> Any:
    """What its versions are: (number, state, code, text) of each."""
    if "version" in spec:
        spec["version"] = {"value": spec["version"]}
    body = messages.GetModelStatusRequest(model_spec={"name": "m", **spec}).SerializeToString()
    answer = messages.GetModelStatusResponse.FromString(await answered(model, VERSIONS, body))
    return [
        (each.version, type(each).State.Name(each.state), each.status.error_code, each.status.error_message)
        for each in answer.model_version_status
    ]


def rows(answer: Any) -> Any:
    return [[(each.label, each.score) for each in row.classes] for row in answer.result.classifications]


def values(answer: Any) -> Any:
    return [each.value for each in answer.result.regressions]


# Classify and Regress


def test_examples_are_classified_and_regressed_by_the_signature_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, backend):
            answer = await infer(model, "classify", 1.5, -2.0, signature="classify")
            assert rows(answer) == [[("low", -15.0), ("high", 15.0)], [("low", 20.0), ("high", -20.0)]]
            spec = answer.model_spec
            assert (spec.name, spec.version.value, spec.signature_name) == ("m", 1, "classify")
            answer = await infer(model, "regress", 1.5, -2.0, signature="regress")
            assert values(answer) == [15.0, -20.0]
            assert answer.model_spec.signature_name == "regress"
            assert [call["signature"] for call in backend.models[0].calls] == ["classify", "regress"]

    asyncio.run(main())


def test_a_signature_of_tensorflow_2_will_do_if_its_outputs_do(tmp_path: Path) -> None:
    """As TensorFlow Serving has it, unless it is told --enable_signature_method_name_check."""

    async def main() -> None:
        async with served(tmp_path) as (model, _, _):
            assert rows(await infer(model, "classify", signature="scores_of_2")) == [[("low", -10), ("high", 10)]]
            assert values(await infer(model, "regress", signature="values_of_2")) == [10.0]
            assert values(await infer(model, "regress", signature="own_method")) == [10.0]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "signature", "said"),
    [
        ("classify", "regress", 'Expected classification signature outputs to contain at least one of "classes" or'),
        ("regress", "classify", "Expected one output Tensor, found 2."),
        ("regress", "scores_of_2", 'No regression outputs found in SignatureDef: expected "outputs".'),
        ("classify", "two_inputs", "Expected one input Tensor. The signature has inputs, x"),
        ("classify", "three_outputs", "Expected one or two output Tensors, found 3."),
        ("classify", "no_outputs", "Expected one or two output Tensors, found 0."),
        ("classify", "", "No classification inputs found in SignatureDef: its input is x; expected inputs"),
        ("regress", "x_for_examples", "No regression inputs found in SignatureDef: its input is x; expected inputs"),
        ("classify", "x", "No signature was found with the name: x;"),
        ("regress", "x" * 1000, f"No signature was found with the name: {'x' * 100};"),
    ],
)
def test_a_signature_without_what_the_method_needs_is_the_clients_fault(
    tmp_path: Path, method: str, signature: str, said: str
) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, backend):
            with pytest.raises(BadRequest) as caught:
                await infer(model, method, signature=signature)
            assert said in str(caught.value)
            assert not backend.models[0].calls

    asyncio.run(main())


def test_each_output_is_asked_for_once_and_is_one_of_the_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, backend):
            with pytest.raises(BadRequest, match=r"^duplicate output tensor alias: x$"):
                await predict(model, outputs=("x", "x"))
            assert not backend.models[0].calls
            words = r"^output tensor alias not found in signature: y Outputs expected to be in the set \{x\}\.$"
            with pytest.raises(BadRequest, match=words):
                await predict(model, outputs=("x", "y"))

    asyncio.run(main())


def test_predict_takes_signatures_for_any_method(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, _):
            protocol = PROTOCOLS["tfserving"]
            examples = np.array([b"\n\x0f\n\r\n\x01x\x12\x08\x12\x06\n\x04\x00\x00\x80?"], object)
            request = Request(payload={"inputs": examples}, form=Form.TENSORS, model="m", signature="regress")
            body = protocol.codec.encode_request(request)
            answer = messages.PredictResponse.FromString(await answered(model, protocol, body))
            assert list(answer.outputs["outputs"].float_val) == [10.0]
            assert answer.model_spec.signature_name == "regress"

    asyncio.run(main())


def test_an_unknown_signature_is_the_clients_fault_whoever_handles_the_model(tmp_path: Path) -> None:
    class Own(Handler):
        def preprocess(self, request: Request) -> Any:
            return request.payload

    words = 'Serving signature key "x" not found.'

    async def main() -> None:
        async with served(tmp_path / "1") as (model, _, _):
            assert list((await predict(model, signature="serving_default")).outputs["x"].float_val) == [10.0]
            with pytest.raises(FailedPrecondition, match=words) as caught:
                await predict(model, signature="x")
            assert 'The model has "classify", "no_outputs"' in str(caught.value)
        async with served(tmp_path / "2", handler=Own) as (model, _, _):
            with pytest.raises(FailedPrecondition, match=words):
                await predict(model, signature="x")
        (tmp_path / "3" / "m").mkdir(parents=True)
        (tmp_path / "3" / "m" / "processor.py").write_text("def postprocess(x, **kwargs):\n    return x\n")
        async with served(tmp_path / "3", handler=Processor) as (model, _, _):
            with pytest.raises(FailedPrecondition, match=words):
                await predict(model, signature="x")

    asyncio.run(main())


def test_a_handler_may_answer_classify_and_regress_itself(tmp_path: Path) -> None:
    class Own(Handler):
        def preprocess(self, request: Request) -> Any:
            assert request.form is Form.EXAMPLES
            assert isinstance(request.payload, np.ndarray)
            found = [messages.Example.FromString(body).features.feature["x"] for body in request.payload]
            return {"x": np.array([feature.float_list.value[0] for feature in found], np.float32)}

        def postprocess(self, outputs: Any, request: Request) -> Payload:
            if request.method is Method.REGRESS:
                return {"outputs": outputs["x"]}
            return {"classes": np.array([[f"{value:g}"] for value in outputs["x"]])}

    async def main() -> None:
        async with served(tmp_path, handler=Own) as (model, _, _):
            assert rows(await infer(model, "classify", 1, 2)) == [[("10", 0.0)], [("20", 0.0)]]
            assert values(await infer(model, "regress", 1, 2)) == [10.0, 20.0]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "outputs", "said"),
    [
        ("classify", {"y": np.ones((1, 2))}, "expected the outputs classes, scores or both; got y"),
        ("classify", {"scores": np.ones(2)}, r"of one shape, \[examples, classes\]; got \[2\]"),
        ("classify", {"scores": np.ones((3, 2))}, "expected an answer for each of the 2 examples; got 3"),
        ("classify", {"classes": np.ones((2, 2))}, "expected classes of strings; got float64"),
        ("regress", {"outputs": np.ones((2, 2))}, r"\[examples\] or \[examples, 1\]; got float64 \[2, 2\]"),
        ("regress", {"outputs": np.ones(1)}, "expected an answer for each of the 2 examples; got 1"),
        ("regress", {"scores": np.ones(2)}, "expected the output outputs; got scores"),
        ("regress", b"bytes", "expected the output outputs; got output"),
    ],
)
def test_what_the_method_cannot_hold_is_the_models_fault(tmp_path: Path, method: str, outputs: Any, said: str) -> None:
    class Odd(Handler):
        def preprocess(self, request: Request) -> Any:
            return {"x": np.zeros(2, np.float32)}

        def postprocess(self, _: Any, request: Request) -> Payload:
            return outputs  # type: ignore[no-any-return]

    async def main() -> None:
        async with served(tmp_path, handler=Odd) as (model, _, _):
            with pytest.raises(HandlerFailed, match=f"encoding the answer failed: TypeError: .*{said}"):
                await infer(model, method, 1, 2)

    asyncio.run(main())


def test_malformed_and_empty_requests_are_the_clients_fault(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, _):
            for protocol in (CLASSIFY_PROTOCOL, REGRESS_PROTOCOL):
                empty = messages.ClassificationRequest(model_spec={"name": "m"}).SerializeToString()
                for body, said in ((b"\xff", "malformed"), (empty, r"Input is empty\.")):
                    with pytest.raises(BadRequest, match=said):
                        await answered(model, protocol, body)

    asyncio.run(main())


# MultiInference


def tasks(*pairs: tuple[str, str], **spec: Any) -> bytes:
    body: bytes = messages.MultiInferenceRequest(
        tasks=[
            {"model_spec": {"name": "m", "signature_name": signature, **spec}, "method_name": method}
            for signature, method in pairs
        ],
        input={"example_list": {"examples": [{"features": {"feature": {"x": {"float_list": {"value": [2.0]}}}}}]}},
    ).SerializeToString()
    return body


async def infer_several(model: ServedModel, body: bytes, deadline: float | None = None) -> Any:
    answer = await answered(model, MULTI_INFERENCE, body, deadline=deadline)
    return messages.MultiInferenceResponse.FromString(answer).results


BOTH = (("regress", REGRESS), ("classify", CLASSIFY))


def test_several_signatures_are_answered_in_order_by_one_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, versions=(1, 2), toml="version_labels = {old = 1}") as (model, _, backend):
            for spec, version in (({}, 2), ({"version": {"value": 1}}, 1), ({"version_label": "old"}, 1)):
                first, second = await infer_several(model, tasks(*BOTH, **spec))
                assert [each.value for each in first.regression_result.regressions] == [version * 20.0]
                assert [
                    (each.label, each.score) for each in second.classification_result.classifications[0].classes
                ] == [
                    ("low", version * -20.0),
                    ("high", version * 20.0),
                ]
                for result, name in ((first, "regress"), (second, "classify")):
                    spec_ = result.model_spec
                    assert (spec_.name, spec_.version.value, spec_.signature_name) == ("m", version, name)
            assert sorted(len(loaded.calls) for loaded in backend.models) == [2, 4]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        (tasks(*BOTH, ("regress", REGRESS)), BadRequest, "Duplicate evaluation of signature: regress"),
        (
            tasks(("regress", REGRESS), ("", "tensorflow/serving/predict")),
            Unimplemented,
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
        (tasks(), BadRequest, "model_spec.name is missing or empty"),
        (tasks(("x", REGRESS)), BadRequest, "No signature was found with the name: x;"),
        (tasks(("classify", REGRESS)), BadRequest, "Expected one output Tensor, found 2."),
        (tasks(*BOTH, version={"value": 7}), ModelNotFound, "Servable not found for request: Specific(m, 7)"),
        (tasks(*BOTH, version_label="new"), BadRequest, "Unrecognized servable version label: new"),
        (
            messages.MultiInferenceRequest(tasks=[{"model_spec": {"name": "m"}}]).SerializeToString(),
            BadRequest,
            "Input is empty.",
        ),
        (b"\xff", BadRequest, "malformed"),
    ],
)
def test_several_signatures_of_which_one_cannot_be_evaluated(
    tmp_path: Path, body: bytes, error: Any, said: str
) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, _):
            with pytest.raises(error) as caught:
                await infer_several(model, body)
            assert said in str(caught.value)

    asyncio.run(main())


def test_several_signatures_fail_with_the_first_that_fails_and_keep_the_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, fail="out of luck") as (model, _, backend):
            with pytest.raises(HandlerFailed, match="out of luck"):
                await infer_several(model, tasks(*BOTH))
            assert len(backend.models[0].calls) == 1
            with pytest.raises(DeadlineExceeded):
                await infer_several(model, tasks(*BOTH), deadline=time.monotonic() - 1)
            assert len(backend.models[0].calls) == 1

    asyncio.run(main())


# GetModelMetadata


@pytest.fixture(scope="module")
def official() -> Any:
    """TensorFlow's own classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow
        from tensorflow_serving.apis import get_model_metadata_pb2
    return SimpleNamespace(tf=tensorflow, pb2=get_model_metadata_pb2)


async def ask_signatures(model: ServedModel, fields: list[str], **spec: Any) -> bytes:
    request = messages.GetModelMetadataRequest(model_spec={"name": "m", **spec}, metadata_field=fields)
    return await answered(model, SIGNATURES, request.SerializeToString())


def test_tensorflow_reads_the_signatures_of_any_model(tmp_path: Path, official: Any) -> None:
    async def main() -> list[bytes]:
        async with served(tmp_path, versions=(1, 2), toml="version_labels = {old = 1}") as (model, _, _):
            specs: Any = ({}, {"version": {"value": 1}}, {"version_label": "old"})
            return [await ask_signatures(model, ["signature_def"], **spec) for spec in specs]

    answers = [official.pb2.GetModelMetadataResponse.FromString(body) for body in asyncio.run(main())]
    assert [(answer.model_spec.name, answer.model_spec.version.value) for answer in answers] == [
        ("m", 2),
        ("m", 1),
        ("m", 1),
    ]
    found = official.pb2.SignatureDefMap()
    assert answers[0].metadata["signature_def"].Unpack(found)
    signatures = found.signature_def
    assert {name: signature.method_name for name, signature in signatures.items()} == {
        "serving_default": "tensorflow/serving/predict",
        "classify": "tensorflow/serving/classify",
        "regress": "tensorflow/serving/regress",
        "scores_of_2": "tensorflow/serving/predict",
        "values_of_2": "tensorflow/serving/predict",
        "own_method": "somebody/elses/method",
        "two_inputs": "tensorflow/serving/predict",
        "three_outputs": "tensorflow/serving/predict",
        "no_outputs": "tensorflow/serving/predict",
        "x_for_examples": "tensorflow/serving/predict",
    }
    tf = official.tf
    inputs, scores = signatures["classify"].inputs["inputs"], signatures["classify"].outputs["scores"]
    assert (inputs.name, tf.as_dtype(inputs.dtype)) == ("tf_example:0", tf.string)
    assert tf.TensorShape(inputs.tensor_shape).as_list() == [None]
    assert (scores.name, tf.as_dtype(scores.dtype)) == ("scores", tf.float32)
    assert tf.TensorShape(scores.tensor_shape).as_list() == [None, 2]
    assert tf.TensorShape(signatures["serving_default"].inputs["x"].tensor_shape).rank is None


def test_a_model_that_does_not_say_what_it_takes_has_an_empty_signature(tmp_path: Path, official: Any) -> None:
    FakeBackend.write(tmp_path / "m" / "1")

    async def main() -> bytes:
        repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={})
        await repository.start()
        try:
            return await ask_signatures(repository.models["m"], ["signature_def"])
        finally:
            await repository.close()

    found = official.pb2.SignatureDefMap()
    answer = official.pb2.GetModelMetadataResponse.FromString(asyncio.run(main()))
    assert answer.metadata["signature_def"].Unpack(found)
    (signature,) = found.signature_def.values()
    assert (len(signature.inputs), len(signature.outputs)) == (0, 0)
    assert signature.method_name == "tensorflow/serving/predict"


@pytest.mark.parametrize(
    ("fields", "spec", "error", "said"),
    [
        ([], {}, BadRequest, "GetModelMetadataRequest must specify at least one metadata_field"),
        (["weights"], {}, BadRequest, "Metadata field weights is not supported"),
        (["signature_def"], {"version": {"value": 9}}, ModelNotFound, "not found for request: Specific(m, 9)"),
        (["signature_def"], {"version_label": "new"}, BadRequest, "Unrecognized servable version label: new"),
    ],
)
def test_signatures_that_cannot_be_told(tmp_path: Path, fields: Any, spec: Any, error: Any, said: str) -> None:
    async def main() -> None:
        async with served(tmp_path) as (model, _, _):
            with pytest.raises(error) as caught:
                await ask_signatures(model, fields, **spec)
            assert said in str(caught.value)

    asyncio.run(main())


# GetModelStatus


def test_the_state_of_each_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, versions=(1, 2), toml="version_labels = {old = 1, gone = 9}") as (model, repo, _):
            FakeBackend.write(tmp_path / "m" / "3", fail_load="the weights are missing")
            await look_twice(repo)
            three, two, one = await ask(model)
            assert three[:3] == (3, "END", 2)
            assert "the weights are missing" in three[3]
            assert (two, one) == ((2, "AVAILABLE", 0, ""), (1, "AVAILABLE", 0, ""))
            assert await ask(model, version=3) == [three]
            assert await ask(model, version=1) == [one]
            for version in (7, -1):
                with pytest.raises(ModelNotFound, match=f"^Could not find version {version} of model m$"):
                    await ask(model, version=version)
            for label in ("old", "gone", "none"):  # as TensorFlow Serving, which reads no label here
                assert await ask(model, version_label=label) == [three, two, one]

    asyncio.run(main())


def test_versions_that_load_and_unload(tmp_path: Path) -> None:
    go, asked = threading.Event(), threading.Event()

    class Late(FakeBackend):
        def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
            asked.set()
            assert go.wait(10)
            return super().load(directory, options, device)

    closing = threading.Event()

    class SlowToClose(Handler):
        def run_model(self, model: Any, inputs: Any, request: Request) -> Any:
            asked.set()
            assert closing.wait(10)
            return super().run_model(model, inputs, request)

    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text('handler = "it"\nkeep_versions = 1')

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": Late()}, handlers={"it": SlowToClose}, poll_interval_s=3600)
        starting = asyncio.create_task(repository.start())
        await asyncio.to_thread(asked.wait, 10)
        model = repository.models["m"]
        assert await ask(model) == [(1, "LOADING", 0, "")]
        with pytest.raises(ModelNotReady, match="version 1 is loading"):
            await infer(model, "regress")
        go.set()
        await starting
        assert await ask(model) == [(1, "AVAILABLE", 0, "")]
        asked.clear()
        held = asyncio.create_task(predict(model))
        await asyncio.to_thread(asked.wait, 10)
        FakeBackend.write(tmp_path / "m" / "2")
        await repository.look()
        await repository.look()
        async with asyncio.timeout(10):
            while (2, "AVAILABLE", 0, "") not in await ask(model):  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)
        assert await ask(model) == [(2, "AVAILABLE", 0, ""), (1, "UNLOADING", 0, "")]
        closing.set()
        assert (await held).model_spec.version.value == 1
        await repository.settle()
        assert await ask(model) == [(2, "AVAILABLE", 0, "")]
        await repository.close()
        with pytest.raises(ModelNotFound, match=r"^Could not find any versions of model m$"):
            await ask(model)

    asyncio.run(main())


# Version labels


def test_a_label_stands_for_a_version_by_every_method(tmp_path: Path) -> None:
    toml = "version_labels = {stable = 1, canary = 2}"

    async def main() -> None:
        async with served(tmp_path, versions=(1, 2), toml=toml) as (model, _, _):
            for label, version in (("stable", 1), ("canary", 2)):
                answer = await predict(model, label=label)
                assert (answer.model_spec.version.value, list(answer.outputs["x"].float_val)) == (
                    version,
                    [10 * version],
                )
                answer = await infer(model, "regress", 1.0, label=label, signature="regress")
                assert (answer.model_spec.version.value, values(answer)) == (version, [10.0 * version])
                answer = await infer(model, "classify", 1.0, label=label, signature="classify")
                assert answer.model_spec.version.value == version
            assert (await predict(model)).model_spec.version.value == 2

    asyncio.run(main())


def test_labels_that_lead_nowhere(tmp_path: Path) -> None:
    toml = "version_labels = {stable = 1, next = 3, broken = 2}"

    async def main() -> None:
        async with served(tmp_path, versions=(1,), toml=toml) as (model, repo, _):
            FakeBackend.write(tmp_path / "m" / "2", fail_load="no")
            await look_twice(repo)
            with pytest.raises(BadRequest, match=r"^Unrecognized servable version label: old; ") as caught:
                await predict(model, label="old")
            assert 'model "m" has the labels "broken", "next", "stable"' in str(caught.value)
            with pytest.raises(BadRequest, match=f"^Unrecognized servable version label: {'x' * 100};"):
                await predict(model, label="x" * 5000)
            with pytest.raises(ModelNotFound, match=r"^Servable not found for request: Specific\(m, 3\)"):
                await predict(model, label="next")
            with pytest.raises(ModelNotReady, match=r"version 2 .* is failed"):
                await predict(model, label="broken")
        async with served(tmp_path) as (model, _, _):
            with pytest.raises(BadRequest, match='model "m" has the labels none'):
                await predict(model, label="stable")

    asyncio.run(main())


def test_labels_move_without_a_load(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, versions=(1, 2), toml="version_labels = {stable = 1}") as (model, repo, backend):
            assert (await predict(model, label="stable")).model_spec.version.value == 1
            toml = tmp_path / "m" / "model.toml"
            toml.write_text('handler = "it"\nversion_labels = {stable = 2, old = 1}')
            await look_twice(repo)
            assert (await predict(model, label="stable")).model_spec.version.value == 2
            assert (await predict(model, label="old")).model_spec.version.value == 1
            assert [loaded.closed for loaded in backend.models] == [False, False]

    asyncio.run(main())
