"""SavedModels through the backend: signatures, values, threads, refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from dl_inference_tf_backend.backend import TensorFlowBackend

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, FailedPrecondition, ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import Loader
from dl_inference_core.tensors import Form, Method, Request
from dl_inference_core.testing import BackendConformance

OPTIONS = TensorFlowBackend.Options()


def load(folder: Path, device: str = "cpu", **options: Any) -> Model:
    return TensorFlowBackend(OPTIONS).load(folder, TensorFlowBackend.ModelOptions(**options), device)


class TestConformance(BackendConformance):
    backend_class = TensorFlowBackend
    framework = "tensorflow"
    inputs: ClassVar[Any] = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    outputs: ClassVar[Any] = {"y": np.arange(6, dtype=np.float32).reshape(2, 3) * 2}

    @pytest.fixture
    def directory(self, saved: Any, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(saved("double"), folder)
        return folder


class TestConformanceOfTensorFlow1(BackendConformance):
    backend_class = TensorFlowBackend
    framework = "tensorflow"
    options: ClassVar[Any] = {"intra_op_threads": 1, "inter_op_threads": 2}
    inputs: ClassVar[Any] = {"x": np.array([[1.0], [4.0]], np.float32)}
    outputs: ClassVar[Any] = {"y": np.array([[2.5], [4.0]], np.float32)}

    @pytest.fixture
    def directory(self, saved: Any, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(saved("half_plus_two"), folder)
        return folder


def test_a_keras_export_answers_as_the_network_does(make_saved: Any, tmp_path: Path) -> None:
    folder, network = make_saved.keras(tmp_path / "keras")
    model = load(folder)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    (output,) = model({"features": x}).values()
    np.testing.assert_allclose(output, network(x).numpy(), rtol=1e-5, atol=1e-6)
    assert [str(spec) for spec in model.signature.inputs] == ['"features" (float32, [?, 4])']
    assert model.signature.inputs[0].native_name.startswith("serving_default_features")
    assert model.platform == "tensorflow_savedmodel"
    model.close()


def test_signatures_of_tensorflow_1_keep_their_methods(saved: Any) -> None:
    model = load(saved("half_plus_two"))
    assert {name: signature.method.rpartition("/")[2] for name, signature in model.signatures.items()} == {
        "serving_default": "predict",
        "regress": "regress",
        "classify": "classify",
        "scores_only": "classify",
        "classes_only": "classify",
    }
    model.close()


def test_the_clients_of_tensorflow_2_see_no_signatures_of_its_own(saved: Any) -> None:
    model = load(saved("double"))
    assert list(model.signatures) == ["serving_default"]
    model.close()


def test_strings_and_assets(saved: Any) -> None:
    model = load(saved("text"))
    words = np.array([b"dog", "Löwe".encode(), b"", b"cat\0"], object)
    outputs = model({"words": words})
    assert outputs["capitals"].dtype == object
    assert outputs["capitals"].tolist() == [b"DOG", "LöWE".encode(), b"", b"CAT\0"]
    np.testing.assert_array_equal(outputs["lengths"], np.array([3, 5, 0, 4], np.int32))
    np.testing.assert_array_equal(outputs["number"], np.array([1, 2, 2, 2], np.int64))
    model.close()


def test_a_stateful_model_keeps_its_state_to_itself(saved: Any) -> None:
    one, other = load(saved("counter")), load(saved("counter"))
    sums = [int(one({"by": np.array(step, np.int64)})["sum"]) for step in (1, 2, 3)]
    assert sums == [1, 3, 6]
    scalar = other({"by": np.array(5, np.int64)})["sum"]
    assert (scalar.shape, scalar.dtype, int(scalar)) == ((), np.int64, 5)
    one.close()
    other.close()


def test_several_signatures_and_no_default(saved: Any) -> None:
    model = load(saved("several"))
    a, b = np.array([1, 2], np.float32), np.array([3, 5], np.float32)
    outputs = model({"a": a, "b": b}, "add")
    np.testing.assert_array_equal(outputs["sum"], a + b)
    np.testing.assert_array_equal(outputs["difference"], a - b)
    v = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    np.testing.assert_allclose(model({"v": v}, "norm")["norm"], np.linalg.norm(v))
    assert model.signatures["norm"].inputs[0].shape is None
    handler = Handler(Handler.Options())
    handler.prepare(model, Path())
    with pytest.raises(FailedPrecondition, match='Serving signature key "serving_default" not found') as e:
        handler.preprocess(Request(payload={"a": a, "b": b}, form=Form.TENSORS))
    assert '"add", "norm"' in str(e.value)
    model.close()


def test_a_signature_without_what_the_method_needs_is_refused(saved: Any) -> None:
    handler = Handler(Handler.Options())
    model = load(saved("half_plus_two"))
    handler.prepare(model, Path())
    examples = np.array([b""], object)
    for signature, method, words in (
        ("regress", Method.CLASSIFY, "Expected classification signature outputs to contain at least one of"),
        ("", Method.REGRESS, "No regression inputs found in SignatureDef"),
    ):
        request = Request(payload=examples, form=Form.EXAMPLES, method=method, signature=signature)
        with pytest.raises(BadRequest, match=words):
            handler.preprocess(request)
    model.close()


DTYPES = [
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "string",
]  # fmt: skip


def test_every_dtype_passes_unchanged(make_saved: Any, tmp_path: Path) -> None:
    import ml_dtypes

    model = load(make_saved.dtypes(tmp_path / "model", DTYPES))
    given: dict[str, Any] = {}
    for name in DTYPES:
        if name == "string":
            given[name] = np.array([[b"a", b"\xff\0"], [b"", b"b"]], object)
        else:
            dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
            given[name] = np.array([[0, 1], [1, 2]]).astype(dtype)
    outputs = model(model.signature.bind(given))
    for name, value in given.items():
        assert outputs[name].dtype == value.dtype, name
        np.testing.assert_array_equal(outputs[name], value)
    model.close()


def test_what_tensorflow_calls_an_invalid_argument_is_the_clients_fault(saved: Any) -> None:
    model = load(saved("picky"))
    with pytest.raises(BadRequest, match="x is negative"):
        model({"x": np.array([-1], np.float32)})
    np.testing.assert_array_equal(model({"x": np.array([4], np.float32)})["root"], [2])
    model.close()
    examples = load(saved("half_plus_two"))
    with pytest.raises(BadRequest, match="Could not parse example input"):
        examples({"inputs": np.array([b"no example"], object)}, "regress")
    examples.close()


def test_a_handler_that_calls_the_model_wrongly_is_not_the_clients_fault(saved: Any) -> None:
    model = load(saved("double"))
    with pytest.raises(TypeError, match=r'dtype float64 for its input "x" \(float32'):
        model({"x": np.ones((1, 3))})
    model.close()


def test_a_signature_that_cannot_be_run_costs_no_other(make_saved: Any, tmp_path: Path) -> None:
    model = load(make_saved.odd(tmp_path / "model"))
    assert set(model.signatures) == {"serving_default", "constant"}
    assert model.unserved == {"passed": "x:0 is both fed and fetched."}
    np.testing.assert_array_equal(model({"x": np.float32([1])})["y"], [2])
    handler = Handler(Handler.Options())
    handler.prepare(model, Path())
    asked = Request(payload={"junk": np.float32([1])}, form=Form.TENSORS, signature="constant")
    with pytest.raises(BadRequest, match='input size does not match signature: expected no inputs; got "junk"'):
        handler.preprocess(asked)
    assert model({}, "constant")["seven"] == 7
    model.close()


def test_the_native_function_takes_and_gives_tensorflows_tensors(saved: Any) -> None:
    import tensorflow as tf

    model = load(saved("double"))
    x = np.ones((1, 3), np.float32)
    for outputs in (model.native(x), model.native(tf.constant(x)), model.native(x=x)):
        assert isinstance(outputs["y"], tf.Tensor)
        np.testing.assert_array_equal(outputs["y"].numpy(), 2 * x)
    with pytest.raises(TypeError, match="by name"):
        model.native(x, x)
    assert isinstance(model.native.session, tf.compat.v1.Session)
    model.close()


PROCESSOR = """
def preprocess(x, **kwargs):
    return x.astype("float32")


def run_model(model, x, **kwargs):
    return model(model(x)["y"])["y"]


def postprocess(x, **kwargs):
    return {"four times": x}
"""


@pytest.mark.parametrize("source", [PROCESSOR, "def postprocess(x, **kwargs):\n    return x\n"])
def test_the_originals_processor_runs_on_a_saved_model(saved: Any, tmp_path: Path, source: str) -> None:
    folder = tmp_path / "1"
    shutil.copytree(saved("double"), folder)
    (folder / "processor.py").write_text(source)
    loaded = Loader(backends={"tensorflow": TensorFlowBackend(OPTIONS)}, handlers={}).load(
        NamedModel(path=tmp_path), folder
    )
    request = Request(payload=np.ones((1, 3)), form=Form.TENSOR)
    (instance,) = loaded.instances
    inputs = instance.handler.preprocess(request)
    outputs = instance.handler.postprocess(instance.handler.run_model(instance.model, inputs, request), request)
    ((name, value),) = outputs.items()
    assert name == ("four times" if source is PROCESSOR else "y")
    np.testing.assert_array_equal(value, np.full((1, 3), 4 if source is PROCESSOR else 2, np.float32))
    loaded.model.close()


def test_a_broken_model_says_what_is_wrong(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load(saved("broken"))
    assert str(saved("broken")) in str(error.value)
    with pytest.raises(ModelError, match="no graph with the tags serve, gpu"):
        load(saved("double"), tags=("serve", "gpu"))


@pytest.mark.parametrize(
    ("device", "words"),
    [("tpu", "there is no device"), ("gpu:x", "there is no device"), ("gpu:9", "not available; this machine has cpu")],
)
def test_a_device_that_is_not_there(saved: Any, device: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load(saved("double"), device)


def test_of_damaged_variables_it_says_what_is_wrong_with_them(make_saved: Any, tmp_path: Path) -> None:
    folder = make_saved.double(tmp_path / "model")
    for file in (folder / "variables").iterdir():
        file.write_bytes(b"\x00no variables")
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "Graph execution error" not in str(error.value)
    assert "sstable" in str(error.value)


@pytest.mark.parametrize("file", ["saved_model.pb", "variables/variables.index"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, which stands for"),
        (b"<html><body>Not found</body></html>", "a web page (HTML)"),
    ],
    ids=["pointer", "page"],
)
def test_a_file_that_is_not_a_saved_models_is_called_what_it_is(
    make_saved: Any, tmp_path: Path, file: str, content: bytes, words: str
) -> None:
    folder = make_saved.double(tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match="holds no SavedModel") as error:
        load(folder)
    assert f"{file} is {words}" in str(error.value)


def test_auto_is_a_device(saved: Any) -> None:
    model = load(saved("double"), "auto")
    np.testing.assert_array_equal(model({"x": np.ones((1, 3), np.float32)})["y"], np.full((1, 3), 2, np.float32))
    model.close()


def test_a_library_that_is_not_there_is_named(saved: Any, tmp_path: Path) -> None:
    backend = TensorFlowBackend(TensorFlowBackend.Options(custom_op_libraries=(tmp_path / "none.so",)))
    with pytest.raises(ModelError, match=r"none\.so cannot be loaded"):
        backend.load(saved("double"), backend.ModelOptions(), "cpu")


OP = """
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

REGISTER_OP("DlInferenceTriple").Input("x: float").Output("y: float").SetShapeFn(
    [](tensorflow::shape_inference::InferenceContext* context) {
      context->set_output(0, context->input(0));
      return absl::OkStatus();
    });

class Triple : public tensorflow::OpKernel {
 public:
  using tensorflow::OpKernel::OpKernel;
  void Compute(tensorflow::OpKernelContext* context) override {
    const auto& x = context->input(0);
    tensorflow::Tensor* y = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    auto from = x.flat<float>();
    auto to = y->flat<float>();
    for (int i = 0; i < from.size(); ++i) to(i) = 3 * from(i);
  }
};

REGISTER_KERNEL_BUILDER(Name("DlInferenceTriple").Device(tensorflow::DEVICE_CPU), Triple);
"""
SAVE = """
import sys
import tensorflow as tf

library, folder = sys.argv[1:]
triple = tf.load_op_library(library).dl_inference_triple
module = tf.Module()
module.f = tf.function(lambda x: {"y": triple(x=x)}, input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
tf.saved_model.save(module, folder, signatures=module.f)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_operation_of_ones_own_is_a_line_in_the_config(tmp_path: Path) -> None:
    import tensorflow as tf

    (tmp_path / "triple.cc").write_text(OP)
    library = tmp_path / "triple.so"
    flags = [*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
    command = ["g++", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(tmp_path / "triple.cc"), *flags]
    subprocess.run(command, check=True, timeout=300)
    folder = tmp_path / "model"
    subprocess.run([sys.executable, "-c", SAVE, str(library), str(folder)], check=True, timeout=120)
    with pytest.raises(ModelError, match="DlInferenceTriple"):
        load(folder)
    backend = TensorFlowBackend(TensorFlowBackend.Options(custom_op_libraries=(library,)))
    model = backend.load(folder, backend.ModelOptions(), "cpu")
    np.testing.assert_array_equal(model({"x": np.array([1, 2], np.float32)})["y"], np.array([3, 6], np.float32))
    model.close()


def test_loading_and_answering_many_times_at_once(saved: Any) -> None:
    folder = saved("double")
    x = np.ones((1, 3), np.float32)

    def use(_: int) -> None:
        model = load(folder)
        np.testing.assert_array_equal(model({"x": x})["y"], 2 * x)
        model.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(12)))
