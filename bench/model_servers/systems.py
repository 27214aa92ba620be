"""The model servers, ours and peers: how each is asked, and what it can be told."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import bodies, load
from bench.load import LoadError, Post
from bench.model_servers import environments, starting
from bench.model_servers.environments import Environment
from bench.model_servers.models import MODELS, OUTPUT, Floats, Model
from bench.model_servers.starting import Setting
from bench.processes import Server
from bench.replay import Traffic
from dl_inference_core.wire.protocol import PROTOCOLS

TOLERANCE = 1e-4
_READY_S = 120.0
_DELAYS_US = (0, 100, 1000, 2000)
"""For which a batch may be held, of those who can be told."""
_OUR_DELAYS_US = (0, 100, 1000)
# For all that speak gRPC: a deadline is part of the work.
_DEADLINE = ("grpc-timeout: 60S",)
_SERVER_LIVE = "/inference.GRPCInferenceService/ServerLive"
_LIVE = b"\x08\x01"
"""ServerLiveResponse{live: true}."""


Start = Callable[[Model, Path, Setting], AbstractContextManager[Server]]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A model server.

    Attributes:
        how: what the page says of it.
        start: serves the model in a folder (`NAME/1/model.pt`) until the block ends.
        ask: what is sent, by the model and the most rows of a request: 64 different messages of gRPC, or one body of
            HTTP/1.1.
        read: the scores of an answer; None of an RPC that computes nothing.
        settings: the best of which is chosen in each run, for each model and number in flight.
        environment: None for ours.
        needs: a distribution without which ours cannot run.
        models: it is measured with; all without.
        polls: it takes CPU without a request, which the others would lack: it is stopped while it is not its turn.
    """

    name: str
    how: str
    start: Start
    ask: Callable[[Model, int], Traffic | Post]
    read: Callable[[bytes], Floats] | None
    settings: tuple[Setting, ...] = (Setting(),)
    environment: Environment | None = None
    needs: str = ""
    models: tuple[str, ...] = ()
    polls: bool = False

    @property
    def speaks_http1(self) -> bool:
        """Whether h2load sends what it is asked."""
        return isinstance(self.ask(next(iter(MODELS.values())), 1), Post)

    @contextmanager
    def running(self, model: Model, folder: Path, setting: Setting, expected: Floats) -> Iterator[Server]:
        """It serves `model`, and has answered with what is expected.

        Raises:
            LoadError: it does not answer within two minutes, or not as the bare model does.
        """
        with self.start(model, folder, setting) as server:
            self._await(server, model)
            self.check(server, model, expected)
            yield server

    def _await(self, server: Server, model: Model) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                load.ask(server.address, self._first(model))
            except LoadError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(0.1)

    def check(self, server: Server, model: Model, expected: Floats) -> None:
        """With as many requests in flight as may share a batch, of HTTP/1.1 with one.

        Args:
            expected: the scores of the first `model.batch` requests.

        Raises:
            LoadError: it does not answer as the bare model does.
        """
        asked = self.ask(model, 1)
        if isinstance(asked, Post):
            answers = [load.ask(server.address, asked)]
        else:
            answers = load.ask_together(server.address, asked.path, asked.messages[: model.batch])
        for answer, scores in zip(answers, expected, strict=False):
            if self.read is None:
                if answer != _LIVE:
                    raise LoadError(f"{self.name} is not live: {answer!r}")
                continue
            found = self.read(answer)
            if found.shape != (1, *scores.shape) or not np.allclose(found[0], scores, rtol=0, atol=TOLERANCE):
                raise LoadError(f"{self.name} does not answer as the bare model does: {found} for {scores}")

    def _first(self, model: Model) -> Post:
        asked = self.ask(model, 1)
        return asked if isinstance(asked, Post) else Post(path=asked.path, message=asked.messages[0])


@cache
def _grpc(protocol: str, model: Model, most_rows: int) -> Traffic:
    make = bodies.one_row if most_rows == 1 else bodies.one_to_four_rows
    messages = make(protocol, model.name, model.input, model.shape)
    return Traffic(path=PROTOCOLS[protocol].node_method, messages=messages, headers=_DEADLINE)


def _ask_server_live(_: Model, __: int) -> Traffic:
    return Traffic(path=_SERVER_LIVE, messages=(b"",), headers=_DEADLINE)


def _read_open_inference(answer: bytes) -> Floats:
    payload: Any = PROTOCOLS["openinference"].codec.decode_response(answer).payload
    (scores,) = payload.values()
    return np.asarray(scores, np.float32)


def _read_seldon(answer: bytes) -> Floats:
    return np.asarray(PROTOCOLS["seldon"].codec.decode_response(answer).payload, np.float32)


_ASK_OPEN_INFERENCE, _ASK_SELDON = partial(_grpc, "openinference"), partial(_grpc, "seldon")


def _json_post(path: str, content: Any) -> Post:
    return Post(path=path, message=json.dumps(content).encode(), media_type="application/json")


def _ask_litserve(model: Model, _: int) -> Post:
    return _json_post("/predict", {model.input: base64.b64encode(model.row().tobytes()).decode()})


def _read_litserve(answer: bytes) -> Floats:
    return np.frombuffer(base64.b64decode(json.loads(answer)[OUTPUT]), np.float32)[None]


def _ask_bentoml(model: Model, _: int) -> Post:
    # Digits that a float32 has.
    return _json_post("/predict", {"rows": np.vectorize(lambda value: float(f"{value:.9g}"))(model.row()).tolist()})


def _read_bentoml(answer: bytes) -> Floats:
    return np.asarray(json.loads(answer), np.float32)


def _our(transport: str, needs: str) -> System:
    return System(
        name=f"ours-{transport}",
        how=f"`dl-inference-core serve`, transport {transport}, Open Inference over gRPC, metrics on, dynamic batching",
        start=partial(starting.ours, transport),
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in _OUR_DELAYS_US),
        needs=needs,
    )


OURS = (_our("native", "dl-inference-native"), _our("grpcio", "grpcio"))
PEERS = (
    System(
        name="triton",
        how="Open Inference over gRPC, its Python backend, dynamic batching",
        start=starting.triton,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in _DELAYS_US),
        environment=environments.TRITON,
    ),
    System(
        name="pytriton",
        how="Triton as PyTriton sets it up: the model in a process of its own behind the Python backend",
        start=starting.pytriton,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=tuple(Setting(name=f"delay {delay} µs", values={"delay_us": delay}) for delay in (0, 100)),
        environment=environments.TRITON,
    ),
    System(
        name="mlserver",
        how="Open Inference over gRPC, in one process (`parallel_workers` 0)",
        start=starting.mlserver,
        ask=_ASK_OPEN_INFERENCE,
        read=_read_open_inference,
        settings=(
            Setting(name="no batching"),
            *(
                Setting(
                    name=f"batches within {time_s * 1000:g} ms",
                    values={"max_batch_size": None, "max_batch_time": time_s},
                )
                for time_s in (0.001, 0.01)
            ),
        ),
        environment=environments.MLSERVER,
    ),
    System(
        name="seldon-core",
        how="SeldonMessage over gRPC, one worker; it has no batching",
        start=starting.seldon_core,
        ask=_ASK_SELDON,
        read=_read_seldon,
        settings=tuple(Setting(name=f"threads {threads}", values={"threads": threads}) for threads in (1, 4)),
        environment=environments.SELDON_CORE,
    ),
    System(
        name="litserve",
        how="JSON with base64 over HTTP/1.1",
        start=starting.litserve,
        ask=_ask_litserve,
        read=_read_litserve,
        settings=tuple(
            Setting(
                name=f"batches within {time_s * 1000:g} ms{', fast queue' if fast else ''}",
                values={"max_batch_size": None, "batch_timeout": time_s, "fast_queue": fast},
            )
            for time_s, fast in ((0.0, False), (0.001, False), (0.001, True))
        ),
        environment=environments.LITSERVE,
        polls=True,
    ),
    System(
        name="bentoml",
        how="JSON over HTTP/1.1",
        start=starting.bentoml,
        ask=_ask_bentoml,
        read=_read_bentoml,
        settings=(
            Setting(name="no batching", values={"batchable": False}),
            Setting(
                name="adaptive batching",
                values={"batchable": True, "max_batch_size": None, "max_latency_ms": 60_000},
            ),
        ),
        environment=environments.BENTOML,
    ),
)
TRITON_EMPTY = System(
    name="triton-empty",
    how="`ServerLive`, which computes nothing: what an RPC costs Triton at the least, whatever its backend",
    start=starting.triton,
    ask=_ask_server_live,
    read=None,
    settings=(Setting(values={"delay_us": 0}),),
    environment=environments.TRITON,
    models=("mmoe",),
)
EVERY = (*OURS, *PEERS, TRITON_EMPTY)
BARE = "bare"
NAMES = (BARE, *(system.name for system in EVERY))
