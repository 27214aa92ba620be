"""Which inputs a module has, by which names, which may be left out, and what becomes of numbers without a dtype."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import ml_dtypes
import numpy as np
import pytest
import torch
from dl_inference_torch_backend import integer_inputs
from dl_inference_torch_backend.backend import TorchBackend
from dl_inference_torch_backend.testing import load
from torch import nn

from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler, bind
from dl_inference_core.node.processor import Processor
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.sources import imports_from
from dl_inference_core.tensors import Form, Layout, Payload, Request, Response
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

X = np.arange(6, dtype=np.float32).reshape(2, 3)
MASKED = """
class create_model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, {arguments}):
        if mask is not None:
            x = x * mask
        return x * self.weight
"""
LINEAR = """
def create_model():
    return torch.nn.Linear(3, 2)
"""


def write_eager(directory: Path, source: str) -> Path:
    """A folder with a module's weights and the source of its factory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.py").write_text(f"import torch\nfrom typing import *\n{textwrap.dedent(source)}")
    with imports_from(directory):
        module = __import__("model").create_model()
    torch.save(module.state_dict(), directory / "weights.pth")
    return directory


def write_scripted(directory: Path, module: nn.Module, *, freeze: bool = False) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Any = torch.jit.script(module.eval())
        torch.jit.save(torch.jit.freeze(scripted) if freeze else scripted, directory / "model.pt")  # type: ignore[no-untyped-call]
    return directory


def call(model: Model, inputs: dict[str, Any]) -> Any:
    with model.session():
        outputs = model(inputs)
    return outputs["output"].tolist()


def asked(model: Model, inputs: dict[str, Any]) -> Any:
    """As a client's typed tensors are answered."""
    return call(model, model.signature.bind(inputs))


# Names


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, mask: Optional[torch.Tensor] = None, factor: float = 1.0) -> torch.Tensor:  # noqa: UP045 - TorchScript's
        if mask is not None:
            x = x * mask
        return x * self.weight * factor


MASKING = {
    "unannotated": lambda path: write_eager(path, MASKED.format(arguments="x, mask=None")),
    "annotated": lambda path: write_eager(
        path, MASKED.format(arguments="x: torch.Tensor, mask: Optional[torch.Tensor] = None")
    ),
    "by keyword": lambda path: write_eager(path, MASKED.format(arguments="x, *, mask=None, flag=True")),
    "with more keywords": lambda path: write_eager(path, MASKED.format(arguments="x, mask=None, **more")),
    "by place": lambda path: write_eager(path, MASKED.format(arguments="x, mask=None, /")),
    "TorchScript": lambda path: write_scripted(path, Masks()),
}


@pytest.mark.parametrize("write", MASKING.values(), ids=MASKING)
def test_an_optional_input_can_be_given_and_left_out(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    model = load(write(tmp_path))
    assert [(spec.name, spec.optional) for spec in model.signature.inputs] == [("x", False), ("mask", True)]
    assert asked(model, {"x": X}) == X.tolist()
    assert asked(model, {"x": X, "mask": 2 * X}) == (2 * X * X).tolist()
    assert call(model, {"mask": 0 * X, "x": X}) == (0 * X).tolist(), "a handler's call, in any order"
    assert call(model, {"x": X, "mask": None}) == X.tolist()
    for wrong in ({"mask": X}, {"x": X, "other": X}):
        with pytest.raises(BadRequest, match=r'"mask" .*optional'):
            asked(model, wrong)
        with pytest.raises(BadRequest, match='it takes "x" .*"mask" .*optional' if "other" in wrong else "x"):
            call(model, wrong)


def test_where_all_inputs_are_optional_each_goes_by_its_name(tmp_path: Path) -> None:
    model = load(write_eager(tmp_path, MASKED.format(arguments="x=torch.ones(2, 3), mask=None")))
    assert asked(model, {"mask": 5 * X}) == (5 * X).tolist()
    assert asked(model, {"x": X}) == X.tolist()
    with model.session():
        unnamed = model(model.signature.bind_one(X, cast=False))
    assert unnamed["output"].tolist() == X.tolist(), "a tensor without a name is the first, as in Python"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("x, flag=True, scale=2.0, name='a', mask=None", ["x", "mask"]),
        ("x, flag: Optional[bool] = None, mask: 'Optional[torch.Tensor]' = None", ["x", "mask"]),
        ("x, mask: Any = None, count: int = 3", ["x", "mask"]),
        ("x, mask=torch.ones(3)", ["x", "mask"]),
    ],
)
def test_flags_and_numbers_with_a_default_are_no_inputs_of_clients(
    tmp_path: Path, arguments: str, names: list[str]
) -> None:
    model = load(write_eager(tmp_path, MASKED.format(arguments=arguments)))
    assert [spec.name for spec in model.signature.inputs] == names
    assert asked(model, {"x": X}) == X.tolist()


def test_a_handler_may_give_what_clients_may_not(tmp_path: Path) -> None:
    model = load(write_scripted(tmp_path, Masks()))
    assert call(model, {"x": X, "factor": 3.0}) == (3 * X).tolist()
    with pytest.raises(BadRequest, match=r"Sent extra: \{factor\}"):
        asked(model, {"x": X, "factor": np.array(3.0)})


class Lists(nn.Module):
    def forward(
        self,
        images: list[torch.Tensor],
        extra: Optional[list[torch.Tensor]],  # noqa: UP045 - TorchScript's
        named: Optional[dict[str, torch.Tensor]] = None,  # noqa: UP045
    ) -> torch.Tensor:
        total = torch.stack([image.sum() for image in images])
        if extra is not None:
            total = total + len(extra)
        if named is not None:
            total = total * named["factor"]
        return total


def test_torchscript_takes_lists_of_tensors(tmp_path: Path) -> None:
    model = load(write_scripted(tmp_path, Lists()))
    assert [(spec.name, spec.optional) for spec in model.signature.inputs] == [("images", False), ("extra", True)]
    assert asked(model, {"images": X}) == [3, 12], "the rows of one tensor"
    assert asked(model, {"images": X, "extra": X}) == [5, 14]
    assert call(model, {"images": [X, X[0], X[0, :1]]}) == [15, 3, 0], "a handler's list, of several shapes"
    assert call(model, {"images": [torch.ones(2)], "named": {"factor": np.float32([4])}}) == [8]


@pytest.mark.parametrize(
    "annotation", ["List[torch.Tensor]", "'Optional[List[torch.Tensor]]'", "list[torch.Tensor] | None"]
)
def test_a_module_takes_lists_of_tensors(tmp_path: Path, annotation: str) -> None:
    source = f"""
        class create_model(torch.nn.Module):
            def forward(self, images: {annotation}, targets: Optional[List[Dict[str, torch.Tensor]]] = None):
                assert isinstance(images, list)
                return torch.stack([image.sum() for image in images])
    """
    model = load(write_eager(tmp_path, source))
    assert [spec.name for spec in model.signature.inputs] == ["images"]
    assert asked(model, {"images": X}) == [3, 12], "the rows of one tensor"
    assert call(model, {"images": [X, X[0]], "targets": [{"boxes": X}]}) == [15, 3], "a handler's"


# Batches


def repository(directory: Path, **handlers: type[Handler]) -> Repository:
    backend = TorchBackend(TorchBackend.Options())
    return Repository(directory, backends={"torch": backend}, handlers={"default": Handler, **handlers})


async def answer(served: Any, request: Request, protocol: str = "tfserving") -> Response:
    spoken = PROTOCOLS[protocol]
    body = spoken.codec.encode_request(request)
    return spoken.codec.decode_response(await answered(served, spoken, body))


def test_requests_with_and_without_an_optional_input_share_no_batch(tmp_path: Path) -> None:
    write_eager(tmp_path / "m" / "1", MASKED.format(arguments="x, mask=None"))
    (tmp_path / "m" / "model.toml").write_text("[batching]\nenabled = true\nmax_delay_us = 20000\n")
    requests = [{"x": X[:1]}, {"x": X[1:], "mask": 0 * X[1:]}, {"x": X[1:]}, {"x": X[:1], "mask": 2 * X[:1]}] * 5

    async def main() -> list[Any]:
        models = repository(tmp_path)
        await models.start()
        served = models.models["m"]
        assert served.ready, served.versions
        try:
            answers = await asyncio.gather(
                *[answer(served, Request(payload=each, form=Form.TENSORS, model="m")) for each in requests]
            )
            return [each.payload for each in answers]
        finally:
            await models.close()

    for request, payload in zip(requests, asyncio.run(main()), strict=True):
        np.testing.assert_array_equal(payload["output"], request["x"] * request.get("mask", 1))


# Numbers without a dtype of their own


NUMBERS: list[tuple[Payload, Form, Layout | None]] = [
    ([[1, 2, 3]], Form.JSON, Layout.ROWS),
    ([[1.0, 2.0, 3.0]], Form.JSON, Layout.COLUMNS),
    ({"input": [[1, 2, 3]]}, Form.JSON, Layout.COLUMNS),
    ({"input": [[1, 2, 3]]}, Form.JSON, None),
    ([[1.0, 2, 3]], Form.JSON, None),
    (np.array([[1.0, 2, 3]]), Form.TENSOR, None),
    (np.array([[1, 2, 3]]), Form.NDARRAY, None),
]


@pytest.mark.parametrize("kind", ["eager", "TorchScript", "frozen", "sampled", "float32"])
def test_numbers_without_a_dtype_become_that_of_the_weights(tmp_path: Path, kind: str) -> None:
    if kind == "eager":
        write_eager(tmp_path, LINEAR)
    else:
        write_scripted(tmp_path, nn.Linear(3, 2), freeze=kind == "frozen")
    if kind in ("sampled", "float32"):
        np.savez(tmp_path / "sample.npz", input=np.ones((1, 3), np.float32))
    model = load(tmp_path, **({"dtype": "float32"} if kind == "float32" else {}))
    expected = call(model, {"input": np.float32([[1, 2, 3]])})
    for payload, form, layout in NUMBERS:
        bound = bind(model.signature, Request(payload=payload, form=form, layout=layout))
        assert bound["input"].dtype == np.float32
        assert call(model, bound) == expected
    typed = bind(model.signature, Request(payload={"input": np.ones((1, 3))}, form=Form.TENSORS))
    assert typed["input"].dtype == np.float64, "a dtype that the client states is the client's"


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, "f8"), (torch.float16, "f2"), (torch.bfloat16, ml_dtypes.bfloat16)]
)
def test_numbers_become_any_dtype_of_weights(tmp_path: Path, dtype: torch.dtype, expected: Any) -> None:
    model = load(write_scripted(tmp_path, nn.Linear(3, 2).to(dtype)))
    for payload, form, layout in NUMBERS:
        bound = bind(model.signature, Request(payload=payload, form=form, layout=layout))
        assert bound["input"].dtype == np.dtype(expected)
        call(model, bound)


def test_numbers_become_what_the_sample_says(tmp_path: Path) -> None:
    write_eager(tmp_path, LINEAR.replace("return", "return torch.nn.Embedding(9, 1) and"))
    np.savez(tmp_path / "warm_up.npz", input=np.ones((1, 3), np.float64))
    np.savez(tmp_path / "sample.npz", input=np.ones((1, 3), np.int32))
    assert load(tmp_path).signature.inputs[0].number_dtype == np.int32


def test_a_module_without_weights_takes_numbers_as_they_are(tmp_path: Path) -> None:
    model = load(write_eager(tmp_path, "class create_model(torch.nn.Module):\n    def forward(self, x): return x"))
    request = Request(payload=np.ones((1, 3)), form=Form.TENSOR)
    assert bind(model.signature, request)["x"].dtype == np.float64


def test_an_annotation_says_what_numbers_become(tmp_path: Path) -> None:
    source = """
        class create_model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(3))

            def forward(self, ids: torch.LongTensor, mask: Optional[torch.FloatTensor] = None):
                return undefined
    """
    model = load(write_eager(tmp_path, source))
    assert [spec.number_dtype for spec in model.signature.inputs] == [np.int64, np.float32]


# Which inputs hold integers


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(100, 8), nn.Embedding(64, 8), nn.LayerNorm(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)

    def forward(self, input_ids, weights=None):  # type: ignore[no-untyped-def]
        _, length = input_ids.shape
        padding = input_ids == 0
        places = torch.arange(length, device=input_ids.device).unsqueeze(0)
        x = self.norm(self.words(input_ids) + self.places(places))
        x = self.layer(x, src_key_padding_mask=padding)[:, 0]
        return x if weights is None else x * weights


class Ranking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.EmbeddingBag(100, 8), nn.Linear(11, 2)
        self.register_buffer("offsets", torch.tensor([0, 10]))

    def forward(self, dense, sparse):  # type: ignore[no-untyped-def]
        if dense.dim() != 2:
            raise ValueError("expected rows of features")
        return self.linear(torch.cat([dense, self.embedding(sparse + self.offsets.unsqueeze(0))], 1))


class Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(100, 4), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([x[:, :3], self.embedding(x[:, 3].long())], 1))  # type: ignore[no-any-return]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, 4))

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.weight[ids] * scale


class Turned(Table):
    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.weight[ids.T.contiguous().data] * scale


class Converts(Table):
    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids.to(torch.int64), self.weight).sum(1) / scale.float().unsqueeze(1)


class Buckets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.register_buffer("bounds", torch.arange(9.0))

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        places = torch.bucketize(x, self.bounds), (y * 9.5).long(), torch.floor(y).long(), (y / 2).long(), z.argmax(1)
        several = torch.stack([self.embedding(place) for place in places])
        return several + self.embedding(torch.div(ids + 1, 2, rounding_mode="floor"))  # type: ignore[no-any-return]


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(10, 4), nn.LSTMCell(4, 4)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(sequence.size(0), 4), torch.zeros(sequence.size(0), 4)
        for step in range(sequence.size(1)):
            state = self.cell(self.embedding(sequence[:, step]), state)
        return state[0]


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.norm() > 1):
            x = x / 2
        return self.linear(x)  # type: ignore[no-any-return]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.layer, self.norm = nn.Embedding(3, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)).relu().mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scripted", [False, True], ids=["module", "TorchScript"])
@pytest.mark.parametrize(
    ("make", "integers"),
    [
        (Encoder, {"input_ids"}),
        (Ranking, {"sparse"}),
        (Columns, set()),
        (Table, {"ids"}),
        (Turned, {"ids"}),
        (Converts, {"ids"}),
        (Buckets, {"ids"}),
        (Steps, {"sequence"}),
        (Loops, set()),
        (Images, set()),
        (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), {"input"}),
        (lambda: nn.Linear(3, 2), set()),
    ],
)
def test_inputs_that_are_indices_hold_integers(
    make: Callable[[], nn.Module], integers: set[str], scripted: bool
) -> None:
    module = make().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if scripted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert integer_inputs.of_scripted(torch.jit.script(module)) == integers
    else:
        names = list(inspect.signature(module.forward).parameters)
        assert integer_inputs.of_module(module, names) == integers
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_module_that_keeps_what_it_was_called_with_keeps_no_probe() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.seen: list[Any] = []
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            self.calls += 1  # type: ignore[operator]
            return self.linear(x)  # type: ignore[no-any-return]

    module = Keeps()
    assert integer_inputs.of_module(module, ["x"]) == set()
    assert module.seen == []
    assert module.calls == 0


def test_a_forward_that_ends_the_process_on_a_probe_tells_nothing() -> None:
    class Exits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise SystemExit(3)

    assert integer_inputs.of_module(Exits(), ["x"]) == set()


def test_ids_of_json_and_of_seldon_stay_integers(tmp_path: Path) -> None:
    source = "def create_model():\n    return torch.nn.Embedding(30_000_000, 1, dtype=torch.float16)"
    model = load(write_eager(tmp_path, source))
    large = 20_000_001
    for payload, form, layout in [
        ([[large]], Form.JSON, Layout.ROWS),
        ([[large]], Form.JSON, None),
        (np.array([[float(large)]]), Form.TENSOR, None),
    ]:
        bound = bind(model.signature, Request(payload=payload, form=form, layout=layout))
        assert bound["input"].dtype == np.int64
        assert bound["input"].tolist() == [[large]]
    with pytest.raises(BadRequest, match=r"does not take the value 0\.5"):
        bind(model.signature, Request(payload=np.array([[0.5]]), form=Form.TENSOR))


# The original's folders


EXPERTS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(62, 4) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Sequential(nn.Linear(62, 3), nn.Softmax(dim=1)) for _ in range(2)])
        self.towers = nn.ModuleList([nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for _ in range(2)])

    def forward(self, x):
        experts = torch.stack([expert(x) for expert in self.experts])
        mixed = [(gate(x).t().unsqueeze(2) * experts).sum(dim=0) for gate in self.gates]
        return [tower(each) for tower, each in zip(self.towers, mixed)]
"""


@pytest.mark.parametrize(
    ("processor", "protocol_form"),
    [
        ("", Form.TENSOR),
        ("", Form.NDARRAY),
        ("def postprocess(x, **kwargs): return [each.tolist() for each in x]", Form.TENSOR),
        ("def postprocess(x, **kwargs): return [each.tolist() for each in x]", Form.NDARRAY),
    ],
)
def test_the_originals_multi_task_ranking_answers_seldons_numbers(
    tmp_path: Path, processor: str, protocol_form: Form
) -> None:
    folder = tmp_path / "mmoe"
    (folder / "Models").mkdir(parents=True)
    (folder / "Models" / "__init__.py").touch()
    (folder / "Models" / "experts.py").write_text(EXPERTS)
    with imports_from(folder):
        cls = __import__("Models.experts").experts.Model
        cls.__module__ = "Models.experts"  # as in the script that the model is saved by
        module = cls().eval()
        torch.save(module, folder / "model.pth")
    kinds = {type(each) for each in module.modules()}
    classes = ", ".join(f'"{kind.__module__}.{kind.__qualname__}"' for kind in kinds)
    (folder / "model.toml").write_text(f"task_id = 39\n[options]\nallow_classes = [{classes}]\n")
    if processor:
        (folder / "processor.py").write_text(processor)
    x = np.random.default_rng(0).random((2, 62))

    async def main() -> Any:
        models = repository(tmp_path, processor=Processor)
        await models.start()
        served = models.tasks[39]
        assert served.ready, served.versions
        try:
            good = await answer(served, Request(payload=x, form=protocol_form, tags={"taskId": 39}), "seldon")
            with pytest.raises(BadRequest, match=r"mat1 and mat2 shapes cannot be multiplied \(2x5 and 62x"):
                await answer(served, Request(payload=x[:, :5], form=protocol_form, tags={"taskId": 39}), "seldon")
            return good.payload
        finally:
            await models.close()

    payload = asyncio.run(main())
    expected = [each.detach().numpy() for each in module(torch.tensor(x, dtype=torch.float32))]
    found = [payload[name] for name in sorted(payload)] if isinstance(payload, dict) else payload
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "inputs", "said"),
    [
        ("x, mask=None", {"x": X, "mask": 2 * X}, (2 * X * X).tolist()),
        ("x, mask=None", {"x": X}, X.tolist()),
        ("x=None, mask=None", {"mask": X}, None),
        ("x, mask=None", {"x": X, "other": X}, r"Sent extra: \{other\}"),
        ("x, mask=None", {"other": X}, r"Sent extra: \{other\}"),
    ],
)
def test_a_processor_without_a_preprocess_passes_inputs_by_name(
    tmp_path: Path, arguments: str, inputs: dict[str, Any], said: Any
) -> None:
    source = MASKED.format(arguments=arguments).replace(
        "if mask is not None:", "if mask is not None and x is not None:"
    )
    folder = write_eager(tmp_path / "m", source.replace("return x", "return (mask if x is None else x)"))
    (folder / "processor.py").write_text("def postprocess(x, **kwargs): return {'output': x}")

    async def main() -> Any:
        models = repository(tmp_path, processor=Processor)
        await models.start()
        assert models.models["m"].ready, models.models["m"].versions
        try:
            return (await answer(models.models["m"], Request(payload=inputs, form=Form.TENSORS, model="m"))).payload
        finally:
            await models.close()

    if isinstance(said, str):
        with pytest.raises(BadRequest, match=said):
            asyncio.run(main())
    else:
        assert asyncio.run(main())["output"].tolist() == (X.tolist() if said is None else said)


@pytest.mark.parametrize("forward", ["x", "*args"])
@pytest.mark.parametrize(
    "source", ["def preprocess(x, **kwargs): return 2 * x", "def postprocess(x, **kwargs): return 2 * x"]
)
def test_a_processor_passes_one_tensor_with_and_without_names(tmp_path: Path, forward: str, source: str) -> None:
    result = "args[0]" if forward == "*args" else forward
    body = f"class create_model(torch.nn.Module):\n    def forward(self, {forward}): return 3 * {result}"
    (write_eager(tmp_path / "m", body) / "processor.py").write_text(source)

    async def main() -> Any:
        models = repository(tmp_path, processor=Processor)
        await models.start()
        try:
            return (await answer(models.models["m"], Request(payload={"x": X}, form=Form.TENSORS, model="m"))).payload
        finally:
            await models.close()

    assert asyncio.run(main())["output"].tolist() == (6 * X).tolist()


# Outputs


@pytest.mark.parametrize(("result", "name"), [("{'a': {'b': x}, 'a_b': x + 1}", "a_b"), ("{0: x, '0': x + 1}", "0")])
@pytest.mark.parametrize("kind", ["eager", "exported"])
def test_outputs_of_one_name_are_refused(tmp_path: Path, kind: str, result: str, name: str) -> None:
    source = f"class create_model(torch.nn.Module):\n    def forward(self, x): return {result}"
    write_eager(tmp_path, source)
    said = f'two outputs have the name "{name}"'
    if kind == "eager":
        model = load(tmp_path)
        with pytest.raises(TypeError, match=said):
            call(model, {"x": X})
        return
    with imports_from(tmp_path):
        module = __import__("model").create_model()
    (tmp_path / "weights.pth").unlink()
    torch.export.save(torch.export.export(module, (torch.ones(2, 3),)), tmp_path / "model.pt2")
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    class Meets(nn.Module):
        def forward(self, a, a_b):  # type: ignore[no-untyped-def]
            return a["b"] + a_b

    program = torch.export.export(Meets(), ({"b": torch.ones(2)}, torch.ones(2)))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(ModelError, match="two inputs of the program have the same name; it takes a_b, a_b"):
        load(tmp_path)
