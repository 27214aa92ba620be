"""Batches that do not end: they are reported, their version is not ready, and a fresh thread takes over."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dl_inference_core.errors import HandlerFailed
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.model import ServedModel
from dl_inference_core.node.repository import Repository
from dl_inference_core.tensors import Form, Request
from dl_inference_core.testing import FakeBackend
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import PROTOCOLS, READY

OIP = PROTOCOLS["openinference"]
ALONE = "[batching]\nenabled = false"
HELD = "[batching]\nmax_delay_us = 5_000"


class Hanging(Handler):
    """A request with a negative number returns once `go` is set."""

    go: ClassVar[threading.Event]

    def preprocess(self, request: Request) -> Any:
        inputs = super().preprocess(request)
        if inputs["x"].min() < 0:
            self.wait_here()
        return inputs

    def wait_here(self) -> None:
        assert self.go.wait(20)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    class Fresh(Hanging):
        go = threading.Event()
        shares_calls = True

    yield Fresh
    Fresh.go.set()


@asynccontextmanager
async def serving(
    folder: Path, handler: type[Handler], toml: str, metrics: Metrics | None = None
) -> AsyncIterator[tuple[ServedModel, FakeBackend]]:
    FakeBackend.write(folder / "m" / "1", inputs={"x": ["float32", [None, None]]})
    (folder / "m" / "model.toml").write_text(f'handler = "it"\n{toml}', encoding="utf-8")
    backend = FakeBackend()
    repository = Repository(folder, backends={"fake": backend}, handlers={"it": handler}, metrics=metrics)
    await repository.start()
    assert repository.models["m"].ready, repository.models["m"].versions
    try:
        yield repository.models["m"], backend
    finally:
        await repository.close()


async def ask(model: ServedModel, number: float) -> list[float]:
    payload = {"x": np.array([[number]], np.float32)}
    body = OIP.codec.encode_request(Request(payload=payload, form=Form.TENSORS, model="m"))
    answer: Any = OIP.codec.decode_response(await answered(model, OIP, body))
    return answer.payload["x"].tolist()[0]  # type: ignore[no-any-return]


async def says_ready(model: ServedModel) -> bool:
    body = messages.ModelReadyRequest(name="m", version="1").SerializeToString()
    return bool(messages.ModelReadyResponse.FromString(await answered(model, READY, body)).ready)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("batching", [ALONE, HELD])
async def test_a_stuck_batch_is_reported_once_and_the_version_is_not_ready_until_it_ends(
    tmp_path: Path, hanging: type[Hanging], caplog: pytest.LogCaptureFixture, batching: str
) -> None:
    metrics = Metrics()
    toml = f"{batching}\n[watchdog]\nstuck_after_s = 0.1\nreplace_after_s = 0"
    async with serving(tmp_path, hanging, toml, metrics) as (model, _):
        stuck = asyncio.create_task(ask(model, -1))
        await until(lambda: not model.ready)
        assert not await says_ready(model)
        await asyncio.sleep(0.1)
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert 'model "m" version 1: a batch of 1 requests has run for 0 s on thread 0' in record.getMessage()
        assert "in wait_here" in record.getMessage(), "the stack of the thread"
        assert 'dl_inference_stuck_batches_total{model="m"} 1.0' in metrics.render("")[0].decode()
        hanging.go.set()
        assert await stuck == [-1]
        await until(lambda: model.ready)
        assert await says_ready(model)
        assert await ask(model, 3) == [3]


async def test_a_version_of_several_threads_is_ready_while_one_of_them_works(
    tmp_path: Path, hanging: type[Hanging], caplog: pytest.LogCaptureFixture
) -> None:
    toml = f"threads = 2\n{ALONE}\n[watchdog]\nstuck_after_s = 0.1\nreplace_after_s = 0"
    async with serving(tmp_path, hanging, toml) as (model, _):
        first = asyncio.create_task(ask(model, -1))
        await until(lambda: "a batch of" in caplog.text)
        assert model.ready
        assert await ask(model, 3) == [3]
        second = asyncio.create_task(ask(model, -2))
        await until(lambda: not model.ready)
        hanging.go.set()
        assert await asyncio.gather(first, second) == [[-1], [-2]]


async def test_a_version_is_not_ready_while_the_thread_that_gathers_is_stuck(
    tmp_path: Path, hanging: type[Hanging]
) -> None:
    """Where batches wait for more requests, no other thread can begin one."""
    toml = f"threads = 2\n{HELD}\n[watchdog]\nstuck_after_s = 0.1\nreplace_after_s = 0"
    async with serving(tmp_path, hanging, toml) as (model, _):
        stuck = asyncio.create_task(ask(model, -1))
        await until(lambda: not model.ready)
        hanging.go.set()
        assert await stuck == [-1]
        await until(lambda: model.ready)


@pytest.mark.parametrize("batching", [ALONE, HELD])
async def test_a_fresh_thread_takes_over(
    tmp_path: Path, hanging: type[Hanging], caplog: pytest.LogCaptureFixture, batching: str
) -> None:
    """Also from a thread that holds the gathering of batches."""
    toml = f"{batching}\n[watchdog]\nstuck_after_s = 0.1\nreplace_after_s = 0.3"
    async with serving(tmp_path, hanging, toml) as (model, backend):
        stuck = asyncio.create_task(ask(model, -1))
        await until(lambda: not model.ready)
        behind = asyncio.create_task(ask(model, 5))
        with pytest.raises(HandlerFailed, match="the model did not return within 0 s"):
            await stuck
        assert await behind == [5]
        assert model.ready
        assert "a fresh thread takes over" in caplog.text
        hanging.go.set()
        await until(lambda: sum(thread.name == "m/1#0" for thread in threading.enumerate()) == 1)
        for number in (6, 7):
            assert await ask(model, number) == [number]
        assert not backend.models[0].closed
    assert backend.models[0].closed


async def test_a_thread_is_given_up_only_once_another_can_be_started(
    tmp_path: Path, hanging: type[Hanging], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    toml = f"{ALONE}\n[watchdog]\nstuck_after_s = 0.05\nreplace_after_s = 0.1"
    async with serving(tmp_path, hanging, toml) as (model, _):
        with monkeypatch.context() as system:
            system.setattr(threading.Thread, "start", no_thread)
            stuck = asyncio.create_task(ask(model, -1))
            await until(lambda: "no other can take over: can't start new thread" in caplog.text)
            assert not stuck.done()
        with pytest.raises(HandlerFailed, match="the model did not return"):
            await stuck
        assert await ask(model, 5) == [5]


async def test_a_model_that_a_thread_still_runs_is_not_closed(tmp_path: Path, hanging: type[Hanging]) -> None:
    toml = f"{ALONE}\n[watchdog]\nstuck_after_s = 0.05\nreplace_after_s = 0.1"
    async with serving(tmp_path, hanging, toml) as (model, backend):
        with pytest.raises(HandlerFailed):
            await ask(model, -1)
    assert not backend.models[0].closed


async def test_a_version_that_closes_gets_past_a_thread_that_is_stuck(tmp_path: Path, hanging: type[Hanging]) -> None:
    toml = f"{HELD}\n[watchdog]\nstuck_after_s = 0.1\nreplace_after_s = 0.5"
    async with serving(tmp_path, hanging, toml) as (model, _):
        stuck = asyncio.create_task(ask(model, -1))
        await until(lambda: not model.ready)
        behind = asyncio.create_task(ask(model, 5))
        await asyncio.sleep(0)
        began = time.monotonic()
    assert time.monotonic() - began < 5, "the time that a repository gives versions which do not end"
    assert await behind == [5]
    with pytest.raises(HandlerFailed):
        await stuck


async def test_a_load_is_not_a_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Slow(Handler):
        def load(self, model: Any, directory: Path) -> None:
            time.sleep(0.3)

    async with serving(tmp_path, Slow, "[watchdog]\nstuck_after_s = 0.05\nreplace_after_s = 0.1") as (model, _):
        assert await ask(model, 1) == [1]
    assert "a batch of" not in caplog.text


async def test_nothing_looks_at_a_version_whose_closing_is_given_up(
    tmp_path: Path, hanging: type[Hanging], caplog: pytest.LogCaptureFixture
) -> None:
    FakeBackend.write(tmp_path / "m" / "1", inputs={"x": ["float32", [None, None]]})
    toml = f'handler = "it"\n{ALONE}\n[watchdog]\nstuck_after_s = 0.3\nreplace_after_s = 0'
    (tmp_path / "m" / "model.toml").write_text(toml, encoding="utf-8")
    repository = Repository(tmp_path, backends={"fake": FakeBackend()}, handlers={"it": hanging})
    await repository.start()
    stuck = asyncio.create_task(ask(repository.models["m"], -1))
    await asyncio.sleep(0)
    await repository.close(grace_s=0.01)
    await asyncio.sleep(0.6)
    assert "still busy" in caplog.text
    assert "a batch of" not in caplog.text
    hanging.go.set()
    assert await stuck == [-1]
