"""A handler sees the same of a request whose kind is known, and what it does to one request changes no other."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

OIP = PROTOCOLS["openinference"]
BATCHING = pytest.mark.parametrize("toml", ["", "[batching]\nenabled = false"])
TIMES = 5


class Asked:
    """A model "m" that is asked."""

    def __init__(self, repository: Repository) -> None:
        self.served = repository.models["m"]

    async def __call__(self, protocol: str, **request: Any) -> Response:
        spoken = PROTOCOLS[protocol]
        body = spoken.codec.encode_request(Request(model="m", **request))
        return spoken.codec.decode_response(await answered(self.served, spoken, body))


@asynccontextmanager
async def asked(folder: Path, handler: type[Handler], toml: str, inputs: Mapping[str, Any]) -> AsyncIterator[Asked]:
    FakeBackend.write(folder / "m" / "1", inputs=inputs)
    (folder / "m" / "model.toml").write_text(f'handler = "it"\n{toml}', encoding="utf-8")
    repository = Repository(folder, backends={"fake": FakeBackend()}, handlers={"it": handler})
    await repository.start()
    assert repository.models["m"].ready
    try:
        yield Asked(repository)
    finally:
        await repository.close()


X = {"x": ["float64", [None, None]]}
A_AND_B = {"a": ["float32", [None, None]], "b": ["float32", [None, None]]}


def two(number: float) -> dict[str, Any]:
    """Inputs in another order than the model's."""
    return {"b": np.full((1, 2), 1.5, np.float32), "a": np.full((1, 2), number, np.float32)}


@BATCHING
async def test_a_tag_that_a_handler_adds_is_of_its_own_request(tmp_path: Path, toml: str) -> None:
    class Tagging(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            assert isinstance(request.tags, dict)
            request.tags["score"] = float(outputs["x"][0, 0])
            return outputs

    async with asked(tmp_path, Tagging, toml, X) as ask:
        for number in range(TIMES):
            answer = await ask("seldon", payload=np.full((1, 3), number + 0.125), form=Form.TENSOR, tags={"user": "u"})
            assert isinstance(answer.payload, np.ndarray)
            assert answer.tags["score"] == answer.payload[0, 0]


@BATCHING
async def test_what_is_known_of_a_kind_keeps_no_request(tmp_path: Path, toml: str) -> None:
    calls: list[weakref.ref[Any]] = []

    class Seeing(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            calls.append(weakref.ref(request.call))
            return outputs

    async with asked(tmp_path, Seeing, toml, X) as ask:
        for width in range(1, 1 + TIMES):
            await ask("openinference", payload={"x": np.zeros((1, width))}, form=Form.TENSORS)
        async with asyncio.timeout(10):
            while any(call() is not None for call in calls):
                gc.collect()
                await asyncio.sleep(0.01)
    assert len(calls) == TIMES


@BATCHING
async def test_inputs_come_in_the_signatures_order(tmp_path: Path, toml: str) -> None:
    class Subtracting(Handler):
        def run_batch(self, model: Any, inputs: Any, requests: Any) -> Any:
            first, second = inputs.values()
            return {"difference": first - second}

    async with asked(tmp_path, Subtracting, toml, A_AND_B) as ask:
        for number in range(TIMES):
            answer = await ask("openinference", payload=two(number), form=Form.TENSORS_RAW)
            assert isinstance(answer.payload, Mapping)
            assert answer.payload["difference"].tolist() == [[number - 1.5] * 2]


@BATCHING
async def test_a_request_keeps_what_is_taken_out_of_the_inputs(tmp_path: Path, toml: str) -> None:
    class Taking(Handler):
        def run_batch(self, model: Any, inputs: Any, requests: Any) -> Any:
            return {"a": inputs.pop("a") + inputs.pop("b")}

        def postprocess(self, outputs: Any, request: Request) -> Any:
            assert isinstance(request.payload, Mapping)
            return {"sum": outputs["a"], "b": request.payload["b"]}

    async with asked(tmp_path, Taking, toml, A_AND_B) as ask:
        for number in range(TIMES):
            answer = await ask("openinference", payload=two(number), form=Form.TENSORS_RAW)
            assert isinstance(answer.payload, Mapping)
            assert answer.payload["sum"].tolist() == [[number + 1.5] * 2]
            assert answer.payload["b"].tolist() == [[1.5, 1.5]]


@BATCHING
async def test_outputs_by_no_name_are_answered_every_time(tmp_path: Path, toml: str) -> None:
    class Nameless(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            return {None: outputs["x"]}

    async with asked(tmp_path, Nameless, toml, X) as ask:
        for number in range(TIMES):
            answer = await ask("openinference", payload={"x": np.full((1, 2), number + 0.5)}, form=Form.TENSORS_RAW)
            assert isinstance(answer.payload, Mapping)
            assert [array.tolist() for array in answer.payload.values()] == [[[number + 0.5] * 2]]


@BATCHING
async def test_numbers_that_a_model_cannot_hold_are_refused_every_time(tmp_path: Path, toml: str) -> None:
    """What is converted depends on the numbers, whatever was found out of others."""
    async with asked(tmp_path, Handler, toml, {"x": ["int32", [None, None]]}) as ask:
        for _ in range(TIMES):
            answer = await ask("seldon", payload=np.array([[7.0]]), form=Form.TENSOR)
            assert isinstance(answer.payload, np.ndarray)
            assert answer.payload.tolist() == [[7]]
            with pytest.raises(BadRequest, match=r"does not take the value 7\.5"):
                await ask("seldon", payload=np.array([[7.5]]), form=Form.TENSOR)


@BATCHING
async def test_an_integer_that_seldon_cannot_hold_is_refused_every_time_and_typed_protocols_hold_it(
    tmp_path: Path, toml: str
) -> None:
    class Ids(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            return {"id": outputs["x"].astype(np.int64) + 2**53}

    async with asked(tmp_path, Ids, toml, X) as ask:
        odd, even = np.array([[1.0]]), np.array([[2.0]])
        for _ in range(TIMES):
            for form in (Form.TENSOR, Form.NDARRAY):
                answer: Any = await ask("seldon", payload=even, form=form)
                assert answer.payload.tolist() == [[2**53 + 2]]
                with pytest.raises(BadRequest, match="the answer holds the integer 9007199254740993"):
                    await ask("seldon", payload=odd, form=form)
            answer = await ask("seldon", payload=odd, form=Form.TFTENSOR)
            assert answer.payload.tolist() == [[2**53 + 1]]
            for protocol in ("tfserving", "openinference"):
                answer = await ask(protocol, payload={"x": odd}, form=Form.TENSORS)
                assert answer.payload["id"].tolist() == [[2**53 + 1]]


@BATCHING
async def test_a_shape_that_does_not_fit_is_refused_every_time(tmp_path: Path, toml: str) -> None:
    async with asked(tmp_path, Handler, toml, {"x": ["float32", [None, 2]]}) as ask:
        payload = {"x": np.full((1, 3), 0.5, np.float32)}
        for _ in range(TIMES):
            with pytest.raises(BadRequest, match="does not take shape"):
                await ask("openinference", payload=payload, form=Form.TENSORS_RAW)


@BATCHING
async def test_requests_of_one_kind_in_several_protocols_are_answered_alike(tmp_path: Path, toml: str) -> None:
    """Numbers without a dtype of their own take the model's; those with a dtype do not."""
    async with asked(tmp_path, Handler, toml, {"x": ["float32", [None, 2]]}) as ask:
        for number in range(TIMES):
            single = np.full((1, 2), number + 0.5, np.float32)
            for form in (Form.TENSORS_RAW, Form.TENSORS):
                answer = await ask("openinference", payload={"x": single}, form=form)
                assert isinstance(answer.payload, Mapping)
                np.testing.assert_array_equal(answer.payload["x"], single)
            answer = await ask("seldon", payload=single.astype(np.float64), form=Form.TENSOR)
            np.testing.assert_array_equal(answer.payload, single)
            with pytest.raises(BadRequest, match="does not take dtype float64"):
                await ask("openinference", payload={"x": single.astype(np.float64)}, form=Form.TENSORS_RAW)


@BATCHING
async def test_more_kinds_than_are_known_at_one_time_are_answered(tmp_path: Path, toml: str) -> None:
    async with asked(tmp_path, Handler, toml, X) as ask:
        for columns in (*range(1, 300), *range(1, 5)):
            sent = np.arange(columns, dtype=np.float64)[None]
            answer = await ask("openinference", payload={"x": sent}, form=Form.TENSORS_RAW)
            assert isinstance(answer.payload, Mapping)
            np.testing.assert_array_equal(answer.payload["x"], sent)
