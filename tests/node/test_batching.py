"""Requests that share a call of the model: what they share, and that none of them ever harms another."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dl_inference_core.config import NamedModel, PluginOptions
from dl_inference_core.errors import (
    BadRequest,
    Code,
    DeadlineExceeded,
    HandlerFailed,
    ModelError,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
)
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.backend import Signature, TensorSpec
from dl_inference_core.node.batcher import BatchCost, RecentConcurrency
from dl_inference_core.node.batching import Batching, BatchingConfig, Bucket, NotRowwise
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.loading import Loader
from dl_inference_core.node.model import ServedModel
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import DEFAULT_SIGNATURE, Form, Request, Tensor
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import MemoryExchange, answered
from dl_inference_core.transport import Exchange, Reply
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS
from dl_inference_core.wire.routing_keys import RoutingKey

OIP = PROTOCOLS["openinference"]
POISON = 666.0


class HeldModel(FakeModel):
    """Doubles; once `hold` is cleared each call waits until it is set again. A row with `POISON` fails."""

    def __init__(self, signature: Signature) -> None:
        super().__init__(2, signature)
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
        self.entered.release()
        assert self.hold.wait(10)
        outputs = super().__call__(inputs, signature)
        if any(np.any(np.isclose(value, POISON)) for value in inputs.values() if value.dtype.kind == "f"):
            raise RuntimeError("poisoned")
        return outputs

    @property
    def sizes(self) -> list[int]:
        """The rows of each call so far."""
        return [len(next(iter(call.values()))) for call in self.calls]


class HeldBackend(FakeBackend):
    """As `FakeBackend`, with models that can be held."""

    name = "held"

    def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
        model = HeldModel(super().load(directory, options, device).signature)
        self.models[-1] = model
        return model


class Scene:
    """A model "m" on one thread, and what it was called with after it was loaded."""

    def __init__(self, served: ServedModel, *models: HeldModel) -> None:
        self.served = served
        self.model = models[0]
        for model in models:
            model.calls.clear()
            model.entered = threading.Semaphore(0)

    async def ask(self, *rows: float, name: str = "x", dtype: Any = np.float32, wide: int = 1, **more: Any) -> Any:
        """The answer to a request of those rows, each so many times the same number."""
        deadline = more.pop("deadline", None)
        metadata = more.pop("metadata", ())
        payload = {name: np.repeat(np.array(rows, dtype)[:, None], wide, axis=1)}
        body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m", **more))
        answer = await answered(self.served, OIP, body, metadata=metadata, deadline=deadline)
        payload = OIP.codec.decode_response(answer).payload
        assert isinstance(payload, dict)
        return payload[name][:, 0].tolist()

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Meanwhile the thread has a request in hand, alone."""
        self.model.entered = threading.Semaphore(0)
        self.model.hold.clear()
        first = asyncio.create_task(self.ask(0))
        await asyncio.to_thread(self.model.entered.acquire)
        try:
            yield
        finally:
            self.model.hold.set()
        await first

    async def together(self, *asked: Awaitable[Any]) -> list[Any]:
        """What becomes of requests that wait for the thread together."""
        async with self.busy():
            tasks = [asyncio.ensure_future(each) for each in asked]
            await self.queued(len(tasks))
        return await asyncio.gather(*tasks, return_exceptions=True)

    def takes(self, seconds: float) -> None:
        """From now on it is known that a request takes so long."""
        for _ in range(100):
            self.cost.learn(1, seconds)

    @property
    def cost(self) -> Any:
        return self.served.loaded[1]._cost

    async def queued(self, count: int) -> None:
        version = self.served.loaded[1]
        async with asyncio.timeout(10):
            while version.waiting() < count:  # noqa: ASYNC110 - a queue has no event
                await asyncio.sleep(0.001)


@asynccontextmanager
async def scene(
    folder: Path,
    toml: str = "",
    handler: type[Handler] = Handler,
    shape: Sequence[int | None] | None = (None, None),
    metrics: Metrics | None = None,
) -> AsyncIterator[Scene]:
    specs = {"x": ["float32", list(shape)]} if shape is not None else {}
    FakeBackend.write(folder / "m" / "1", inputs=specs)
    (folder / "m" / "model.toml").write_text(f'handler = "it"\n{toml}', encoding="utf-8")
    backend = HeldBackend()
    repository = Repository(folder, backends={"held": backend}, handlers={"it": handler}, metrics=metrics)
    await repository.start()
    assert repository.models["m"].ready, repository.models["m"].versions
    assert isinstance(backend.models[0], HeldModel)
    try:
        yield Scene(repository.models["m"], backend.models[0])
    finally:
        await repository.close()


async def test_what_waits_shares_one_call_and_each_gets_its_own_rows(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        answers = await it.together(it.ask(1), it.ask(2, 3), it.ask(4, 5, 6))
        assert answers == [[2], [4, 6], [8, 10, 12]]
        assert it.model.sizes == [1, 6]


async def test_outputs_of_one_number_for_each_row_are_taken_apart(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    class Flat(Handler):
        shares_calls = True

        def run_batch(self, model: Any, inputs: Any, requests: Sequence[Request]) -> Any:
            return {"x": super().run_batch(model, inputs, requests)["x"][:, 0]}

        def postprocess(self, outputs: Any, request: Request) -> Any:
            shapes.append(outputs["x"].shape)
            return {"x": outputs["x"][:, None]}

    async with scene(tmp_path, handler=Flat) as it:
        assert await it.together(it.ask(1), it.ask(2)) == [[2], [4]]
        assert await it.together(it.ask(1), it.ask(2, 3)) == [[2], [4, 6]]
        assert shapes[-6:] == [(1,), (1,), (1,), (1,), (1,), (2,)]


async def test_exchanges_of_two_kinds_share_a_batch_and_each_kind_answers_its_own(tmp_path: Path) -> None:
    """As those of gRPC and of HTTP, of one transport."""
    replied: list[tuple[type[Exchange], int]] = []

    class Kind(MemoryExchange):
        @classmethod
        def reply_all(cls, replies: Sequence[Reply]) -> None:
            replied.append((cls, len(replies)))
            assert {type(exchange) for exchange, _, _ in replies} == {cls}
            super().reply_all(replies)

    class Other(Kind):
        pass

    async with scene(tmp_path) as it:
        async with it.busy():
            exchanges: list[MemoryExchange] = []
            for number, kind in enumerate((Kind, Other, Kind)):
                payload = {"x": np.array([[number]], np.float32)}
                body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
                exchanges.append(kind(OIP.node_method, body))
                it.served.begin_all(exchanges[-1:], OIP, OIP.read_key(body))
            assert it.served.waiting() == 3
        for number, exchange in enumerate(exchanges):
            outputs = OIP.codec.decode_response(bytes(await exchange.outcome())).payload
            assert isinstance(outputs, dict)
            assert outputs["x"].tolist() == [[2 * number]]
        assert it.model.sizes == [1, 3]
        assert [count for kind, count in replied if kind is Kind] == [2]
        assert [count for kind, count in replied if kind is Other] == [1]


async def test_of_requests_that_come_together_one_that_is_malformed_fails_alone(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        exchanges = []
        for number in range(3):
            request = messages.ModelInferRequest(model_name="m")
            if number == 1:
                request.parameters["timeout"].int64_param = -1
            else:
                request.parameters["timeout"].int64_param = 10_000_000
            payload = {"x": np.array([[number]], np.float32)}
            body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
            exchanges.append(MemoryExchange(OIP.node_method, body + request.SerializeToString()))
        async with it.busy():
            it.served.begin_all(exchanges, OIP, OIP.read_key(exchanges[0].message))
            assert it.served.waiting() == 2
        with pytest.raises(BadRequest, match="timeout"):
            await exchanges[1].outcome()
        for number in (0, 2):
            outputs = OIP.codec.decode_response(bytes(await exchanges[number].outcome())).payload
            assert isinstance(outputs, dict)
            assert outputs["x"].tolist() == [[2 * number]]
        assert it.model.sizes == [1, 2]


async def test_requests_that_come_together_for_a_version_that_is_not_there_are_all_told_so(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        exchanges = [MemoryExchange(OIP.node_method, b"") for _ in range(2)]
        it.served.begin_all(exchanges, OIP, RoutingKey("m", 7))
        for exchange in exchanges:
            with pytest.raises(ModelNotFound):
                await exchange.outcome()


async def test_of_requests_that_fail_together_one_carries_the_report_of_the_load() -> None:
    report, counted = (("endpoint-load-metrics-bin", b"report"),), []

    class Meter(LoadMeter):
        def answered(self, error: Any = None, *, count: int = 1) -> Any:
            counted.append(count)
            return report

    exchanges = [MemoryExchange(OIP.node_method, b"") for _ in range(2)]
    ServedModel("m", Meter()).begin_all(exchanges, OIP, RoutingKey("m"))
    errors = [exchange.error for exchange in exchanges]
    assert [type(error) for error in errors] == [ModelNotReady, ModelNotReady]
    assert [error.trailers for error in errors if error is not None] == [report, ()]
    assert counted == [2]


async def test_rows_are_counted_not_requests(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        answers = await it.together(it.ask(1, 1, 1), it.ask(2, 2), it.ask(3, 3), it.ask(4))
        assert answers == [[2, 2, 2], [4, 4], [6, 6], [8]]
        assert max(it.model.sizes) <= 4
        assert sum(it.model.sizes) == 1 + 8


async def test_a_request_larger_than_a_batch_is_answered_in_pieces(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        assert await it.ask(*range(10)) == [2.0 * n for n in range(10)]
        assert it.model.sizes == [4, 4, 2]


async def test_a_request_in_pieces_ends_with_its_client(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        it.model.hold.clear()
        leaving = asyncio.create_task(it.ask(*range(100)))
        await asyncio.to_thread(it.model.entered.acquire)
        leaving.cancel()
        await asyncio.wait((leaving,))
        it.model.hold.set()
        assert await it.ask(1) == [2]
        assert it.model.sizes == [4, 1]


async def test_a_request_in_pieces_ends_with_its_deadline(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        it.model.sleep_s = 0.1
        with pytest.raises(DeadlineExceeded, match="between two calls of model"):
            await it.ask(*range(100), deadline=time.monotonic() + 0.3)
        assert len(it.model.sizes) < 25


async def test_a_client_that_keeps_failing_gets_batches_of_its_own(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        bad = (("x-client-id", "bad"),)
        for _ in range(3):
            with pytest.raises(HandlerFailed, match="poisoned"):
                await it.ask(POISON, metadata=bad)
        it.model.calls.clear()
        answers = await it.together(it.ask(1), it.ask(POISON, metadata=bad), it.ask(3), it.ask(4, metadata=bad))
        assert [answers[0], *answers[2:]] == [[2], [6], [8]]
        assert it.model.sizes == [1, 2, 2, 1, 1], "the two of the bad client are tried together, then each alone"


async def test_a_client_that_keeps_leaving_shares_batches_as_before(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        hasty = (("x-client-id", "hasty"),)
        for _ in range(3):
            it.model.hold.clear()
            leaving = asyncio.create_task(it.ask(*range(100), metadata=hasty))
            await asyncio.to_thread(it.model.entered.acquire)
            leaving.cancel()
            await asyncio.wait((leaving,))
            it.model.hold.set()
        assert await it.together(it.ask(1), it.ask(2, metadata=hasty)) == [[2], [4]]
        assert it.model.sizes == [4, 4, 4, 1, 2]


@pytest.mark.parametrize(
    ("toml", "rows", "calls", "counted"),
    [
        ("max_rows = 4", (10,), [4, 4, 2], 10),
        ("max_rows = 4", (2, 2, 2), [1, 4, 2], 7),  # and the one that keeps the thread busy
        ("max_rows = 4\nallowed_rows = [4]", (3,), [4], 3),
    ],
)
async def test_each_call_of_the_model_is_counted_with_the_rows_of_requests_in_it(
    tmp_path: Path, toml: str, rows: tuple[int, ...], calls: list[int], counted: int
) -> None:
    metrics = Metrics()
    async with scene(tmp_path, f"[batching]\n{toml}", metrics=metrics) as it:
        if len(rows) > 1:
            await it.together(*(it.ask(*range(count)) for count in rows))
        else:
            await it.ask(*range(rows[0]))
        assert it.model.sizes == calls
        said = metrics.render("")[0].decode()
    assert f'dl_inference_batch_rows_count{{model="m"}} {float(len(calls))}' in said
    assert f'dl_inference_batch_rows_sum{{model="m"}} {float(counted)}' in said


async def test_by_itself_a_model_is_given_a_large_request_whole(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        assert await it.ask(*range(100)) == [2.0 * n for n in range(100)]
        assert it.model.sizes == [100]


async def test_with_a_handler_of_one_request_at_a_time_none_share(tmp_path: Path) -> None:
    class One(Handler):
        def run_model(self, model: Any, inputs: Any, request: Request) -> Any:
            return super().run_model(model, inputs, request)

    async with scene(tmp_path, handler=One) as it:
        assert await it.together(it.ask(1), it.ask(2)) == [[2], [4]]
        assert it.model.sizes == [1, 1, 1]


async def test_a_handler_of_batches_is_given_all_their_requests(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Batches(Handler):
        def run_batch(self, model: Any, inputs: Any, requests: Sequence[Request]) -> Any:
            seen.append([request.id for request in requests])
            return super().run_batch(model, {"x": inputs["x"] + 1}, requests)

    async with scene(tmp_path, handler=Batches) as it:
        seen.clear()
        assert await it.together(it.ask(1, id="a"), it.ask(2, id="b")) == [[4], [6]]
        assert seen == [[""], ["a", "b"]]


@pytest.mark.parametrize("config", ["max_rows = 1", "enabled = false", "max_rows = 1\nmax_delay_us = 5"])
async def test_batching_can_be_switched_off(tmp_path: Path, config: str) -> None:
    async with scene(tmp_path, f"[batching]\n{config}") as it:
        assert await it.together(it.ask(1), it.ask(2)) == [[2], [4]]
        assert it.model.sizes == [1, 1, 1]


async def test_requests_of_other_shapes_never_share(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        answers = await it.together(it.ask(1), it.ask(2, wide=2), it.ask(3), it.ask(4, wide=2))
        assert answers == [[2], [4], [6], [8]]
        assert it.model.sizes == [1, 2, 2]
        assert {call["x"].shape for call in it.model.calls[1:]} == {(2, 1), (2, 2)}


def test_what_requests_of_one_batch_have_in_common() -> None:
    batching = Batching(BatchingConfig(), np.concatenate, ["serving_default", "other"])

    def key(name: str = "x", dtype: Any = np.float32, wide: int = 2, signature: str = "") -> Any:
        request = Request(payload={}, form=Form.TENSORS, signature=signature)
        part = batching.part(object(), request, {name: np.zeros((3, wide), dtype)})
        return part.key

    assert key() == key() == key(signature="serving_default")
    others = [key("y"), key(dtype=np.float64), key(wide=3), key(signature="other")]
    assert len({key(), *others}) == 5
    assert key(signature="none of those") != key(signature="none of those")


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        None,
        b"bytes",
        {"x": np.float32(1)},
        {"x": np.zeros((2, 1)), "y": np.zeros((3, 1))},
        {"x": [1, 2]},
        {"x": np.zeros((0, 3))},
    ],
    ids=repr,
)
def test_what_has_no_common_rows_is_run_alone(inputs: Any) -> None:
    batching = Batching(BatchingConfig(), np.concatenate)
    parts = [batching.part(object(), Request(payload={}, form=Form.TENSORS), inputs) for _ in range(2)]
    assert list(batching.batches(parts)) == [[parts[0]], [parts[1]]]
    assert batching.run(parts[:1], lambda given: (given,)) == [(inputs,)]


def test_inputs_of_other_shapes_than_a_signature_that_leaves_them_to_the_model_are_run_alone_and_as_they_are() -> None:
    spec = TensorSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 2))
    config = BatchingConfig(max_rows=4, allowed_rows=(2, 4), buckets={"x": Bucket(to=(2,))})
    unchecked = {"left": Signature(inputs=(spec,), checks_shapes=False)}
    batching = Batching(config, np.concatenate, unchecked=unchecked)
    calls: list[Any] = []

    def model(inputs: Any) -> Any:
        calls.append(inputs["x"].shape if hasattr(inputs["x"], "shape") else inputs["x"])
        return inputs

    def parts(signature: str, *inputs: Any) -> list[Any]:
        request = Request(payload={}, form=Form.TENSORS, signature=signature)
        return [batching.part(number, request, {"x": each}) for number, each in enumerate(inputs)]

    fitting, others = np.zeros((1, 2)), [np.zeros(5), np.zeros(5), np.zeros((6, 1)), np.zeros((1, 3)), [1, 2]]
    for batch in batching.batches(parts("left", fitting, *others, fitting)):
        batching.run(batch, model)
    assert calls == [(2, 2), (5,), (5,), (6, 1), (1, 3), [1, 2]]
    calls.clear()
    for batch in batching.batches(parts("checked elsewhere", np.zeros((1, 1)), np.zeros((1, 1)))):
        batching.run(batch, model)
    assert calls == [(2, 2)]


async def test_allowed_rows_are_reached_by_padding_that_nobody_sees(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 8\nallowed_rows = [2, 8]") as it:
        answers = await it.together(it.ask(1), it.ask(2, 3))
        assert answers == [[2], [4, 6]]
        assert it.model.sizes == [2, 8]
        np.testing.assert_array_equal(it.model.calls[1]["x"][:, 0], [1, 2, 3, 3, 3, 3, 3, 3])


async def test_a_batch_that_is_not_full_is_held_for_others(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 3\nmax_delay_us = 9_000_000") as it:
        first = asyncio.create_task(it.ask(1))
        await asyncio.sleep(0.02)
        assert not it.model.calls
        assert await asyncio.gather(it.ask(2), it.ask(3)) == [[4], [6]]
        assert await first == [2]
        assert it.model.sizes == [3]


async def test_a_batch_of_preferred_rows_is_not_held(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000\npreferred_rows = [2]") as it:
        assert await asyncio.gather(it.ask(1), it.ask(2)) == [[2], [4]]
        assert it.model.sizes == [2]


async def test_a_batch_is_held_no_longer_than_its_delay(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 20_000") as it:
        began = time.monotonic()
        assert await it.ask(1) == [2]
        assert time.monotonic() - began >= 0.02


async def test_lengths_in_one_bucket_share_a_call(tmp_path: Path) -> None:
    toml = '[batching.buckets.x]\nto = [4, 16]\nvalue = -1\noutputs = ["x"]'
    async with scene(tmp_path, toml) as it:
        async with it.busy():
            asked = []
            for wide in (2, 3, 20):
                payload = {"x": np.full((1, wide), wide, np.float32)}
                body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
                asked.append(asyncio.create_task(answered(it.served, OIP, body)))
            await it.queued(3)
        for wide, answer in zip((2, 3, 20), await asyncio.gather(*asked), strict=True):
            payload = OIP.codec.decode_response(answer).payload
            assert isinstance(payload, dict)
            np.testing.assert_array_equal(payload["x"], np.full((1, wide), 2 * wide, np.float32))
        assert [call["x"].shape for call in it.model.calls[1:]] == [(2, 4), (1, 20)]
        np.testing.assert_array_equal(it.model.calls[1]["x"], [[2, 2, -1, -1], [3, 3, 3, -1]])


# Nobody harms the others of a batch.


async def test_a_cancelled_request_never_touches_its_batch_mates(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        async with it.busy():
            gone, *others = (asyncio.create_task(it.ask(number)) for number in (1, 2, 3))
            await it.queued(3)
            gone.cancel()
            await asyncio.sleep(0)
        assert await asyncio.gather(*others) == [[4], [6]]
        assert gone.cancelled()
        assert it.model.sizes == [1, 2]


async def test_a_request_cancelled_in_the_midst_of_the_call_never_touches_its_batch_mates(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 3\nmax_delay_us = 9_000_000") as it:
        it.model.hold.clear()
        gone, *others = (asyncio.create_task(it.ask(number)) for number in (1, 2, 3))
        await asyncio.to_thread(it.model.entered.acquire)
        gone.cancel()
        await asyncio.sleep(0)
        it.model.hold.set()
        assert await asyncio.gather(*others) == [[4], [6]]
        assert gone.cancelled()
        assert it.model.sizes == [3]


async def test_an_expired_request_is_dropped_before_the_call_and_never_touches_its_batch_mates(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        async with it.busy():
            late = asyncio.create_task(it.ask(1, deadline=time.monotonic() + 0.02))
            others = [asyncio.create_task(it.ask(number)) for number in (2, 3)]
            await it.queued(3)
            await asyncio.sleep(0.03)
        assert await asyncio.gather(*others) == [[4], [6]]
        with pytest.raises(DeadlineExceeded, match='queue of model "m"'):
            await late
        assert it.model.sizes == [1, 2]


async def test_a_malformed_request_never_touches_its_batch_mates(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        torn = answered(
            it.served, OIP, messages.ModelInferRequest(model_name="m").SerializeToString() + b"\x2a\x01\xff"
        )
        wrong = it.ask(1, name="y")
        answers = await it.together(it.ask(2), torn, it.ask(3), wrong)
        assert [answers[0], answers[2]] == [[4], [6]]
        assert isinstance(answers[1], BadRequest)
        assert isinstance(answers[3], BadRequest)
        assert it.model.sizes == [1, 2]


async def test_a_poisonous_request_fails_alone(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        answers = await it.together(it.ask(1), it.ask(POISON), it.ask(3))
        assert [answers[0], answers[2]] == [[2], [6]]
        assert isinstance(answers[1], HandlerFailed)
        assert "run_model failed: RuntimeError: poisoned" in str(answers[1])
        assert it.model.sizes == [1, 3, 1, 2, 1, 1]


async def test_of_many_a_poisonous_one_is_found_by_halves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with scene(tmp_path) as it:
        rows = [float(number) for number in range(64)]
        rows[37] = POISON
        answers = await it.together(*(it.ask(row) for row in rows))
        assert [answer for answer in answers if not isinstance(answer, Exception)] == [
            [2 * row] for row in rows if row != POISON
        ]
        assert isinstance(answers[37], HandlerFailed)
        assert len(it.model.sizes) == 1 + 1 + 2 * 6  # the one that held the thread, all 64, and both halves six times
        (record,) = caplog.records
        assert (record.exc_text or "").count("Traceback (most recent") == 2, (
            "the failure and its cause, of its own call alone"
        )


@pytest.mark.parametrize("stage", ["preprocess", "postprocess"])
async def test_a_request_that_its_handler_fails_for_never_touches_its_batch_mates(tmp_path: Path, stage: str) -> None:
    class Picky(Handler):
        shares_calls = True

        def preprocess(self, request: Request) -> Any:
            if stage == "preprocess" and request.id == "bad":
                raise SystemExit(3)
            return super().preprocess(request)

        def postprocess(self, outputs: Any, request: Request) -> Any:
            if stage == "postprocess" and request.id == "bad":
                raise KeyError("k")
            return super().postprocess(outputs, request)

    async with scene(tmp_path, handler=Picky) as it:
        answers = await it.together(it.ask(1), it.ask(2, id="bad"), it.ask(3))
        assert [answers[0], answers[2]] == [[2], [6]]
        assert isinstance(answers[1], HandlerFailed)
        assert f"{stage} failed" in str(answers[1])


async def test_a_session_that_fails_is_answered_and_the_thread_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path) as it:
        with monkeypatch.context() as patched:
            patched.setattr(it.model, "session", lambda: 1 / 0)
            with pytest.raises(HandlerFailed, match="ZeroDivisionError"):
                await it.ask(1)
        assert await it.ask(1) == [2]


async def test_outputs_that_cannot_be_taken_apart_cost_a_call_each_and_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mean(Handler):
        def run_batch(self, model: Any, inputs: Any, requests: Sequence[Request]) -> Any:
            outputs = super().run_batch(model, inputs, requests)
            return {"x": outputs["x"][:1]} if self.lies else outputs

        lies = False

    async with scene(tmp_path, handler=Mean) as it:
        Mean.lies = True
        assert await it.together(it.ask(1), it.ask(2), it.ask(3)) == [[2], [4], [6]]
        (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert 'output "x" has the shape [1, 1] for inputs of 3 rows' in error.getMessage()
        assert it.model.sizes == [1, 3, 1, 1, 1]
        assert await it.together(it.ask(1), it.ask(2)) == [[2], [4]]
        assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


async def test_answers_that_share_no_call_wait_for_no_others(tmp_path: Path) -> None:
    first_is_answered = threading.Event()

    class Alone(Handler):
        shares_calls = True

        def preprocess(self, request: Request) -> Any:
            return {**super().preprocess(request), "y": np.zeros((7, 1))}

        def postprocess(self, outputs: Any, request: Request) -> Any:
            assert request.id != "second" or first_is_answered.wait(10)
            return super().postprocess(outputs, request)

    async with scene(tmp_path, "[batching]", handler=Alone, shape=None) as it:
        async with it.busy():
            first, second = (asyncio.create_task(it.ask(1, id=name)) for name in ("first", "second"))
            await it.queued(2)
        assert await first == [2]
        first_is_answered.set()
        assert await second == [2]


async def test_what_needs_no_model_is_told_at_once_while_others_are_held(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000\nmax_rows = 3") as it:
        held = asyncio.create_task(it.ask(1))
        await asyncio.sleep(0.01)
        with pytest.raises(BadRequest):
            async with asyncio.timeout(5):
                await it.ask(1, name="y")
        assert await it.ask(2) == [4]
        assert await held == [2]


async def test_a_request_is_not_held_beyond_its_deadline(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000") as it:
        assert await it.ask(1, deadline=time.monotonic() + 1) == [2]


@pytest.mark.parametrize("clients", [1, 3])
async def test_none_is_held_for_more_than_there_are(tmp_path: Path, clients: int) -> None:
    """Each client sends its next request when it has its answer."""
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000") as it:
        lately = it.served.loaded[1]._queue._concurrency
        # On a busy machine a client may come later than the second that is looked at.
        lately._before, lately._window_ends = clients, math.inf

        async def client() -> list[list[float]]:
            return [await it.ask(number) for number in range(20)]

        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(client() for _ in range(clients)))
        assert answers == [[[2 * number] for number in range(20)]] * clients
        assert it.model.sizes == [clients] * 20


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_that_has_its_answer_is_not_counted_beside_its_next_request(tmp_path: Path, fails: bool) -> None:
    """A client's next request may come before the model thread has ended the batch with its last one."""
    left = [3]
    ended: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    class Client(MemoryExchange):
        def _ended(self, code: Code) -> None:
            super()._ended(code)
            left[0] -= 1
            if left[0]:
                send()
            else:
                loop.call_soon_threadsafe(ended.put_nowait, None)

    def send() -> None:
        payload = {"x": np.array([[POISON if fails else 1]], np.float32)}
        body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
        it.served.begin_all([Client(OIP.node_method, body)], OIP, OIP.read_key(body))

    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000") as it:
        lately = it.served.loaded[1]._queue._concurrency
        lately._before, lately._window_ends = 1, math.inf
        send()
        async with asyncio.timeout(8):
            await ended.get()
        assert it.model.sizes == [1, 1, 1]
        assert lately.most == 1


def test_how_many_were_here_at_once_lately() -> None:
    crowd = RecentConcurrency()
    assert crowd.most == math.inf
    for count, now in ((3, 10.0), (5, 10.5), (4, 10.9)):
        crowd.observe(count, now)
    assert crowd.most == math.inf, "it is early to say"
    crowd.observe(2, 11.1)
    assert crowd.most == 5
    crowd.observe(1, 12.2)
    assert crowd.most == 2
    crowd.observe(7, 12.3)
    assert crowd.most == 7


async def test_who_cannot_be_held_ends_it_for_all(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000") as it:
        held = asyncio.create_task(it.ask(1))
        await asyncio.sleep(0.02)
        assert await it.ask(2, deadline=time.monotonic() + 1) == [4]
        assert await held == [2]


async def test_what_is_held_is_answered_before_the_version_goes(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 9_000_000") as it:
        held = asyncio.create_task(it.ask(1))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            await it.served.loaded[1].close()
        assert await held == [2]


async def test_to_be_held_is_no_work(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 200_000") as it:
        before = it.served.loaded[1]._threads.worked()
        await it.ask(1)
        assert it.cost.seconds(1) < 0.1
        assert it.served.loaded[1]._threads.worked() - before < 0.1


async def test_threads_do_not_share_out_what_is_held(tmp_path: Path) -> None:
    async with scene(tmp_path, "threads = 4\n[batching]\nmax_delay_us = 9_000_000\nmax_rows = 4") as it:
        answers = await asyncio.gather(*(it.ask(number) for number in range(8)))
        assert answers == [[2 * number] for number in range(8)]
        assert it.model.sizes == [4, 4]


async def test_what_waits_behind_a_slow_preprocess_is_left_to_a_thread_that_is_free(tmp_path: Path) -> None:
    go = threading.Event()

    class Slow(Handler):
        shares_calls = True

        def preprocess(self, request: Request) -> Any:
            inputs = super().preprocess(request)
            assert inputs["x"][0, 0] >= 0 or go.wait(20)
            return inputs

    async with scene(tmp_path, "threads = 2", handler=Slow) as it:
        it.model.hold.clear()
        busy = []
        for number in range(2):
            busy.append(asyncio.create_task(it.ask(number)))
            await asyncio.to_thread(it.model.entered.acquire)
        asked = [asyncio.create_task(it.ask(number)) for number in (2, -1, 3, 4, 5)]
        await it.queued(5)
        it.model.hold.set()
        try:
            async with asyncio.timeout(10):
                assert await asyncio.gather(*asked[2:]) == [[6], [8], [10]]
            assert not asked[1].done()
        finally:
            go.set()
        assert await asyncio.gather(*busy, *asked[:2]) == [[0], [2], [4], [-2]]


async def test_requests_of_many_rows_that_a_batch_has_no_room_for_are_answered_by_the_next(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        asked = [it.ask(*([number] * 3)) for number in range(1, 6)]
        assert await it.together(*asked) == [[2 * number] * 3 for number in range(1, 6)]
        assert it.model.sizes == [1, *[3] * 5]


async def test_a_padding_that_an_input_cannot_hold_harms_no_other(tmp_path: Path) -> None:
    toml = "[batching.buckets.x]\nto = [4]\nvalue = -1"
    async with scene(tmp_path, toml, shape=None) as it:
        good, bad = await it.together(it.ask(1), it.ask(2, dtype=np.uint8))
        assert good == [2]
        assert isinstance(bad, HandlerFailed)


async def test_an_error_that_cannot_be_told_is_told(tmp_path: Path) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    class Failing(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Any:
            raise Mute

    async with scene(tmp_path, handler=Failing) as it:
        with pytest.raises(HandlerFailed, match="postprocess failed: Mute"):
            await it.ask(1)


async def test_a_free_thread_refuses_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path, "threads = 2") as it, it.busy():
        it.takes(0.9)
        it.model.hold.set()
        assert await it.ask(1, deadline=time.monotonic() + 1) == [2]


async def test_what_was_cancelled_takes_no_room(tmp_path: Path) -> None:
    async with scene(tmp_path, "[queue]\nmax_requests = 2") as it:
        async with it.busy():
            gone = [asyncio.create_task(it.ask(number)) for number in (1, 2)]
            await it.queued(2)
            for task in gone:
                task.cancel()
            await asyncio.sleep(0)
            asked = asyncio.create_task(it.ask(3))
            await it.queued(1)
        assert await asked == [6]


# Bounds.


async def test_too_many_requests_are_refused_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path, "[queue]\nmax_requests = 2") as it:
        async with it.busy():
            asked = [asyncio.create_task(it.ask(number)) for number in (1, 2)]
            await it.queued(2)
            with pytest.raises(Overloaded, match=r"2 requests wait \(max_requests\)"):
                await it.ask(3)
        assert await asyncio.gather(*asked) == [[2], [4]]
        assert await it.ask(3) == [6]


async def test_too_many_bytes_are_refused_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path, "[queue]\nmax_mb = 1") as it:
        large = [1.0] * 200_000
        async with it.busy():
            first = asyncio.create_task(it.ask(*large, *large))
            await it.queued(1)
            with pytest.raises(Overloaded, match="max_mb is 1"):
                await it.ask(1)
        assert len(await first) == 400_000
        assert await it.ask(1) == [2]


async def test_who_would_wait_beyond_a_deadline_is_refused_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 1") as it:
        it.takes(0.5)
        async with it.busy():
            waits = asyncio.create_task(it.ask(1, deadline=time.monotonic() + 20))
            await it.queued(1)
            with pytest.raises(Overloaded, match=r"take 1[234]\d\d ms, beyond its deadline"):
                await it.ask(2, deadline=time.monotonic() + 1.2)
            with pytest.raises(DeadlineExceeded, match="before the request came to the queue of model m"):
                await it.ask(2, deadline=time.monotonic() - 0.001)
            has_time = asyncio.create_task(it.ask(3, deadline=time.monotonic() + 20))
            await it.queued(2)
        assert await asyncio.gather(waits, has_time) == [[2], [6]]


async def test_who_would_wait_for_too_long_is_refused_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_rows = 1\n[queue]\nmax_wait_ms = 250") as it:
        it.takes(0.2)
        async with it.busy():
            first = asyncio.create_task(it.ask(1))
            await it.queued(1)
            with pytest.raises(Overloaded, match=r"wait for [23]\d\d ms"):
                await it.ask(2)
        assert await first == [2]


async def test_a_batch_takes_in_no_more_than_can_be_answered_in_time(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        async with it.busy():
            asked = [asyncio.create_task(it.ask(number, deadline=time.monotonic() + 60)) for number in range(5)]
            await it.queued(5)
            for number in (1, 2) * 50:
                it.cost.learn(number, 20 * number)
        assert await asyncio.gather(*asked) == [[0], [2], [4], [6], [8]]
        assert it.model.sizes[1] in (2, 3)


def test_the_effort_for_a_number_of_requests() -> None:
    effort = BatchCost()
    assert effort.seconds(7) == 0
    for _ in range(50):
        effort.learn(4, 2.0)
    assert [effort.seconds(number) for number in (1, 4, 64)] == [pytest.approx(2.0)] * 3, "more may cost no more"
    for number in (1, 8, 16) * 20:
        effort.learn(number, 1.0 + 0.25 * number)
    assert [effort.seconds(number) for number in (1, 4, 64)] == pytest.approx([1.25, 2.0, 17.0], rel=0.01)


@pytest.mark.parametrize(("fixed", "each", "worthwhile"), [(0.1, 0.2, 4), (0, 1, 1), (8, 1, 64), (5, 0, 1 << 20)])
def test_how_many_are_worth_to_be_taken_at_once(fixed: float, each: float, worthwhile: int) -> None:
    """So many that what a call takes besides is an eighth of what they take."""
    effort = BatchCost()
    for number in (1, 8, 16) * 20:
        effort.learn(number, fixed + each * number)
    assert effort.worthwhile == pytest.approx(worthwhile, abs=1)


async def test_what_is_in_hand_is_waited_for(tmp_path: Path) -> None:
    """Four that were taken together, of a second each."""
    async with scene(tmp_path) as it:
        async with it.busy():
            together = [asyncio.create_task(it.ask(number)) for number in range(4)]
            await it.queued(4)
            for number in (1, 2) * 50:
                it.cost.learn(number, number)
            it.cost.learn = lambda requests, seconds: None
            first, it.model.hold, it.model.entered = it.model.hold, threading.Event(), threading.Semaphore(0)
            first.set()
            await asyncio.to_thread(it.model.entered.acquire)
            with pytest.raises(Overloaded, match=r"take [45]\d\d\d ms, beyond its deadline"):
                await it.ask(1, deadline=time.monotonic() + 2)
        assert await asyncio.gather(*together) == [[0], [2], [4], [6]]


async def test_rows_that_fill_a_batch_are_not_waited_for_as_one(tmp_path: Path) -> None:
    """Three requests wait, each with as many rows as a batch has."""
    async with scene(tmp_path, "[batching]\nmax_rows = 4") as it:
        for _ in range(40):
            await it.ask(1, 2, 3, 4)
        it.takes(1.0)
        async with it.busy():
            waiting = [asyncio.create_task(it.ask(1, 2, 3, 4)) for _ in range(3)]
            await it.queued(3)
            with pytest.raises(Overloaded, match=r"take [34]\d\d\d ms, beyond its deadline"):
                await it.ask(1, 2, 3, 4, deadline=time.monotonic() + 3)
        assert await asyncio.gather(*waiting) == [[2, 4, 6, 8]] * 3


async def test_calls_that_cost_the_same_for_any_number_grow_large(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.model.sleep_s = 0.05

        async def client() -> int:
            answered = 0
            for _ in range(6):
                try:
                    answered += await it.ask(1, deadline=time.monotonic() + 0.3) == [2]
                except (Overloaded, DeadlineExceeded):
                    await asyncio.sleep(0.01)
            return answered

        answered = sum(await asyncio.gather(*(client() for _ in range(16))))
        assert answered > 16 * 6 / 2
        assert max(it.model.sizes) > 8


async def test_how_long_requests_take_is_learned(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.model.sleep_s = 0.02
        for _ in range(3):
            await it.ask(1)
        assert it.cost.seconds(1) >= 0.02


async def test_a_higher_priority_is_served_first_and_takes_a_place_in_a_full_queue(tmp_path: Path) -> None:
    toml = "[batching]\nmax_rows = 1\n[queue]\nmax_requests = 2\npriorities = 3"
    async with scene(tmp_path, toml) as it:
        async with it.busy():
            low = asyncio.create_task(it.ask(1))
            await it.queued(1)
            middle = asyncio.create_task(it.ask(2, metadata=(("x-priority", "2"),)))
            await it.queued(2)
            high = asyncio.create_task(it.ask(3, metadata=(("x-priority", "1"),)))
            with pytest.raises(Overloaded, match="higher priority"):
                await low
            with pytest.raises(Overloaded, match="2 requests wait"):
                await it.ask(4)
        assert await asyncio.gather(middle, high) == [[4], [6]]
        assert [float(call["x"][0, 0]) for call in it.model.calls] == [0, 3, 2]


@pytest.mark.parametrize("value", ["0", "4", "-1", "high", "", "²", pytest.param("1" * 5000, id="5000 digits")])
async def test_a_priority_that_is_none(tmp_path: Path, value: str) -> None:
    async with scene(tmp_path, "[queue]\npriorities = 3") as it:
        with pytest.raises(BadRequest, match="expected 1 to 3"):
            await it.ask(1, metadata=(("x-priority", value),))


async def test_an_open_inference_request_names_its_priority(tmp_path: Path) -> None:
    """By a parameter, as Triton's clients do: 0, or more than there are, is the default. Metadata count before it."""
    async with scene(tmp_path, "[batching]\nmax_rows = 1\n[queue]\npriorities = 3\ndefault_priority = 2") as it:
        asked = [
            it.ask(1, parameters={"priority": 3}),
            it.ask(2, parameters={"priority": 0}),
            it.ask(3, parameters={"priority": 1}),
            it.ask(4),
            it.ask(5, parameters={"priority": 4}),
            it.ask(6, parameters={"priority": 3}, metadata=(("x-priority", "1"),)),
        ]
        assert await it.together(*asked) == [[2], [4], [6], [8], [10], [12]]
        assert [float(call["x"][0, 0]) for call in it.model.calls] == [0, 3, 6, 2, 4, 5, 1]


async def test_a_priority_to_a_model_that_has_none(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        assert await it.ask(1, parameters={"priority": 7}) == [2]
        with pytest.raises(BadRequest, match='"priority" is string_param high; expected a whole number'):
            await it.ask(1, parameters={"priority": "high"})


async def test_a_request_whose_timeout_passes_in_the_queue_is_refused_at_once(tmp_path: Path) -> None:
    """The thread is still busy then; the request never comes as far as the model."""
    async with scene(tmp_path) as it:
        async with it.busy():
            patient = asyncio.create_task(it.ask(1, parameters={"timeout": 60_000_000}))
            await it.queued(1)
            began = time.monotonic()
            with pytest.raises(Overloaded, match=r"^Request timeout expired: the request waited \d+ ms in the queue"):
                await it.ask(2, parameters={"timeout": 30_000})
            assert time.monotonic() - began >= 0.03
            assert not it.model.hold.is_set()
        assert await patient == [2]
        assert [float(call["x"][0, 0]) for call in it.model.calls] == [0, 1]


async def test_a_request_whose_timeout_has_passed_makes_room_in_a_full_queue(tmp_path: Path) -> None:
    async with scene(tmp_path, "[queue]\nmax_requests = 1") as it:
        async with it.busy():
            with pytest.raises(Overloaded, match="Request timeout expired"):
                await it.ask(1, parameters={"timeout": 1000})
            following = asyncio.create_task(it.ask(2))
            await it.queued(1)
        assert await following == [4]


async def test_a_timeout_bounds_the_time_in_the_queue_and_not_that_of_the_model(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.model.hold.clear()
        asked = asyncio.create_task(it.ask(1, parameters={"timeout": 20_000}))
        await asyncio.to_thread(it.model.entered.acquire)
        assert not (await asyncio.wait({asked}, timeout=0.1))[0]
        it.model.hold.set()
        assert await asked == [2]


async def test_a_batch_is_not_held_for_longer_than_a_request_may_wait(tmp_path: Path) -> None:
    async with scene(tmp_path, "[batching]\nmax_delay_us = 10_000_000") as it:
        began = time.monotonic()
        assert await it.ask(1, parameters={"timeout": 200_000}) == [2]
        assert time.monotonic() - began < 8


# Instances.


async def test_every_instance_works_with_a_model_of_its_own(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path / "m" / "1", inputs={"x": ["float32", [None, None]]})
    (tmp_path / "m" / "model.toml").write_text('devices = ["a", "b"]\ninstances = 2\n[batching]\nmax_rows = 1')
    backend = HeldBackend()
    repository = Repository(tmp_path, backends={"held": backend}, handlers={})
    await repository.start()
    models = [model for model in backend.models if isinstance(model, HeldModel)]
    it = Scene(repository.models["m"], *models)
    for model in models:
        model.hold.clear()
    asked = [asyncio.create_task(it.ask(number)) for number in range(1, 5)]
    async with asyncio.timeout(10):
        for model in models:
            await asyncio.to_thread(model.entered.acquire)
    for model in models:
        model.hold.set()
    assert await asyncio.gather(*asked) == [[2], [4], [6], [8]]
    await repository.close()
    assert [len(model.calls) for model in models] == [1, 1, 1, 1]
    assert all(model.closed for model in models)


# Which models batch by themselves.


def load(
    folder: Path,
    model: Callable[[Mapping[str, Any]], dict[str, Tensor]],
    toml: str = "",
    handler: type[Handler] = Handler,
    **spec: Any,
) -> Any:
    """What becomes of a model with a free first dimension that answers as `model`."""

    class Answering(HeldModel):
        def __call__(self, inputs: Mapping[str, Any], signature: str = DEFAULT_SIGNATURE) -> dict[str, Tensor]:
            return model(inputs)

    class Backend(FakeBackend):
        def load(self, directory: Path, options: PluginOptions, device: str) -> FakeModel:
            specs = (TensorSpec(**({"name": "x", "dtype": np.dtype(np.float32), "shape": (None, 2)} | spec)),)
            return Answering(Signature(inputs=specs, outputs=specs))

    FakeBackend.write(folder)
    source = "" if handler is Handler else 'handler = "it"'
    (folder / "model.toml").write_text(f"{source}\n{toml}", encoding="utf-8")
    return Loader(backends={"fake": Backend()}, handlers={"it": handler}).load(NamedModel(path=folder), folder)


def double(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"x": inputs["x"] * 2}


def test_a_model_whose_rows_are_free_batches(tmp_path: Path) -> None:
    assert load(tmp_path, double).batching is not None


@pytest.mark.parametrize("spec", [{"shape": (1, 2)}, {"shape": None}, {"shape": ()}, {"dtype": None}], ids=str)
def test_a_model_of_which_that_is_not_known_does_not(tmp_path: Path, spec: Any) -> None:
    assert load(tmp_path, double, **spec).batching is None


def centred(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"x": inputs["x"] - inputs["x"].mean()}


def first(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"x": inputs["x"][:1]}


@pytest.mark.parametrize(
    ("model", "why"), [(centred, "of a row is another alone than among others"), (first, "shape .1, 2. for 3 rows")]
)
def test_a_model_whose_rows_depend_on_each_other_does_not_and_says_so(
    tmp_path: Path, model: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tmp_path, model).batching is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 'requests for signature "serving_default" do not share batches' in warning
    with pytest.raises(ModelError, match=why):
        load(tmp_path, model, "[batching]\nmax_rows = 8")


def test_a_model_that_takes_so_many_rows_and_no_more_gets_no_more(tmp_path: Path) -> None:
    def at_most_four(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        assert len(inputs["x"]) <= 4
        return double(inputs)

    batching = load(tmp_path, at_most_four).batching
    assert batching.max_rows == 4
    with pytest.raises(ModelError, match=r"takes 4 rows, but not the next of \(1, 2, 4, 8\)"):
        load(tmp_path, at_most_four, "[batching]\nmax_rows = 8")


def test_samples_beside_the_model_are_taken_first(tmp_path: Path) -> None:
    seen: list[float] = []

    def noting(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        seen.extend(inputs["x"][:, 0])
        return double(inputs)

    tmp_path.mkdir(exist_ok=True)
    np.savez(tmp_path / "warm_up.npz", x=np.array([[7, 7], [8, 8]], np.float32))
    assert load(tmp_path, noting).batching is not None
    assert set(seen) == {7, 8}

    def failing(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        raise RuntimeError("no")

    with pytest.raises(ModelError, match="fails for the samples beside it"):
        load(tmp_path, failing)


def test_a_handler_of_one_request_cannot_be_told_to_batch(tmp_path: Path) -> None:
    source = "class H(Handler):\n    def run_model(self, model, inputs, request):\n        return model(inputs)\n"
    (tmp_path / "handler.py").write_text(f"from dl_inference_core.node.handling import Handler\n{source}")
    with pytest.raises(ModelError, match="takes one request at a time"):
        load(tmp_path, double, "[batching]\nmax_rows = 8")
    assert load(tmp_path, double).batching is None


class Before(Handler):
    def preprocess(self, request: Request) -> Any:
        return super().preprocess(request)


class Untold(Before):
    shares_calls = True


class Together(Before):
    def run_batch(self, model: Any, inputs: Any, requests: Sequence[Request]) -> Any:
        return super().run_batch(model, inputs, requests)


class OneAgain(Together):
    def run_model(self, model: Any, inputs: Any, request: Request) -> Any:
        return super().run_model(model, inputs, request)


@pytest.mark.parametrize(
    ("handler", "untold", "told"),
    [
        (Handler, True, True),
        (Before, False, True),
        (Untold, True, True),
        (Together, True, True),
        (OneAgain, False, False),
    ],
)
def test_a_handler_says_whether_requests_may_share_calls(
    tmp_path: Path, handler: type[Handler], untold: bool, told: bool
) -> None:
    assert (load(tmp_path, double, handler=handler).batching is not None) is untold
    if told:
        assert load(tmp_path, double, "[batching]", handler).batching is not None
    else:
        with pytest.raises(ModelError, match="takes one request at a time"):
            load(tmp_path, double, "[batching]", handler)


def test_without_warm_up_the_model_is_not_run(tmp_path: Path) -> None:
    def never(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        raise AssertionError("it was run")

    assert load(tmp_path, never, "warm_up = false").batching is None
    assert load(tmp_path, never, "warm_up = false\n[batching]\nmax_rows = 8").batching.max_rows == 8


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("noise", [1e-4, 0.1])
def test_answers_may_differ_by_the_tolerance(tmp_path: Path, dtype: Any, noise: float) -> None:
    def noisy(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": (np.ones_like(inputs["x"]) * (1 + noise * (len(inputs["x"]) > 1))).astype(dtype)}

    toml = "[batching]\nenabled = 'auto'\nmax_rows = 4\ntolerance = 0.02"
    assert (load(tmp_path, noisy, toml).batching is not None) is (noise < 0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_alone_is_none_among_others(tmp_path: Path, value: float) -> None:
    def odd(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": np.where(inputs["x"] > 0, inputs["x"], value).astype(np.float32)}

    def odd_and_centred(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": np.where(inputs["x"] > 0, centred(inputs)["x"], value).astype(np.float32)}

    assert load(tmp_path, odd).batching is not None
    assert load(tmp_path, odd_and_centred).batching is None


def test_samples_that_fit_no_model_do_not_keep_one_that_is_told_to_from_batching(tmp_path: Path) -> None:
    def picky(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        raise ValueError("no vocabulary has that")

    assert load(tmp_path, picky).batching is None
    assert load(tmp_path, picky, "[batching]\nmax_rows = 8").batching.max_rows == 8


def test_every_size_of_batch_is_run_before_the_model_is_ready(tmp_path: Path) -> None:
    seen: list[int] = []

    def noting(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        seen.append(len(inputs["x"]))
        return double(inputs)

    load(tmp_path, noting, "[batching]\nmax_rows = 12")
    assert seen[-5:] == [1, 2, 4, 8, 12]
    load(tmp_path, noting, "[batching]\nmax_rows = 6\nallowed_rows = [3, 6]")
    assert seen[-2:] == [3, 6]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rows": 0},
        {"max_rows": 4, "preferred_rows": [8]},
        {"max_rows": 4, "allowed_rows": [2]},
        {"allowed_rows": [0, 64]},
        {"max_delay_us": -1},
        {"buckets": {"x": {"to": []}}},
        {"size": 3},
    ],
    ids=str,
)
def test_settings_that_are_refused(settings: Any) -> None:
    with pytest.raises(ValidationError):
        BatchingConfig.model_validate(settings)


# Taking apart and putting together.


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.booleans(),
)
def test_answers_equal_those_of_each_request_alone(shapes: list[tuple[int, int]], max_rows: int, padded: bool) -> None:
    allowed = [size for size in (2, 5, max_rows) if size <= max_rows] if padded else []
    config = BatchingConfig(max_rows=max_rows, allowed_rows=tuple(allowed))
    batching = Batching(config, np.concatenate)
    sizes: list[int] = []

    def model(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes.append(len(inputs["x"]))
        return {"sum": inputs["x"].sum(axis=1), "twice": inputs["x"] * 2}

    numbers = iter(range(1000))
    given = [np.array([[next(numbers)] * wide for _ in range(rows)]) for rows, wide in shapes]
    request = Request(payload={}, form=Form.TENSORS)
    parts = [batching.part(index, request, {"x": x}) for index, x in enumerate(given)]
    answers: dict[int, Any] = {}
    for batch in batching.batches(parts):
        assert len({part.key for part in batch}) == 1
        for part, outputs in zip(batch, batching.run(batch, model), strict=True):
            answers[part.queued] = outputs
    assert answers.keys() == set(range(len(given)))
    for index, x in enumerate(given):
        np.testing.assert_array_equal(answers[index]["sum"], x.sum(axis=1))
        np.testing.assert_array_equal(answers[index]["twice"], x * 2)
    assert max(sizes) <= max_rows
    if allowed:
        assert set(sizes) <= set(allowed)


def test_outputs_must_have_the_rows_of_the_inputs() -> None:
    batching = Batching(BatchingConfig(), np.concatenate)
    request = Request(payload={}, form=Form.TENSORS)
    parts = [batching.part(number, request, {"x": np.ones((2, 1))}) for number in range(2)]
    for outputs in ({"y": np.ones(3)}, {"y": np.float32(1)}, np.ones(4), {"y": 1}):
        with pytest.raises(NotRowwise):
            batching.run(parts, lambda _, outputs=outputs: outputs)  # type: ignore[misc]
