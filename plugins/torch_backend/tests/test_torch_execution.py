"""Other ways to run a model: they answer as the model did when it was loaded, or it is not served."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from dl_inference_torch_backend import compiling, devices, execution
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.devices import Accelerator
from dl_inference_torch_backend.testing import load
from torch.export import Dim

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
HELPER = "def doubled(x):\n    return 2 * x\n"
SOURCE = """
import torch
from helper import doubled

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def forward(self, x):
        return {"y": doubled(self.layers(x)).reshape(x.shape[0], 2), "z": [x.sum(1), None]}

create_model = Net
"""
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def call(model: Model, **inputs: Any) -> dict[str, Any]:
    with model.session():
        return model(model.signature.bind(inputs))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": 2 * self.layers(x).reshape(x.shape[0], 2), "z": x.sum(1)}


def export(directory: Path, module: torch.nn.Module, *args: Any, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.export.save(torch.export.export(module, args, **options), directory / "model.pt2")
    return directory


def write_eager(directory: Path) -> Path:
    (directory / "helper.py").write_text(HELPER)
    (directory / "model.py").write_text(SOURCE)
    torch.save(Net().state_dict(), directory / "weights.pth")
    np.savez(directory / "sample.npz", x=X)
    return directory


def write_exported(directory: Path) -> Path:
    return export(directory, Net().eval(), torch.ones(4, 3), dynamic_shapes={"x": {0: Dim("batch", max=64)}})


def write_scripted(directory: Path) -> Path:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(Net().eval()), directory / "model.pt")  # type: ignore[no-untyped-call]
    np.savez(directory / "sample.npz", x=X)
    return directory


WRITERS = {"module": write_eager, "exported": write_exported, "TorchScript": write_scripted}
every_kind = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
OPTIONS: dict[str, dict[str, Any]] = {
    "frozen": {"execution": "frozen"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "frozen bfloat16": {"execution": "frozen", "dtype": "bfloat16"},
    "channels last": {"channels_last": True},
    "frozen channels last": {"execution": "frozen", "channels_last": True},
    "CUDA graphs where there is no CUDA": {"cuda_graphs": [1, 8]},
}


# Answers


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_as_loaded_for_any_number_of_rows(tmp_path, write, options):
    directory = write(tmp_path)
    plain, model = load(directory), load(directory, **options)
    tolerance = 0.05 if "dtype" in options else 1e-6
    for rows in (1, 3, 20):
        x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        expected, outputs = call(plain, x=x), call(model, x=x)
        assert outputs.keys() == expected.keys()
        for name, values in expected.items():
            assert outputs[name].dtype == np.float32
            np.testing.assert_allclose(outputs[name], values, tolerance, tolerance)
    assert model.signature == plain.signature


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_of_the_dtype(tmp_path, dtype):
    seen: list[Any] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x, i):
            seen.append((x.dtype, i.dtype, self.linear.weight.dtype))
            return self.linear(x) + i

    model = changed(Spy(), {"x": X, "i": np.ones((4, 1), np.int64)}, tmp_path, dtype=dtype)
    seen.clear()
    assert call(model, x=X, i=np.ones((4, 1), np.int64))["output"].dtype == np.float32
    assert seen == [(getattr(torch, dtype), torch.int64, getattr(torch, dtype))]


def test_images_lie_with_their_channels_last(tmp_path):
    seen: list[bool] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3)

        def forward(self, x):
            last = torch.channels_last
            seen.append(x.is_contiguous(memory_format=last) and self.conv.weight.is_contiguous(memory_format=last))
            return self.conv(x)

    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    module = Spy()
    expected = module(torch.from_numpy(images)).detach().numpy()
    model = changed(module, {"x": images}, tmp_path, channels_last=True)
    seen.clear()
    np.testing.assert_allclose(call(model, x=images)["output"], expected, 1e-4, 1e-5)
    assert seen == [True]


def changed(module: torch.nn.Module, sample: dict[str, Any], directory: Path, **options: Any) -> Model:
    """`module` as it runs with `options`."""
    from dl_inference_torch_backend.forwards import EagerModel

    np.savez(directory / "sample.npz", **sample)
    model = EagerModel(module, devices.device_for(torch.device("cpu")))
    execution.prepare(model, TorchBackend.ModelOptions(**options), directory)
    return model


class Optionals(torch.nn.Module):
    def forward(self, x, mask=None, *, shift=None):
        if mask is not None:
            x = x * mask
        return x if shift is None else x + shift


@pytest.mark.parametrize("options", [{"execution": "frozen"}, {"dtype": "float32"}, {"channels_last": True}])
@pytest.mark.parametrize("names", [("x",), ("x", "mask"), ("x", "shift"), ("x", "mask", "shift")])
def test_a_changed_model_takes_the_inputs_of_its_sample(tmp_path, options, names):
    sample = {name: X + place for place, name in enumerate(names)}
    model = changed(Optionals(), dict(reversed(sample.items())), tmp_path, **options)
    assert [(spec.name, spec.optional) for spec in model.signature.inputs] == [(name, False) for name in names]
    expected = Optionals()(**{name: torch.from_numpy(array) for name, array in sample.items()})
    np.testing.assert_allclose(call(model, **sample)["output"], expected, rtol=1e-6)
    for wrong in ({**sample, "other": X}, dict(list(sample.items())[1:])):
        with model.session(), pytest.raises(BadRequest, match=r'it takes "x"'):
            model(wrong)


def test_samples_of_different_inputs_are_a_model_error(tmp_path):
    np.savez(tmp_path / "warm_up.npz", x=X, mask=X)
    with pytest.raises(ModelError, match="have different inputs; expected the same in all of them"):
        changed(Optionals(), {"x": X}, tmp_path, execution="frozen")


class Keyword(torch.nn.Module):
    def forward(self, x, *, shift, unused=3):
        return x + shift


class Anything(torch.nn.Module):
    def forward(self, *tensors):
        return tensors[0] + 1


class Pair(NamedTuple):
    one: Any
    two: Any


class Named(torch.nn.Module):
    def forward(self, x):
        return Pair(x, (x + 1, {"three": x + 2}))


def test_inputs_and_outputs_keep_their_names(tmp_path):
    shift = np.full((4, 1), 2, np.float32)
    model = changed(Keyword(), {"shift": shift, "x": X}, tmp_path, execution="frozen")
    np.testing.assert_array_equal(call(model, x=X, shift=shift)["output"], X + 2)
    model = changed(Anything(), {"whatever": X}, tmp_path, execution="frozen")
    np.testing.assert_array_equal(call(model, other=X)["output"], X + 1)
    model = changed(Named(), {"x": X}, tmp_path, execution="frozen")
    outputs = call(model, x=X)
    assert list(outputs) == ["one", "two_0", "two_1_three"]
    np.testing.assert_array_equal(outputs["two_1_three"], X + 2)


class Constant(torch.nn.Module):
    def forward(self, x, n):
        return {"y": x * n, "n": n, "none": None}


@pytest.mark.parametrize("options", [{"execution": "frozen"}, {"dtype": "float32"}])
def test_constants_of_an_exported_program_stay_outputs(tmp_path, options):
    export(tmp_path, Constant(), torch.ones(4, 3), 3, dynamic_shapes={"x": {0: Dim("batch")}, "n": None})
    outputs = call(load(tmp_path, **options), x=X)
    assert outputs.keys() == {"y", "n"}
    assert outputs["n"] == 3
    np.testing.assert_array_equal(outputs["y"], X * 3)


def test_a_frozen_program_still_refuses_sizes_that_it_was_not_exported_for(tmp_path):
    model = load(write_exported(tmp_path), execution="frozen")
    for _ in range(2):
        assert call(model, x=np.zeros((64, 3), np.float32))["y"].shape == (64, 2)
        with pytest.raises(BadRequest, match=r'x\.size\(\)\[0\] <= 64; got the shapes "x" \[65, 3\]'):
            call(model, x=np.zeros((65, 3), np.float32))


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 3)

    def forward(self, ids, weights):
        return (self.table(ids) * weights[:, :, None]).sum(1)


def test_samples_are_made_from_the_signature_where_it_says_enough(tmp_path):
    shapes = {"ids": {0: (batch := Dim("batch")), 1: (length := Dim("length"))}, "weights": {0: batch, 1: length}}
    ids = torch.ones(4, 6, dtype=torch.int64)
    export(tmp_path, Embedded().eval(), ids, torch.ones(4, 6), dynamic_shapes=shapes)
    model = load(tmp_path, execution="frozen", dtype="bfloat16")
    inputs = {"ids": np.array([[4, 0]]), "weights": np.ones((1, 2), np.float32)}
    np.testing.assert_allclose(call(model, **inputs)["output"], call(load(tmp_path), **inputs)["output"], 0.05, 0.05)


# What is not served


class ByRows(torch.nn.Module):
    def forward(self, x):
        return x + 10 if x.shape[0] == 1 else x


class ByFailing(torch.nn.Module):
    def forward(self, x):
        return x.reshape(int(x.shape[0]), 3)


def test_answers_beyond_the_tolerance_are_a_model_error_with_the_difference(tmp_path):
    words = (
        r'with execution = "frozen" the model answers otherwise than as it was loaded: output "output" of 1 rows is -1 '
        r"and was 9 at \[0, 0\], a difference of 10; the tolerance, relative and absolute, is 0.0001"
    )
    with pytest.raises(ModelError, match=words):
        changed(ByRows(), {"x": X}, tmp_path, execution="frozen")
    call(changed(ByRows(), {"x": X}, tmp_path, execution="frozen", tolerance=10), x=X)


def test_the_tolerance_is_the_operators(tmp_path):
    directory = write_exported(tmp_path)
    load(directory, dtype="bfloat16")
    with pytest.raises(ModelError, match=r'with dtype = "bfloat16" the model answers otherwise.* is 1e-07'):
        load(directory, dtype="bfloat16", tolerance=1e-7)
    load(directory, execution="frozen", tolerance=1e-6)


def test_a_module_that_cannot_be_changed_is_a_model_error(tmp_path):
    class Fails(torch.nn.Module):
        def forward(self, x):
            if x.dtype != torch.float32 or torch.jit.is_tracing():
                raise RuntimeError("not so")
            return x

    for options, words in (
        ({"execution": "frozen"}, 'cannot be run with execution = "frozen"'),
        ({"dtype": "float16"}, 'with dtype = "float16" the model fails on 4 rows, which it takes as it was loaded'),
    ):
        with pytest.raises(ModelError, match=words) as error:
            changed(Fails(), {"x": X}, tmp_path, **options)
        assert "not so" in str(error.value.__cause__)


def test_a_number_that_a_module_computes_is_no_output_of_a_graph(tmp_path):
    class Counts(torch.nn.Module):
        def forward(self, x):
            return {"y": x, "count": x.shape[0]}

    with pytest.raises(ModelError, match='gives tensors only, but output "count" is a number'):
        changed(Counts(), {"x": X}, tmp_path, execution="frozen")


@pytest.mark.parametrize("options", [{"execution": "frozen"}, {"dtype": "float16"}, {"cuda_graphs": [1]}])
def test_without_samples_nothing_is_changed(tmp_path, options):
    directory = write_eager(tmp_path)
    (directory / "sample.npz").unlink()
    with pytest.raises(ModelError, match=r"expected a sample\.npz in .*, as numpy\.savez writes it, with an array for"):
        load(directory, **options)
    load(directory, execution="eager")


def test_a_sample_that_the_model_does_not_take_is_a_model_error(tmp_path):
    directory = write_eager(tmp_path)
    for sample in ({"y": X}, {"x": X[:, :2]}):
        np.savez(directory / "sample.npz", **sample)
        with pytest.raises(ModelError, match="as it was loaded fails on samples"):
            load(directory, execution="frozen")


def test_cuda_graphs_of_sizes_that_the_model_does_not_take_are_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="fails on samples, or has no batches of the sizes in cuda_graphs"):
        load(write_exported(tmp_path), cuda_graphs=[65])
    export(tmp_path, Net(), torch.ones(4, 3))
    with pytest.raises(ModelError, match="has no batches of the sizes in cuda_graphs"):
        load(tmp_path, cuda_graphs=[8])
    load(tmp_path, cuda_graphs=[4])


@pytest.mark.parametrize("way", ["compile", "aoti"])
def test_torchscript_is_not_compiled(tmp_path, way):
    with pytest.raises(ModelError, match=f'TorchScript cannot be run with execution = "{way}"; expected "eager"'):
        load(write_scripted(tmp_path), execution=way)


@pytest.mark.parametrize("way", ["compile", "aoti"])
def test_a_missing_compiler_is_a_model_error_that_says_so(tmp_path, way):
    directory = write_exported(tmp_path)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(ModelError, match=f'"{way}" needs a C.. compiler and there is none: install g.., or name one in'),
    ):
        load(directory, execution=way)


def test_recorded_graphs_and_compiled_packages_exclude_each_other(tmp_path):
    with pytest.raises(ModelError, match="exclude each other"):
        load(write_exported(tmp_path), execution="aoti", cuda_graphs=[1])


@pytest.mark.parametrize(
    ("given", "expected", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([np.nan, np.inf], [np.nan, np.inf], None),
        ([1.0, 2.2], [1.0, 2.0], None),
        ([1.0, 2.4], [1.0, 2.0], r"is 2.4 and was 2 at [1], a difference of 0.4"),
        ([1.0, np.nan], [1.0, 2.0], "is nan and was 2 at [1], a difference of nan"),
        ([-np.inf, 1.0], [np.inf, 1.0], "is -inf and was inf at [0], a difference of inf"),
        ([1.0], [1.0, 2.0], "is float64 [1] and was float64 [2]"),
        ([1], [1.0], "is int64 [1] and was float64 [1]"),
        (3, 5, "is 3 and was 5 at [], a difference of 2"),
        ([True], [False], "is 1 and was 0 at [0], a difference of 1"),
        ([1 + 1j], [1 - 1j], "is 1+1j and was 1-1j at [0], a difference of 2"),
        ([], [], None),
    ],
)
def test_differences(given, expected, words):
    assert execution._difference(np.asarray(given), np.asarray(expected), 0.1) == words


@pytest.mark.parametrize(
    "options",
    [{"execution": "fast"}, {"dtype": "int8"}, {"tolerance": -1}, {"cuda_graphs": [0]}, {"compile_mode": "x"}],
)
def test_options_that_cannot_be_meant_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TorchBackend.ModelOptions(**options)


# Compilers


@needs_compiler
def test_a_compiled_module_answers_on_any_thread_for_any_number_of_rows(tmp_path):
    directory = write_eager(tmp_path)
    plain, model = load(directory), load(directory, execution="compile")
    with ThreadPoolExecutor(1) as thread:
        for rows in (1, 2, 5, 40):
            x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
            np.testing.assert_allclose(thread.submit(call, model, x=x).result()["y"], call(plain, x=x)["y"], 1e-5, 1e-6)


@needs_compiler
def test_compiled_versions_with_sources_of_one_name_do_not_mix(tmp_path, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, mode: whole(graph, backend="eager"))  # which takes no seconds
    versions = []
    for factor in ("2", "-3"):
        directory = tmp_path / factor
        directory.mkdir()
        write_eager(directory)
        (directory / "helper.py").write_text(HELPER.replace("2", factor))
        versions.append((load(directory), load(directory, execution="compile")))
    for plain, model in versions:
        for rows in (4, 1, 3):
            np.testing.assert_allclose(call(model, x=X[:rows])["y"], call(plain, x=X[:rows])["y"], 1e-5, 1e-6)


class Package(NamedTuple):
    content: bytes
    model: Model
    plain: Model


@pytest.mark.parametrize("way", ["eager", "frozen"])
def test_what_needs_no_compiler_imports_none(tmp_path: Path, way: str) -> None:
    """Torch's own take 70 MB."""
    program = (
        "import pathlib, sys, warnings\n"
        "from dl_inference_torch_backend.backend import TorchBackend\n"
        "warnings.simplefilter('ignore')\n"
        "options = TorchBackend.ModelOptions(execution=sys.argv[2])\n"
        "TorchBackend(TorchBackend.Options()).load(pathlib.Path(sys.argv[1]), options, 'cpu')\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(write_scripted(tmp_path)), way], check=True, timeout=60)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A program that was compiled when it was loaded, and what the compiler made."""
    directory = write_exported(tmp_path_factory.mktemp("model"))
    contents: list[bytes] = []
    load_compiled = compiling.load_compiled

    def keep(content: bytes, device: torch.device) -> Any:
        contents.append(content)
        return load_compiled(content, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "load_compiled", keep)
        model = load(directory, execution="aoti")
    return Package(*contents, model, load(directory))


@pytest.fixture
def packaged(package: Package, tmp_path: Path) -> Path:
    (tmp_path / "model.pt2").write_bytes(package.content)
    np.savez(tmp_path / "sample.npz", x=X)
    return tmp_path


@needs_compiler
def test_the_platform_of_a_package_is_not_that_of_a_program(packaged, package):
    """A program that is compiled when it is loaded stays an exported program."""
    assert load(packaged, sha256=digest(package)).platform == "torch_aoti"
    assert package.model.platform == "pytorch_exported"


def digest(package: Package) -> list[str]:
    return [hashlib.sha256(package.content).hexdigest()]


@needs_compiler
def test_a_program_is_compiled_when_it_is_loaded(package):
    assert package.model.signature == package.plain.signature
    for rows in (0, 1, 3, 64):
        x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        outputs, expected = call(package.model, x=x), call(package.plain, x=x)
        assert outputs.keys() == expected.keys()
        np.testing.assert_allclose(outputs["y"], expected["y"], 1e-5, 1e-6)
    np.testing.assert_array_equal(call(package.model, x=X[::4])["z"], call(package.plain, x=X[::4])["z"])
    with pytest.raises(BadRequest, match="<= 64"):
        call(package.model, x=np.zeros((65, 3), np.float32))


@needs_compiler
@pytest.mark.parametrize("way", ["auto", "aoti"])
def test_a_package_is_loaded_as_it_is_once_it_is_trusted(package, packaged, way):
    with pytest.raises(ModelError, match=r"is refused: it holds compiled code.*if you trust the file"):
        load(packaged, execution=way)
    model = load(packaged, sha256=digest(package), execution=way)
    assert [str(spec) for spec in model.signature.inputs] == ['"x" (float32, [?, ?])']
    plain = {count: call(package.plain, x=X[:count]) for count in (1, 2, 3, 4)}
    with ThreadPoolExecutor(4) as threads:
        rows = (1, 2, 3, 4) * 500  # without a lock of ours some of them never end
        for count, outputs in zip(rows, threads.map(lambda count: call(model, x=X[:count]), rows), strict=True):
            expected = plain[count]
            np.testing.assert_allclose(outputs["output_0"], expected["y"], 1e-5, 1e-6)
            np.testing.assert_allclose(outputs["output_1"], expected["z"], 1e-5, 1e-6)


@needs_compiler
def test_a_package_takes_nothing_that_it_was_not_compiled_for(package, packaged):
    model = load(packaged, sha256=digest(package))
    for wrong, words in (
        (X[:1, :2], r"compiled for other inputs: input \[0\]: unmatched dim value at 1, expected: 3, but got: 2"),
        (X.astype(np.float64), "does not take dtype float64"),
        (X[0], r"does not take shape \[3\]"),
        (np.zeros((4, 3, 0), np.float32), r"does not take shape \[4, 3, 0\]"),
    ):
        with pytest.raises(BadRequest, match=words):
            call(model, x=wrong)
    np.testing.assert_array_equal(call(model, x=X.T.copy().T)["output_0"], call(model, x=X)["output_0"])
    with pytest.raises(BadRequest, match="expected the inputs"):
        call(model, other=X)


@needs_compiler
def test_a_package_runs_in_no_other_way(package, packaged):
    for options, words in (
        ({"dtype": "float16"}, "runs as it was compiled"),
        ({"cuda_graphs": [1]}, "runs as it was compiled"),
        ({"execution": "frozen"}, "holds 0 exported programs"),
    ):
        with pytest.raises(ModelError, match=words):
            load(packaged, sha256=digest(package), **options)


@needs_compiler
def test_a_package_needs_a_sample_that_says_what_it_takes(package, packaged):
    for sample, words in (
        ({"a": X, "b": X}, "takes the inputs any; sample.npz has a, b"),
        ({"x": X[:, :2]}, "does not take the samples that lie beside it"),
    ):
        np.savez(packaged / "sample.npz", **sample)
        with pytest.raises(ModelError, match=words):
            load(packaged, sha256=digest(package))
    (packaged / "sample.npz").unlink()
    with pytest.raises(ModelError, match=r"does not say what it takes; expected a sample\.npz beside it"):
        load(packaged, sha256=digest(package))


# Devices


class FakeDevice(Accelerator):
    """Keeps a log of what it is asked; its memory is the host's."""

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self.log: list[str] = []
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.log.append("host memory")
        return torch.empty(tuple(shape), dtype=dtype)

    def send(self, host: torch.Tensor) -> torch.Tensor:
        self.log.append("send")
        return _OnDevice.of(host.clone())

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.log.append("fetch")
        host = torch.zeros(tensor.shape, dtype=tensor.dtype)
        self.pending.append((host, tensor.as_subclass(torch.Tensor)))
        return host

    def synchronise(self) -> None:
        self.log.append("synchronise")
        for host, tensor in self.pending:
            host.copy_(tensor)
        self.pending.clear()

    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        self.log.append("record")
        outputs = run()

        def replay() -> None:
            self.log.append("replay")
            for output, now in zip(outputs, run(), strict=True):
                output.copy_(now)

        return replay, outputs


class _OnDevice(torch.Tensor):
    """A tensor that says that it is on another device."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _OnDevice:
        return tensor.as_subclass(cls)

    @property
    def device(self) -> Any:
        return torch.device("cuda")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice(torch.device("cpu"))
    monkeypatch.setattr(devices, "device_for", lambda _: fake)
    return fake


def test_results_are_waited_for_once_after_all_was_lined_up(tmp_path, device):
    directory = write_exported(tmp_path)
    model = load(directory)
    device.log.clear()
    outputs = call(model, x=X)
    assert device.log == ["host memory", "send", "fetch", "fetch", "synchronise"]
    np.testing.assert_allclose(outputs["z"], X.sum(1), rtol=1e-6)


def test_what_a_handler_gives_on_the_device_is_not_sent_again(tmp_path, device):
    model = load(write_exported(tmp_path))
    with model.session():
        x = model.to_native(X)
        device.log.clear()
        model({"x": x})
        assert device.log == ["fetch", "fetch", "synchronise"]
        device.log.clear()
        np.testing.assert_array_equal(model.to_numpy({"a": [x]})["a"][0], X)
    assert device.log == ["fetch", "synchronise"]


def test_read_only_and_foreign_bytes_go_through_the_devices_own_copy(tmp_path, device):
    model = load(write_exported(tmp_path))
    for array in (np.frombuffer(X.tobytes(), np.float32).reshape(4, 3), X.astype(">f4"), X[::-1, ::-1]):
        device.log.clear()
        np.testing.assert_array_equal(model.to_native(array).as_subclass(torch.Tensor).numpy(), array)
        assert device.log == ["host memory", "send"]
    with pytest.raises(BadRequest, match="take no string tensors"):
        model.to_native(np.array([b"a"], object))


@pytest.mark.parametrize("options", [{}, {"execution": "frozen"}, {"dtype": "bfloat16"}])
def test_graphs_are_recorded_at_load_and_replayed_for_their_sizes_only(tmp_path, device, options):
    directory = write_exported(tmp_path)
    plain, model = load(directory), load(directory, cuda_graphs=[1, 4], **options)
    assert device.log.count("record") == 2
    for rows, replays in ((4, True), (3, False), (1, True), (4, True)):
        x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        expected = call(plain, x=x)
        device.log.clear()
        outputs = call(model, x=x)
        fetched = ["fetch", "fetch", "synchronise"]
        assert device.log == ["host memory", "send", *(["replay"] if replays else []), *fetched]
        np.testing.assert_allclose(outputs["y"], expected["y"], 0.05, 0.05)
    assert device.log.count("record") == 0


def test_answers_of_a_replay_are_not_overwritten_by_the_next(tmp_path, device):
    model = load(write_exported(tmp_path), cuda_graphs=[4])
    with model.session():
        first = model.result(model.tensors({"x": X}))
        before = [tensor.clone() for tensor in first]
        model.result(model.tensors({"x": X + 1}))
        for tensor, copy in zip(first, before, strict=True):
            assert torch.equal(tensor, copy)


def test_threads_do_not_mix_what_they_replay(tmp_path, device):
    model = load(write_exported(tmp_path), cuda_graphs=[4])

    def answer(shift: int) -> None:
        with model.session():
            _, z = model.result(model.tensors({"x": X + shift}))
        np.testing.assert_allclose(z.as_subclass(torch.Tensor).numpy(), (X + shift).sum(1), rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(answer, range(100)))


def test_arrays_that_torch_can_use_are_not_copied(tmp_path):
    model = load(write_exported(tmp_path))
    own = X.copy()
    assert np.shares_memory(model.to_native(own).numpy(), own)


@needs_cuda
@every_kind
@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), {"execution": "frozen", "cuda_graphs": [1, 4]}, {"execution": "compile"}], ids=str
)
def test_answers_on_cuda_as_on_the_cpu(tmp_path, write, options):
    directory = write(tmp_path)
    if write is write_scripted and options.get("execution") == "compile":
        pytest.skip("TorchScript is not compiled")
    plain, model = load(directory), load(directory, "cuda", **options)
    for rows in (4, 1, 8, 4):
        x = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        expected = call(plain, x=x)
        for name, values in call(model, x=x).items():
            np.testing.assert_allclose(values, expected[name], 0.05, 0.05)
    model.close()


@needs_cuda
def test_copies_lie_in_page_locked_memory_and_each_model_has_a_stream(tmp_path):
    directory = write_exported(tmp_path)
    streams = set()
    for _ in range(2):
        model: Any = load(directory, "cuda")
        with model.session():
            streams.add(torch.cuda.current_stream().cuda_stream)
            assert model.device.host_memory((3,), torch.float32).is_pinned()
            assert model.device.fetch(model.to_native(X)).is_pinned()
    assert len(streams) == 2
    assert torch.cuda.default_stream().cuda_stream not in streams
