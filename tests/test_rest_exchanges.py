"""REST without a socket and without an event loop: exchanges in memory, begun on any thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from dl_inference_seldon.rest import SeldonRest
from dl_inference_tfserving.rest import TfServingRest

from dl_inference_core.dispatcher import Dispatcher
from dl_inference_core.errors import BadRequest, DeadlineExceeded, InferenceError, MessageTooLarge
from dl_inference_core.http_exchange import HttpExchange, Refused
from dl_inference_core.introspection import Readiness
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.repository import Repository
from dl_inference_core.rest.answering import Local, Rest
from dl_inference_core.routing import Routes
from dl_inference_core.tensors import Request
from dl_inference_core.testing import FakeBackend

CORS = "access-control-allow-origin"


class Held(Handler):
    """Holds each request until `open` is set."""

    name = "held"
    open: ClassVar[threading.Event]
    entered: ClassVar[threading.Semaphore]

    def preprocess(self, request: Request) -> Any:
        self.entered.release()
        assert self.open.wait(20)
        return super().preprocess(request)


class MemoryHttpExchange(HttpExchange):
    """An HTTP exchange without a socket.

    Attributes:
        replies: status, headers and body of each reply, as many as there were.
        replied_on: the thread of the first one.
    """

    def __init__(self, verb: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        path, _, query = target.partition("?")
        super().__init__(verb, path, query, headers or {}, None)
        self.body = body
        self.replies: list[tuple[int, Mapping[str, str], bytes]] = []
        self.replied_on = 0
        self._replied = threading.Event()
        self._left = False
        self._callbacks: list[Callable[[], object]] = []

    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.replies.append((status, headers, body))
        self.replied_on = threading.get_ident()
        self._callbacks.clear()
        self._replied.set()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        if self._left:
            threading.Thread(target=callback).start()
        elif not self.replies:
            self._callbacks.append(callback)

    def leave(self) -> None:
        self._left = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    @property
    def reply_now(self) -> tuple[int, Any]:
        """Status and JSON of the only reply."""
        ((status, headers, body),) = self.replies
        assert headers["content-type"] == "application/json"
        return status, json.loads(body)

    def wait(self) -> tuple[int, Any]:
        assert self._replied.wait(20)
        return self.reply_now


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    rest: Rest
    dispatcher: Dispatcher
    metrics: Metrics

    def begin(self, verb: str, target: str, document: Any = None, **headers: str) -> MemoryHttpExchange:
        body = document if isinstance(document, bytes) else b"" if document is None else json.dumps(document).encode()
        exchange = MemoryHttpExchange(
            verb, target, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        self.rest.begin_http(exchange)
        return exchange

    def counted(self, protocol: str) -> dict[str, float]:
        """How many requests of `protocol` have ended, by code."""
        found = {}
        for line in self.metrics.render("")[0].decode().splitlines():
            if line.startswith("dl_inference_requests_total{") and f'protocol="{protocol}"' in line:
                found[line.partition('code="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
        return found


@contextlib.asynccontextmanager
async def serving(folder: Path, *, cors: bool = False, most_in_flight: int = 0) -> AsyncIterator[Served]:
    repository = Repository(folder, backends={"fake": FakeBackend()}, handlers={"held": Held})
    await repository.start()
    readiness, metrics = Readiness(serving=True), Metrics()
    dispatcher = Dispatcher(Routes(repository), metrics, most_in_flight=most_in_flight)
    local = Local(repository, None, readiness)
    apis = TfServingRest(local, dispatcher, cors=cors), SeldonRest(local, dispatcher, cors=cors)
    try:
        yield Served(rest=Rest(*apis, body_bytes=1 << 20, timeout_s=20), dispatcher=dispatcher, metrics=metrics)
    finally:
        await repository.close()


def run(folder: Path, test: Callable[[Served], None], **options: Any) -> None:
    """Runs `test` on a thread that has no event loop."""

    async def main() -> None:
        async with serving(folder, **options) as served:
            await asyncio.to_thread(test, served)

    asyncio.run(main())


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FakeBackend.write(tmp_path / "double/1", inputs={"x": ["float64", None]}, factor=2)
    return tmp_path


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FakeBackend.write(tmp_path / "held/1")
    (tmp_path / "held/model.toml").write_text('handler = "held"\n', encoding="utf-8")
    monkeypatch.setattr(Held, "open", threading.Event(), raising=False)
    monkeypatch.setattr(Held, "entered", threading.Semaphore(0), raising=False)
    return tmp_path


NDARRAY = {"data": {"ndarray": [1, 2.5]}}
DOUBLED = {"data": {"names": [], "ndarray": [2.0, 5.0]}, "meta": {}}


def test_an_inference_is_answered_on_the_thread_of_the_model(folder: Path) -> None:
    def test(served: Served) -> None:
        for target, document, expected in (
            ("/v1/models/double:predict", {"inputs": [1, 2.5]}, {"outputs": [2.0, 5.0]}),
            ("/api/v1.0/predictions", NDARRAY, DOUBLED),
            ("/seldon/any/predict", NDARRAY, DOUBLED),
        ):
            exchange = served.begin("POST", target, document)
            assert exchange.wait() == (200, expected)
            assert exchange.replied_on != threading.get_ident()
        assert served.begin("GET", "/predict?json=%7B%22data%22:%7B%22ndarray%22:[1,2.5]%7D%7D").wait() == (
            200,
            DOUBLED,
        )
        assert served.counted("rest_predict") == {"OK": 1}
        assert served.counted("rest_seldon") == {"OK": 3}

    run(folder, test)


def test_what_takes_no_model_is_answered_before_the_call_returns(folder: Path) -> None:
    def test(served: Served) -> None:
        for verb, target, status in (
            ("GET", "/v1/models/double", 200),
            ("HEAD", "/v1/models/double/metadata", 200),
            ("GET", "/v1/models/none", 404),
            ("GET", "/metadata", 200),
            ("GET", "/health/status", 200),
            ("POST", "/v1/models/none:predict", 404),
            ("POST", "/v1/nothing", 400),
            ("POST", "/api/nothing", 404),
            ("DELETE", "/metadata", 405),
            ("POST", "/predict", 400),
            ("OPTIONS", "/predict", 400),
        ):
            exchange = served.begin(verb, target)
            assert exchange.reply_now[0] == status, target
            assert exchange.replied_on == threading.get_ident()
        exchange = served.begin("POST", "/transform-input", {"strData": "as it is"})
        assert exchange.reply_now == (200, {"strData": "as it is"})

    run(folder, test)


def test_a_large_body_is_not_read_on_the_callers_thread(folder: Path) -> None:
    def test(served: Served) -> None:
        for size, here in ((1000, True), (100_000, False)):
            exchange = served.begin("POST", "/predict", b"{" + b" " * size)
            status, answer = exchange.wait()
            assert (status, "JSON Parse error" in answer["status"]["info"]) == (400, True)
            assert (exchange.replied_on == threading.get_ident()) is here
        exchange = served.begin("POST", "/predict", {"data": {"ndarray": [0.5] * 50_000}})
        assert exchange.wait()[1]["data"]["ndarray"] == [1.0] * 50_000

    run(folder, test)


def test_what_a_transport_refuses_has_the_form_of_the_api(folder: Path) -> None:
    def told(served: Served, path: str, error: InferenceError) -> tuple[int, Any]:
        exchange = MemoryHttpExchange("POST", path)
        served.rest.fail_http(exchange, error)
        assert exchange.replies[0][1][CORS] == "*"
        return exchange.reply_now

    def test(served: Served) -> None:
        for error, status, reason in (
            (MessageTooLarge("it is"), 413, "RESOURCE_EXHAUSTED"),
            (Refused("it is", 415), 415, "MICROSERVICE_BAD_DATA"),
            (BadRequest("it is"), 400, "MICROSERVICE_BAD_DATA"),
            (DeadlineExceeded("it is"), 504, "DEADLINE_EXCEEDED"),
        ):
            assert told(served, "/v1/models/double:predict", error) == (status, {"error": "it is"})
            seldons = {"code": status, "info": "it is", "reason": reason, "status": "FAILURE"}
            assert told(served, "/predict", error) == (status, {"status": seldons})

    run(folder, test, cors=True)


def test_a_client_that_leaves_takes_its_request_out_of_the_queue(held: Path) -> None:
    def test(served: Served) -> None:
        first = served.begin("POST", "/v1/models/held:predict", {"inputs": [1]})
        assert Held.entered.acquire(timeout=20)
        second = served.begin("POST", "/v1/models/held:predict", {"inputs": [2]})
        second.leave()
        assert served.counted("rest_predict") == {"CANCELLED": 1}
        Held.open.set()
        assert first.wait() == (200, {"outputs": [1]})
        third = served.begin("POST", "/v1/models/held:predict", {"inputs": [3]})
        assert third.wait() == (200, {"outputs": [3]})
        assert not second.replies
        assert served.counted("rest_predict") == {"CANCELLED": 1, "OK": 2}
        assert Held.entered.acquire(timeout=0)
        assert not Held.entered.acquire(timeout=0), "the second never began"

    run(held, test)


def test_what_is_in_flight_is_limited_and_whoever_leaves_makes_room(held: Path) -> None:
    def test(served: Served) -> None:
        first = served.begin("POST", "/v1/models/held:predict", {"inputs": [1]})
        assert Held.entered.acquire(timeout=20)
        assert served.begin("POST", "/v1/models/held:predict", {"inputs": [2]}).reply_now[0] == 429
        first.leave()
        second = served.begin("POST", "/v1/models/held:predict", {"inputs": [2]})
        Held.open.set()
        assert second.wait() == (200, {"outputs": [2]})
        assert not first.replies
        assert served.counted("rest_predict") == {"CANCELLED": 1, "RESOURCE_EXHAUSTED": 1, "OK": 1}

    run(held, test, most_in_flight=1)


def test_a_client_that_has_left_already_ends_its_inference(held: Path) -> None:
    def test(served: Served) -> None:
        served.begin("POST", "/v1/models/held:predict", {"inputs": [1]})
        assert Held.entered.acquire(timeout=20)
        exchange = MemoryHttpExchange("POST", "/v1/models/held:predict", b'{"inputs": [2]}')
        exchange.leave()
        served.rest.begin_http(exchange)
        until(lambda: served.counted("rest_predict") == {"CANCELLED": 1})
        Held.open.set()
        assert served.begin("POST", "/v1/models/held:predict", {"inputs": [3]}).wait() == (200, {"outputs": [3]})
        assert not exchange.replies
        assert served.counted("rest_predict") == {"CANCELLED": 1, "OK": 2}

    run(held, test)


def test_requests_of_many_threads_keep_their_answers(folder: Path) -> None:
    def test(served: Served) -> None:
        def ask(number: int) -> None:
            for turn in range(20):
                exchange = served.begin("POST", "/v1/models/double:predict", {"inputs": [number, turn]})
                answers[number, turn] = exchange.wait()

        answers: dict[tuple[int, int], Any] = {}
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {
            (number, turn): (200, {"outputs": [2.0 * number, 2.0 * turn]}) for number in range(8) for turn in range(20)
        }

    run(folder, test)


def test_nothing_of_an_exchange_stays(folder: Path, no_collector: None) -> None:
    def test(served: Served) -> None:
        ends = []
        for target, document in (
            ("/v1/models/double:predict", {"inputs": [1]}),
            ("/v1/models/double:predict", {"inputs": ["a"]}),
            ("/v1/models/none:predict", {"inputs": [1]}),
            ("/predict", NDARRAY),
            ("/predict", {"data": {"ndarray": [[1], [2, 3]]}}),
            ("/transform-input", NDARRAY),
        ):
            exchange = served.begin("POST", target, document)
            exchange.wait()
            ends.append((target, weakref.ref(exchange)))
        del exchange
        # The model's thread lets go of its last batch when it has replied, or begins the next one.
        served.begin("POST", "/v1/models/double:predict", {"inputs": [1]}).wait()
        assert [target for target, end in ends[:-1] if end() is not None] == []

    run(folder, test)
