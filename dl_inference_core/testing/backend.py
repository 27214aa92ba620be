"""The suite for backends."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Backend, Model, Signature
from dl_inference_core.tensors import Tensors, as_json
from dl_inference_core.testing.plugin import PluginConformance, assert_equal


class BackendConformance(PluginConformance):
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
            assert_equal(outputs[name], expected, self.tolerance)

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
            timeout=180,
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
            required = {spec.name for spec in model.signature.inputs if not spec.optional}
            assert required <= self.inputs.keys() <= {spec.name for spec in model.signature.inputs}
        for spec in model.signature.outputs:
            assert spec.name in self.outputs
            expected = self.outputs[spec.name]
            assert spec.dtype is None or spec.dtype == expected.dtype
            if spec.shape is not None:
                assert len(spec.shape) == expected.ndim
                for size, given in zip(spec.shape, expected.shape, strict=True):
                    assert size is None or size == given

    def test_refuses_an_input_that_it_does_not_have(self, model: Model, thread: ThreadPoolExecutor) -> None:
        if not model.signature.inputs:
            pytest.skip("the model does not name its inputs")

        def call() -> None:
            more = {**self.inputs, "no such input": next(iter(self.inputs.values()))}
            with model.session(), pytest.raises(BadRequest, match="no such input"):
                model(more)

        thread.submit(call).result()

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
