"""The way of one request through a model's version, and what becomes of it when something goes wrong."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dl_inference_core.errors import (
    BadRequest,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    ModelNotFound,
    Overloaded,
)
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.load import LoadMeter
from dl_inference_core.node.model import ServedModel
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.version import LoadedVersion
from dl_inference_core.tensors import Form, Payload, Request, Response
from dl_inference_core.testing import FakeBackend, FakeModel
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METADATA, PROTOCOLS, Protocol

OIP = PROTOCOLS["openinference"]
SELDON = PROTOCOLS["seldon"]


@asynccontextmanager
async def served(folder: Path, handler: type[Handler] = Handler, **content: Any) -> AsyncIterator[ServedModel]:
    """A model "m" that doubles float32 tensors "x", behind `handler`."""
    threads = content.pop("threads", 1)
    FakeBackend.write(folder / "m" / "1", **({"factor": 2, "inputs": {"x": ["float32", [None]]}} | content))
    (folder / "m" / "model.toml").write_text(f'handler = "it"\nthreads = {threads}', encoding="utf-8")
    repository = Repository(folder, backends={"fake": FakeBackend()}, handlers={"it": handler})
    await repository.start()
    assert repository.models["m"].ready, repository.models["m"].versions
    try:
        yield repository.models["m"]
    finally:
        await repository.close()


async def ask(
    model: ServedModel,
    payload: Payload,
    form: Form = Form.TENSORS,
    protocol: Protocol = OIP,
    deadline: float | None = None,
    **more: Any,
) -> Response:
    body = protocol.codec.encode_request(Request(payload=payload, form=form, model="m", **more))
    return protocol.codec.decode_response(await answered(model, protocol, body, deadline=deadline))


def x(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)}


class Gate(Handler):
    """Holds every request until `open` is set; `seen` are the requests that came as far."""

    open: ClassVar[threading.Event]
    seen: ClassVar[list[float]]

    def preprocess(self, request: Request) -> Any:
        inputs = super().preprocess(request)
        self.seen.append(float(inputs["x"][0]))
        assert self.open.wait(10)
        return inputs


@pytest.fixture
def gate() -> type[Gate]:
    class FreshGate(Gate):
        open = threading.Event()
        seen: ClassVar[list[float]] = []

    return FreshGate


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


def test_answers_with_model_version_and_what_the_request_carried(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as model:
            answer = await ask(model, x(1, 2), id="abc")
            assert (answer.model, answer.version, answer.id) == ("m", 1, "abc")
            assert isinstance(answer.payload, dict)
            np.testing.assert_array_equal(answer.payload["x"], np.array([2, 4], np.float32))
            answer = await ask(
                model, np.array([1.0, 2.0]), Form.NDARRAY, SELDON, tags={"taskId": "m", "user": "u"}, id="p"
            )
            assert (answer.tags["user"], answer.id) == ("u", "p")
            np.testing.assert_array_equal(np.asarray(answer.payload), [2.0, 4.0])
            assert [spec.name for spec in model.signature().inputs] == ["x"]
            assert model.platform(1) == "fake"

    asyncio.run(main())


def test_metadata_of_the_version_asked_for(tmp_path: Path) -> None:
    inputs = {"x": ["float32", [None, 3]], "words": ["object", None], "flag": ["bool", []], "n": ["uint8", [2]]}

    async def ask_metadata(model: ServedModel, version: str) -> Any:
        body = messages.ModelMetadataRequest(name="m", version=version).SerializeToString()
        answer = await answered(model, METADATA, body)
        return messages.ModelMetadataResponse.FromString(answer)

    async def main() -> None:
        async with served(tmp_path, inputs=inputs) as model:
            for version in ("", "1"):
                answer = await ask_metadata(model, version)
                assert (answer.name, list(answer.versions), answer.platform) == ("m", ["1"], "fake")
                expected = [("x", "FP32", [-1, 3]), ("words", "BYTES", []), ("flag", "BOOL", []), ("n", "UINT8", [2])]
                for tensors in (answer.inputs, answer.outputs):
                    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in tensors] == expected
            with pytest.raises(ModelNotFound):
                await ask_metadata(model, "2")
            with pytest.raises(BadRequest):
                await ask_metadata(model, "two")

    asyncio.run(main())


def test_only_the_outputs_asked_for(tmp_path: Path) -> None:
    class Two(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Payload:
            return {"a": outputs["x"], "b": outputs["x"]}

    async def main() -> None:
        async with served(tmp_path, Two) as model:
            answer = await ask(model, x(1), outputs=("b",))
            assert isinstance(answer.payload, dict)
            assert list(answer.payload) == ["b"]
            with pytest.raises(BadRequest, match=r"signature: c Outputs expected to be in the set \{a,b\}"):
                await ask(model, x(1), outputs=("c",))

    asyncio.run(main())


def test_request_that_does_not_fit_is_the_clients_fault(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as model:
            for call in (
                ask(model, {"y": np.ones(1, np.float32)}),
                ask(model, {"x": np.ones((1, 1), np.float32)}),
                answered(model, OIP, b"\xff\xff"),
            ):
                with pytest.raises(BadRequest):
                    await call
            await ask(model, x(1))

    asyncio.run(main())


def test_deadline_that_passed_in_the_queue_stops_before_any_work(tmp_path: Path, gate: type[Gate]) -> None:
    async def main() -> None:
        async with served(tmp_path, gate) as model:
            first = asyncio.create_task(ask(model, x(1)))
            await until(lambda: gate.seen == [1.0])
            late = asyncio.create_task(ask(model, x(2), deadline=time.monotonic() + 0.01))
            await asyncio.sleep(0.02)
            gate.open.set()
            with pytest.raises(DeadlineExceeded, match='queue of model "m"'):
                await late
            await first
            await ask(model, x(3), deadline=time.monotonic() + 60)
            assert gate.seen == [1.0, 3.0]

    asyncio.run(main())


def test_request_cancelled_in_the_queue_never_runs(tmp_path: Path, gate: type[Gate]) -> None:
    async def main() -> None:
        async with served(tmp_path, gate) as model:
            first = asyncio.create_task(ask(model, x(1)))
            await until(lambda: gate.seen == [1.0])
            gone = asyncio.create_task(ask(model, x(2)))
            behind = asyncio.create_task(ask(model, x(3)))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait((gone,))
            gate.open.set()
            await first
            await behind
            assert gate.seen == [1.0, 3.0]
            assert gone.cancelled()

    asyncio.run(main())


def test_a_handler_knows_the_call_of_its_request(tmp_path: Path) -> None:
    seen: list[Request] = []

    class Curious(Handler):
        def preprocess(self, request: Request) -> Any:
            assert not request.cancelled()
            seen.extend((request, pickle.loads(pickle.dumps(request)), copy.deepcopy(request)))
            return super().preprocess(request)

    async def main() -> None:
        deadline = time.monotonic() + 60
        metadata = (("x-request-id", "r-1"), ("user", "u"))
        body = OIP.codec.encode_request(Request(payload=x(1), form=Form.TENSORS, model="m"))
        async with served(tmp_path, Curious) as model:
            await answered(model, OIP, body, metadata=metadata, deadline=deadline)
        assert len(seen) == 3
        for request in seen:
            assert (request.deadline, request.metadata, request.request_id) == (deadline, metadata, "r-1")

    asyncio.run(main())


@pytest.mark.parametrize("how", ["client", "deadline"])
def test_a_handler_can_stop_when_nobody_waits_any_more(tmp_path: Path, how: str) -> None:
    began, stopped = threading.Event(), threading.Event()

    class Long(Handler):
        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            began.set()
            end = time.monotonic() + 10
            while not request.cancelled():
                assert time.monotonic() < end
                time.sleep(0.001)
            stopped.set()
            raise BadRequest("nobody waits")

    async def main() -> None:
        async with served(tmp_path, Long) as model:
            deadline = time.monotonic() + 0.3 if how == "deadline" else None
            task = asyncio.create_task(ask(model, x(1), deadline=deadline))
            await asyncio.to_thread(began.wait)
            if how == "client":
                task.cancel()
            await asyncio.wait((task,))
            assert await asyncio.to_thread(stopped.wait, 10)

    asyncio.run(main())


def test_request_cancelled_while_it_runs_hurts_no_other(tmp_path: Path, gate: type[Gate]) -> None:
    async def main() -> None:
        async with served(tmp_path, gate) as model:
            gone = asyncio.create_task(ask(model, x(1)))
            await until(lambda: gate.seen == [1.0])
            behind = asyncio.create_task(ask(model, x(2)))
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            gate.open.set()
            assert (await behind).version == 1

    asyncio.run(main())


def test_version_that_is_closed_answers_what_it_was_asked(tmp_path: Path, gate: type[Gate]) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text('handler = "gate"', encoding="utf-8")
    backend = FakeBackend()

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": backend}, handlers={"gate": gate})
        await repository.start()
        model = repository.models["m"]
        calls = [asyncio.create_task(ask(model, x(number))) for number in range(5)]
        await until(lambda: gate.seen == [0.0])
        closing = asyncio.create_task(repository.close())
        await until(lambda: not model.ready)
        assert model.versions[1].state.value == "unloading"
        assert not backend.models[0].closed
        gate.open.set()
        await asyncio.gather(*calls)
        await closing
        assert backend.models[0].closed

    asyncio.run(main())


def test_stuck_call_does_not_keep_the_repository_from_closing(
    tmp_path: Path, gate: type[Gate], caplog: pytest.LogCaptureFixture
) -> None:
    FakeBackend.write(tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text('handler = "gate"', encoding="utf-8")

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={"gate": gate})
        await repository.start()
        stuck = asyncio.create_task(ask(repository.models["m"], x(1)))
        await until(lambda: gate.seen == [1.0])
        async with asyncio.timeout(5):
            await repository.close(grace_s=0.02)
        assert "still busy" in caplog.text
        gate.open.set()
        await stuck

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["preprocess", "run_model", "postprocess"])
@pytest.mark.parametrize(
    "error", [ValueError("secret\nlines"), StopIteration(), asyncio.CancelledError(), SystemExit(3), KeyError("k")]
)
def test_handler_that_raises_is_answered_and_the_next_request_too(
    tmp_path: Path, stage: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(Handler):
        raises = True

        def _maybe(self, where: str) -> None:
            if where == stage and self.raises:
                raise error

        def preprocess(self, request: Request) -> Any:
            self._maybe("preprocess")
            return super().preprocess(request)

        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            self._maybe("run_model")
            return super().run_model(model, inputs, request)

        def postprocess(self, outputs: Any, request: Request) -> Payload:
            self._maybe("postprocess")
            return super().postprocess(outputs, request)

    async def main() -> None:
        async with served(tmp_path, Raising) as model:
            with pytest.raises(HandlerFailed) as raised:
                await ask(model, x(1))
            assert str(raised.value).startswith(f'model "m" version 1: {stage} failed: {type(error).__name__}')
            assert "lines" not in str(raised.value)
            logged = caplog.records[-1].exc_text or ""
            assert type(error).__name__ in logged.partition("The above exception was the direct cause")[0]
            Raising.raises = False
            assert (await ask(model, x(1))).version == 1

    asyncio.run(main())


def test_failure_in_the_models_own_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, fail="out of memory") as model:
            with pytest.raises(HandlerFailed, match="run_model failed: RuntimeError: out of memory"):
                await ask(model, x(1))

    asyncio.run(main())


@pytest.mark.parametrize("error", [BadRequest("too short"), Overloaded("not now")])
def test_what_a_handler_says_on_purpose_passes(tmp_path: Path, error: InferenceError) -> None:
    class Saying(Handler):
        def preprocess(self, request: Request) -> Any:
            raise error

    async def main() -> None:
        async with served(tmp_path, Saying) as model:
            with pytest.raises(type(error)) as raised:
                await ask(model, x(1))
            assert raised.value is error

    asyncio.run(main())


@pytest.mark.parametrize("payload", [{"x": object()}, {"x": [[1], [2, 3]]}, object(), {"x": None}])
def test_answer_that_the_protocol_cannot_hold(tmp_path: Path, payload: Any) -> None:
    class Odd(Handler):
        def postprocess(self, outputs: Any, request: Request) -> Payload:
            return payload  # type: ignore[no-any-return]

    async def main() -> None:
        async with served(tmp_path, Odd) as model:
            with pytest.raises(HandlerFailed, match="encoding the answer failed: TypeError"):
                await ask(model, x(1))

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["preprocess", "run_model", "postprocess", "encoding"])
def test_a_request_that_fails_is_not_kept_until_the_garbage_collector_runs(
    tmp_path: Path, stage: str, no_collector: None
) -> None:
    calls: list[weakref.ref[Any]] = []

    class Failing(Handler):
        def preprocess(self, request: Request) -> Any:
            calls.append(weakref.ref(request.call))
            assert stage != "preprocess"
            return super().preprocess(request)

        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            assert stage != "run_model"
            return super().run_model(model, inputs, request)

        def postprocess(self, outputs: Any, request: Request) -> Payload:
            assert stage != "postprocess"
            return {"x": object()}  # type: ignore[dict-item]

    async def main() -> None:
        async with served(tmp_path, Failing) as model:
            with pytest.raises(HandlerFailed, match=stage):
                await ask(model, x(1))
            await until(lambda: len(calls) == 1 and calls[0]() is None)

    logging.disable()  # the test's own handlers keep what is logged
    try:
        asyncio.run(main())
    finally:
        logging.disable(logging.NOTSET)


def test_everything_happens_inside_the_session_on_the_versions_own_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = threading.local()
    threads: set[str] = set()

    @contextmanager
    def session(self: FakeModel) -> Iterator[None]:
        inside.it = True
        yield
        inside.it = False

    monkeypatch.setattr(FakeModel, "session", session)

    def note() -> None:
        assert inside.it
        threads.add(threading.current_thread().name)

    class Watching(Handler):
        def load(self, model: Model, directory: Path) -> None:
            super().load(model, directory)
            note()

        def preprocess(self, request: Request) -> Any:
            note()
            return super().preprocess(request)

        def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
            note()
            return super().run_model(model, inputs, request)

        def postprocess(self, outputs: Any, request: Request) -> Payload:
            note()
            return super().postprocess(outputs, request)

    async def main() -> None:
        async with served(tmp_path, Watching) as model:
            await asyncio.gather(*(ask(model, x(1)) for _ in range(3)))
            assert threads == {"m/1#0"}

    asyncio.run(main())


def test_as_many_requests_at_a_time_as_threads(tmp_path: Path) -> None:
    class Meeting(Handler):
        barrier = threading.Barrier(3)

        def preprocess(self, request: Request) -> Any:
            self.barrier.wait(10)
            return super().preprocess(request)

    async def main() -> None:
        async with served(tmp_path, Meeting, threads=3) as model:
            await asyncio.gather(*(ask(model, x(1)) for _ in range(6)))

    asyncio.run(main())


def test_request_for_another_version_waits_for_that_one_only(tmp_path: Path, gate: type[Gate]) -> None:
    for number in (1, 2):
        FakeBackend.write(tmp_path / "m" / str(number))
    (tmp_path / "m" / "1" / "model.toml").write_text('handler = "gate"', encoding="utf-8")

    async def main() -> None:
        repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={"gate": gate})
        await repository.start()
        model = repository.models["m"]
        old = asyncio.create_task(ask(model, x(1), version=1))
        await until(lambda: gate.seen == [1.0])
        assert (await ask(model, x(1))).version == 2
        gate.open.set()
        assert (await old).version == 1
        await repository.close()

    asyncio.run(main())


def test_version_that_never_loaded_closes(tmp_path: Path) -> None:
    async def main() -> None:
        version = LoadedVersion("m", 1, LoadMeter())

        def fail() -> Any:
            raise ValueError("no")

        with pytest.raises(HandlerFailed, match="ValueError: no"):
            await version.load(fail)
        await version.close()

    asyncio.run(main())
