from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.testing import load
from torch.export import Dim

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.handler_inputs import inputs_of
from dl_inference_core.node.loading import Loader
from dl_inference_core.node.sources import imports_from
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import BackendConformance

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x)) + {add}

def create_model():
    return Net()
"""
X = np.arange(12, dtype=np.float32).reshape(4, 3)


def folder(directory: Path, *, add: int = 0, sources: str = "net") -> tuple[Path, torch.nn.Module]:
    """A folder with the source of a model in it, and the model with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{sources}.py").write_text(NET.format(add=add))
    with imports_from(directory):
        module = __import__(sources).Net().eval()
    return directory, module


def write_exported(directory: Path, add: int = 0) -> tuple[Path, torch.nn.Module]:
    directory, module = folder(directory, add=add)
    export(directory, module, torch.ones(4, 3), dynamic_shapes={"x": {0: Dim("batch", min=1, max=8)}})
    return directory, module


def write_scripted(directory: Path, add: int = 0) -> tuple[Path, torch.nn.Module]:
    directory, module = folder(directory, add=add)
    script(directory, module)
    return directory, module


def write_safetensors(directory: Path, add: int = 0) -> tuple[Path, torch.nn.Module]:
    directory, module = folder(directory, add=add, sources="model")
    safetensors.torch.save_file(module.state_dict(), directory / "model.safetensors")
    return directory, module


def write_state_dict(directory: Path, add: int = 0) -> tuple[Path, torch.nn.Module]:
    directory, module = folder(directory, add=add, sources="model")
    torch.save(module.state_dict(), directory / "state_dict.pth")
    return directory, module


def write_pickle(directory: Path, add: int = 0) -> tuple[Path, torch.nn.Module]:
    directory, module = folder(directory, add=add)
    with imports_from(directory):
        import net

        net.Net.__module__ = "net"  # as in the script that a model is saved by
        module = net.Net().eval()
        torch.save(module, directory / "model.pth")
    return directory, module


def export(directory: Path, module: torch.nn.Module, *args: Any, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.export.save(torch.export.export(module, args, **options), directory / "model.pt2")
    return directory


def script(directory: Path, module: torch.nn.Module) -> Path:
    directory.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), directory / "model.pt")  # type: ignore[no-untyped-call]
    return directory


def call(model: Model, **inputs: Any) -> dict[str, Any]:
    with model.session():
        return model(model.signature.bind(inputs))


CLASSES = ("net.Net", "torch.nn.modules.linear.Linear", "torch.nn.modules.dropout.Dropout")
WRITERS = {
    "exported": (write_exported, {}),
    "TorchScript": (write_scripted, {}),
    "safetensors": (write_safetensors, {}),
    "state dict": (write_state_dict, {}),
    "whole pickle": (write_pickle, {"allow_classes": CLASSES}),
}
every_kind = pytest.mark.parametrize(("write", "options"), WRITERS.values(), ids=WRITERS)


class Doubles(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": 2 * x}


class _Conformance(BackendConformance):
    backend_class = TorchBackend
    framework = "torch"
    inputs: ClassVar = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    outputs: ClassVar = {"y": np.arange(6, dtype=np.float32).reshape(2, 3) * 2}
    dtypes = (*BackendConformance.dtypes, "int16", "uint16", "uint32", "uint64", "complex64", "complex128", "bfloat16")


class TestExported(_Conformance):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return export(tmp_path / "model", Doubles(), torch.ones(4, 3), dynamic_shapes={"x": {0: Dim("batch")}})


class TestScripted(_Conformance):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return script(tmp_path / "model", Doubles())


class TestStateDict(_Conformance):
    model_options: ClassVar = {"factory": "doubles:create"}

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        source = """
            import torch

            class Doubles(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.factor = torch.nn.Parameter(torch.zeros(()))

                def forward(self, x):
                    return {"y": self.factor * x}

            create = Doubles
        """
        (directory / "doubles.py").write_text(textwrap.dedent(source))
        torch.save({"factor": torch.tensor(2.0)}, directory / "weights.pth")
        return directory


# Every kind


@every_kind
def test_answers_as_the_module_that_was_saved(tmp_path, write, options):
    directory, module = write(tmp_path / "1")
    model = load(directory, **options)
    expected = module(torch.from_numpy(X)).detach().numpy()
    outputs = call(model, x=X)
    assert outputs.keys() == {"output"}
    np.testing.assert_allclose(outputs["output"], expected, rtol=1e-6)
    with model.session():
        unnamed = model(model.signature.bind_one(X, cast=False))
    np.testing.assert_array_equal(unnamed["output"], outputs["output"])


@every_kind
def test_two_versions_with_sources_of_one_name_do_not_mix(tmp_path, write, options):
    models = []
    for version, add in (("1", 0), ("2", 100)):
        directory, module = write(tmp_path / version, add=add)
        models.append((load(directory, **options), module))
    for model, module in models:
        np.testing.assert_allclose(call(model, x=X)["output"], module(torch.from_numpy(X)).detach(), rtol=1e-6)
    assert not {"net", "model"} & sys.modules.keys()


@every_kind
def test_loads_on_several_threads_at_once(tmp_path, write, options):
    written = [write(tmp_path / str(version), add=version) for version in range(4)]
    together = threading.Barrier(4)

    def work(directory: Path) -> Any:
        together.wait(10)
        return call(load(directory, **options), x=X)["output"]

    with ThreadPoolExecutor(4) as threads:
        for (_, module), output in zip(written, threads.map(work, [path for path, _ in written]), strict=True):
            np.testing.assert_allclose(output, module(torch.from_numpy(X)).detach(), rtol=1e-6)


@every_kind
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "middle"])
def test_a_damaged_file_is_a_model_error_that_names_it(tmp_path, write, options, damage):
    directory, _ = write(tmp_path / "1")
    (path,) = (entry for entry in directory.iterdir() if entry.suffix not in (".py", ""))
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:half],
            "garbage": b"\x00garbage" * 100,
            "middle": content[: half // 2] + b"\xff" * half + content[half // 2 + half :],
        }[damage]
    )
    with pytest.raises(ModelError, match=path.name):
        load(directory, **options)


@pytest.mark.parametrize(
    ("write", "platform"),
    [
        (write_exported, "pytorch_exported"),
        (write_scripted, "pytorch_libtorch"),
        (write_state_dict, "pytorch_eager"),
        (write_safetensors, "pytorch_eager"),
    ],
)
def test_the_platform_names_the_format_of_the_file(tmp_path, write, platform):
    write(tmp_path)
    assert load(tmp_path).platform == platform


def test_the_session_is_inference_mode(tmp_path):
    model = load(write_scripted(tmp_path)[0])
    assert not torch.is_inference_mode_enabled()
    with model.session():
        assert torch.is_inference_mode_enabled()


# Which file


@pytest.mark.parametrize("name", ["model.pt2", "other.pt2", "a.pt", "w.safetensors", "model.pth"])
def test_recognises_by_name_without_importing_torch(tmp_path, name):
    (tmp_path / name).touch()
    program = (
        "import pathlib, sys\n"
        "import dl_inference_torch_backend\n"
        "(backend,) = dl_inference_torch_backend.dl_inference_register_backends()\n"
        "assert backend.recognises(pathlib.Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_folders_and_other_files_are_no_models(tmp_path):
    (tmp_path / "checkpoints.pt").mkdir()
    (tmp_path / "model.onnx").touch()
    assert not TorchBackend.recognises(tmp_path)


def test_several_files_are_an_error_that_names_them_until_one_is_chosen(tmp_path):
    directory, module = write_exported(tmp_path)
    torch.save(module.state_dict(), directory / "a.pth")
    with pytest.raises(ModelError, match=r'a\.pth, model\.pt2: say which with `file = "a\.pth"`'):
        load(directory)
    with pytest.raises(ModelError, match=r"no model file b\.pth; it has a\.pth, model\.pt2"):
        load(directory, file="b.pth")
    np.testing.assert_allclose(
        call(load(directory, file="model.pt2"), x=X)["output"], module(torch.from_numpy(X)).detach()
    )


def test_a_state_dict_may_be_called_pt(tmp_path):
    directory, module = folder(tmp_path, sources="model")
    torch.save(module.state_dict(), directory / "weights.pt")
    np.testing.assert_allclose(call(load(directory), x=X)["output"], module(torch.from_numpy(X)).detach())


# State dicts and their factories


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, r"holds weights alone; expected model\.py beside it with a function create_model\(\)"),
        ("", r"model\.py has no function create_model"),
        ("def create_model(): return 3", r"create_model\(\) in .*model\.py gave a int; expected an nn.Module"),
        ("def create_model(): 1 / 0", r"create_model\(\) in .*model\.py failed"),
        ("def create_model(): raise SystemExit", r"create_model\(\) in .*model\.py failed"),
        ("import nowhere", r"model\.py cannot be imported"),
        ("import torch\ndef create_model(): return torch.nn.Linear(7, 2)", r"state_dict\.pth do not fit the module"),
    ],
)
def test_a_factory_that_does_not_fit_is_a_model_error(tmp_path, source, words):
    directory, _ = write_state_dict(tmp_path)
    if source is None:
        (directory / "model.py").unlink()
    else:
        (directory / "model.py").write_text(source)
    with pytest.raises(ModelError, match=words):
        load(directory)


def test_a_file_of_something_else_is_a_model_error(tmp_path):
    torch.save([1, 2], tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"holds a list; expected an nn\.Module or a state dict"):
        load(tmp_path)


# Devices and threads


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "CPU"])
def test_an_unknown_device_is_a_model_error(tmp_path, device):
    with pytest.raises(ModelError, match=f'no device "{device}"; expected cpu, cuda, cuda:N or auto'):
        load(write_scripted(tmp_path)[0], device)


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:100"])
def test_a_device_that_is_not_there_is_a_model_error_with_those_that_are(tmp_path, device):
    with pytest.raises(ModelError, match=f'"{device}" is not available; this machine has cpu'):
        load(write_scripted(tmp_path)[0], device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_auto_is_cpu_where_there_is_no_cuda(tmp_path):
    directory, _ = write_exported(tmp_path)
    call(load(directory, "auto"), x=X)
    with pytest.raises(ModelError, match=r"this machine has cpu$"):
        load(directory, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_kind
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_answers_on_cuda(tmp_path, write, options, device):
    directory, module = write(tmp_path)
    model = load(directory, device, **options)
    with model.session():
        assert model.to_native(X).is_cuda
    np.testing.assert_allclose(call(model, x=X)["output"], module.cpu()(torch.from_numpy(X)).detach(), rtol=1e-3)
    model.close()


@pytest.mark.parametrize(
    ("environment", "options", "threads"),
    [
        ({}, {}, "3 3"),
        ({"OMP_NUM_THREADS": "2"}, {}, "2 3"),
        ({}, {"intra_op_threads": 1, "inter_op_threads": 2}, "1 2"),
    ],
)
def test_threads_follow_the_share_of_the_cores_unless_somebody_says_otherwise(tmp_path, environment, options, threads):
    directory, _ = write_scripted(tmp_path)
    program = """
        import pathlib, sys, torch
        from dl_inference_torch_backend.backend import TorchBackend

        backend = TorchBackend(TorchBackend.Options.model_validate_json(sys.argv[2]))
        backend.cores = 3
        backend.load(pathlib.Path(sys.argv[1]), backend.ModelOptions(), "cpu")
        print(torch.get_num_threads(), torch.get_num_interop_threads())
    """
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(directory), json.dumps(options)],
        env={**without, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.strip() == threads


def test_threads_are_set_once_per_process(tmp_path):
    directory, _ = write_scripted(tmp_path)
    program = """
        import pathlib, sys, torch
        from dl_inference_core.errors import ModelError
        from dl_inference_torch_backend.backend import TorchBackend

        def load(cores=0, **options):
            backend = TorchBackend(TorchBackend.Options(**options))
            backend.cores = cores
            for _ in range(2):
                backend.load(pathlib.Path(sys.argv[1]), backend.ModelOptions(), "cpu")
            print(torch.get_num_threads(), torch.get_num_interop_threads())

        load(intra_op_threads=3, inter_op_threads=5)
        load(intra_op_threads=2, inter_op_threads=5)
        load()
        load(cores=1)
        load(cores=1, intra_op_threads=2)
        try:
            load(inter_op_threads=6)
        except ModelError as error:
            print(error)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    message = "inter_op_threads is 5 in this process and cannot become 6 any more: restart it"
    assert ran.stdout.splitlines() == ["3 5", "2 5", "2 5", "1 5", "2 5", message]


# Signatures and calls


class Several(torch.nn.Module):
    def forward(self, input, scale, *, shift, flag=True):  # noqa: A002 - a name that models have
        return input * scale + shift, (input - shift).to(torch.bfloat16), None


def test_an_exported_program_says_what_it_takes_and_gives(tmp_path):
    batch = Dim("batch", min=2, max=16)
    export(
        tmp_path,
        Several(),
        torch.ones(4, 3),
        torch.ones(3, dtype=torch.float64),
        kwargs={"flag": True, "shift": torch.ones(4, 1, dtype=torch.float32)},
        dynamic_shapes={"input": {0: batch}, "scale": None, "shift": {0: batch}, "flag": None},
    )
    model = load(tmp_path)
    assert [str(spec) for spec in model.signature.inputs] == [
        '"input" (float32, [?, 3])',
        '"scale" (float64, [3])',
        '"shift" (float32, [?, 1])',
    ]
    assert [str(spec) for spec in model.signature.outputs] == [
        '"output_0" (float64, [?, 3])',
        '"output_1" (bfloat16, [?, 3])',
    ]
    outputs = call(model, input=X, scale=np.array([1.0, 2, 3]), shift=X[:, :1])
    np.testing.assert_array_equal(outputs["output_0"], X * np.array([1.0, 2, 3]) + X[:, :1])
    np.testing.assert_array_equal(outputs["output_1"], (X - X[:, :1]).astype(ml_dtypes.bfloat16))


class Shifted(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:-1] + y


def test_sizes_that_the_program_was_not_exported_for_are_the_clients_mistake(tmp_path):
    batch = Dim("batch", min=3, max=8)
    one, other = {0: batch}, {0: batch - 1}
    export(tmp_path, Shifted(), torch.ones(4), torch.ones(3), dynamic_shapes={"x": one, "y": other})
    model = load(tmp_path)
    assert call(model, x=X.ravel()[:8], y=X.ravel()[:7])["output"].shape == (7,)
    for sizes, words in (
        ((9, 8), r'only takes inputs with x\.size\(\)\[0\] <= 8; got the shapes "x" \[9\], "y" \[8\]'),
        ((2, 1), r"x\.size\(\)\[0\] >= 3"),
        ((4, 4), r"x\.size\(\)\[0\] == y\.size\(\)\[0\]"),
    ):
        with pytest.raises(BadRequest, match=words):
            call(model, x=X.ravel()[: sizes[0]], y=X.ravel()[: sizes[1]])


def test_any_batch_size_goes_where_the_export_did_not_limit_it(tmp_path):
    export(tmp_path, torch.nn.Linear(3, 2), torch.ones(4, 3), dynamic_shapes={"input": {0: Dim.DYNAMIC}})
    model = load(tmp_path)
    for size in (0, 1, 2, 700):
        assert call(model, input=np.zeros((size, 3), np.float32))["output"].shape == (size, 2)
    with pytest.raises(BadRequest, match=r'input "input" \(float32, \[\?, 3\]\) does not take shape \[2, 4\]'):
        call(model, input=np.zeros((2, 4), np.float32))


class Nested(torch.nn.Module):
    def forward(self, batch, *, scales):
        return {"a": batch["a"] * scales[0], "b": [batch["c"] + 1, (batch["a"], 3)]}


def test_nested_inputs_and_outputs_have_flat_names(tmp_path):
    export(tmp_path, Nested(), {"a": torch.ones(2), "c": torch.ones(1)}, kwargs={"scales": (torch.ones(2),)})
    model = load(tmp_path)
    assert [spec.name for spec in model.signature.inputs] == ["batch_a", "batch_c", "scales_0"]
    assert [spec.name for spec in model.signature.outputs] == ["a", "b_0", "b_1_0", "b_1_1"]
    a, c, scale = (np.array(values, np.float32) for values in ([1, 2], [5], [3, 4]))
    outputs = call(model, batch_a=a, batch_c=c, scales_0=scale)
    expected = {"a": [3, 8], "b_0": [6], "b_1_0": [1, 2], "b_1_1": 3}
    assert {name: value.tolist() for name, value in outputs.items()} == expected


class Numbers(torch.nn.Module):
    def forward(self, x, n):
        return x * n


def test_a_program_that_takes_a_number_is_a_model_error(tmp_path):
    export(tmp_path, Numbers(), torch.ones(2), 3, dynamic_shapes={"x": None, "n": Dim.DYNAMIC})
    with pytest.raises(ModelError, match='takes "n" as a number; export it with tensors only'):
        load(tmp_path)


class Weighed(torch.nn.Module):
    def forward(self, tokens, weight):
        return tokens * weight


@pytest.mark.parametrize("keywords", [(), ("weight",), ("tokens", "weight")])
def test_handlers_give_a_program_its_arguments_by_position_or_by_name(tmp_path, keywords):
    given = {"tokens": torch.tensor([2, 3]), "weight": torch.tensor([1.0, 0.5])}
    args = [value for name, value in given.items() if name not in keywords]
    export(tmp_path, Weighed(), *args, kwargs={name: given[name] for name in keywords})
    native = load(tmp_path).native
    for result in (
        native(*given.values()),
        native(given["tokens"], weight=given["weight"]),
        native(weight=given["weight"], tokens=given["tokens"]),
    ):
        torch.testing.assert_close(result, torch.tensor([2.0, 1.5]))
    for wrong_args, wrong_kwargs in (((), {}), (given.values(), {"weight": 1}), ((), {"mask": given["tokens"]})):
        with pytest.raises((ValueError, TypeError)):
            native(*wrong_args, **wrong_kwargs)


@pytest.mark.parametrize("returned", ["array", "{'x': array}", "[[2, 3]]"])
def test_a_processor_calls_a_program_on_what_its_preprocess_returned(tmp_path, returned):
    export(tmp_path, Doubles(), torch.ones(1, 2))
    (tmp_path / "processor.py").write_text(
        f"import numpy as np\narray = np.array([[2, 3]])\ndef preprocess(x, **kwargs): return {returned}\n"
    )
    loaded = Loader(backends={"torch": TorchBackend(TorchBackend.Options())}, handlers={}).load(
        NamedModel(path=tmp_path), tmp_path
    )
    handler, model = loaded.instances[0].handler, loaded.instances[0].model
    request = Request(payload="text", form=Form.TEXT)
    with model.session():
        inputs = inputs_of(handler, request)
        answer = handler.postprocess(handler.run_model(model, inputs, request), request)
    np.testing.assert_array_equal(answer["y"], [[4, 6]])


def test_constants_of_the_export_are_no_inputs(tmp_path):
    export(tmp_path, Numbers(), torch.ones(2), 3)
    model = load(tmp_path)
    assert [spec.name for spec in model.signature.inputs] == ["x"]
    assert call(model, x=np.ones(2, np.float32))["output"].tolist() == [3, 3]


class Scored(torch.nn.Module):
    def forward(self, x: torch.Tensor, offset: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale + offset


def test_torchscript_names_its_inputs(tmp_path):
    model = load(script(tmp_path, Scored()))
    assert [str(spec) for spec in model.signature.inputs] == [
        '"x" (any dtype, any shape)',
        '"offset" (any dtype, any shape)',
    ]
    assert call(model, x=np.ones(2), offset=np.ones(1))["output"].tolist() == [3, 3]


def eager(directory: Path, forward: str, result: str) -> Model:
    source = (
        f"import torch, collections\nclass create_model(torch.nn.Module):\n  def forward({forward}): return {result}"
    )
    (directory / "model.py").write_text(source)
    torch.save({}, directory / "weights.pth")
    return load(directory)


@pytest.mark.parametrize(
    ("forward", "result", "names", "expected"),
    [
        ("self, x, y=2.0, *, z", "x * y + z", ["x", "z"], {"output": [3]}),
        ("self, x, /", "x", ["x"], {"output": [1]}),
        ("self, x, z", "dict(a=x, b=None, c=1.5)", ["x", "z"], {"a": [1], "c": 1.5}),
        ("self, x", "collections.namedtuple('P', 'p q')(x, x + 1)", ["x"], {"p": [1], "q": [2]}),
        ("self, *args", "args[0]", [], {"output": [1]}),
        ("self, x, **kwargs", "x", ["x"], {"output": [1]}),
    ],
)
def test_an_eager_module_names_its_inputs(tmp_path, forward, result, names, expected):
    model = eager(tmp_path, forward, result)
    assert [spec.name for spec in model.signature.inputs] == names
    outputs = call(model, **{name: np.ones(1, np.float32) for name in names or ["anything"]})
    assert {name: value.tolist() for name, value in outputs.items()} == expected


def test_names_of_a_client_never_become_keyword_arguments(tmp_path):
    model = eager(tmp_path, "self, x=None, **kwargs", "1 / 0")
    with pytest.raises(BadRequest, match=r"Sent extra: \{anything\}"):
        call(model, x=X, anything=X)
    with model.session(), pytest.raises(BadRequest, match=r'no input "anything"; it takes "x" .*optional'):
        model({"x": X, "anything": X})


def test_an_output_that_no_tensor_can_hold_is_named(tmp_path):
    model = eager(tmp_path, "self, x", "dict(a=x, b=object())")
    with pytest.raises(TypeError, match='output "b" has the type object; expected a tensor or a number'):
        call(model, x=X)


# Values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["exported", "TorchScript"])
def test_half_precision_models_answer_as_torch_does(tmp_path, dtype, kind):
    module = torch.nn.Linear(3, 2).to(dtype).eval()
    x = torch.randn(4, 3).to(dtype)
    model = load(export(tmp_path, module, x) if kind == "exported" else script(tmp_path, module))
    array = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float16)
    output = call(model, input=array)["output"]
    assert output.dtype == array.dtype
    np.testing.assert_array_equal(output.view(np.int16), module(x).detach().view(torch.int16).numpy())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(export(tmp_path_factory.mktemp("model"), Doubles(), torch.ones(1)))


def test_every_bfloat16_goes_both_ways_unchanged(model):
    bits = np.arange(1 << 16, dtype=np.uint16)
    tensor = model.to_native(bits.view(ml_dtypes.bfloat16))
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.nan_to_num(), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).nan_to_num())
    np.testing.assert_array_equal(model.to_numpy(tensor).view(np.uint16), bits)


def test_bytes_from_the_wire_are_never_written_to(model):
    wire = np.arange(3, dtype=np.float32).tobytes()
    tensor = model.to_native(np.frombuffer(wire, np.float32))
    tensor.add_(1)
    assert wire == np.arange(3, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4, dtype=">f4"),
        np.arange(4, dtype=">i8"),
        X[::2, ::-1],
        X.T,
        np.frombuffer(b"\x00" + X.tobytes(), np.uint8)[1:].view(np.float32),
        np.array(3, dtype=np.int16),
    ],
    ids=["big-endian floats", "big-endian integers", "backwards", "transposed", "unaligned", "no axes"],
)
def test_arrays_of_any_layout_keep_their_values(model, array):
    back = model.to_numpy(model.to_native(array))
    np.testing.assert_array_equal(back, array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([b"a"], dtype=object), "torch models take no string tensors"),
        (np.array(["a"]), "torch models take no string tensors"),
        (np.array([1], "M8[s]"), r"torch models take no datetime64\[s\] tensors"),
    ],
)
def test_what_torch_cannot_hold_is_the_clients_mistake(model, array, words):
    with model.session():
        with pytest.raises(BadRequest, match=words):
            model({"x": array})
        with pytest.raises(BadRequest, match=words):
            model.to_native([{"deep": (array,)}])


class Pair(NamedTuple):
    one: Any
    two: Any


def test_containers_keep_their_types(model):
    value = model.to_native({"a": Pair(X, [X, 3]), "b": "text"})
    assert isinstance(value["a"], Pair)
    assert isinstance(value["a"].one, torch.Tensor)
    assert value["b"] == "text"
    np.testing.assert_array_equal(model.to_numpy(value)["a"].two[0], X)


def test_rows_of_arrays_and_of_tensors_are_put_together(model):
    np.testing.assert_array_equal(model.join([X, X[:1]]), np.concatenate([X, X[:1]]))
    joined = model.join([model.to_native(X), model.to_native(X[:1])])
    assert isinstance(joined, torch.Tensor)
    np.testing.assert_array_equal(model.to_numpy(joined), np.concatenate([X, X[:1]]))


def test_conjugates_and_negatives_are_resolved(model):
    tensor = torch.tensor([1 + 2j])
    assert model.to_numpy({"a": tensor.conj(), "b": tensor.conj().imag})["a"].tolist() == [1 - 2j]
    assert model.to_numpy(tensor.conj().imag).tolist() == [-2]


def test_a_closed_model_lets_go_of_its_weights(tmp_path):
    closing = load(write_exported(tmp_path)[0])
    closing.close()
    assert closing.native is None


def test_the_hook_gives_the_backend():
    import dl_inference_torch_backend

    (backend,) = dl_inference_torch_backend.dl_inference_register_backends()
    assert issubclass(backend, Backend)
    assert backend.name == "torch"
