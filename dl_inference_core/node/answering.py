"""A model as requests meet it: decode → preprocess → run_model → postprocess → encode, on one version's threads."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from dl_inference_core.errors import (
    BadRequest,
    Code,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    ModelNotFound,
    ModelNotReady,
)
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.handling import Handler, narrow
from dl_inference_core.node.load import LoadMeter, Work
from dl_inference_core.tensors import Request, Response
from dl_inference_core.transport import Call
from dl_inference_core.wire import openinference, tfserving_examples, tfserving_models
from dl_inference_core.wire.protocol import METADATA, MULTI_INFERENCE, PROTOCOLS, SIGNATURES, VERSIONS, Protocol

T = TypeVar("T")

_log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a version is in its life."""

    LOADING = "loading"
    AVAILABLE = "available"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionStatus:
    """Attributes:
    state: AVAILABLE as long as requests are answered, whatever became of newer files.
    error: why the files as they are now cannot be loaded, with every cause; "" if they can.
    """

    state: State
    error: str = ""


class Workers:
    """Threads that run functions in the order they came, one at first. Daemons: a stuck model cannot keep the
    process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._spent: list[_Spent] = []
        self._at_end: Callable[[], None]
        self.grow(1)

    def grow(self, threads: int) -> None:
        """Have that many threads; fewer than there are changes nothing."""
        for number in range(self._threads, threads):
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}#{number}", daemon=True).start()

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function` on one of the threads. If the caller is cancelled before its turn, it never runs.

        Raises:
            InferenceError: what `function` raised; HandlerFailed for what is none.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((function, future))
        return await future

    async def close(self, at_end: Callable[[], None]) -> None:
        """Wait for everything that `run` was asked for; the last thread calls `at_end`. Call it once, and `run` no
        more."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._at_end = partial(self._end, at_end, ended)
        for _ in range(self._threads):
            self._jobs.put(None)
        # Cancelling one who waits must not cancel what the last thread does.
        await asyncio.shield(ended)

    def worked(self) -> float:
        """The seconds that all threads together have spent on functions, those that run now included. Any thread."""
        now = time.monotonic()
        return sum(seconds + max(now - since, 0.0) for seconds, since in [spent.state for spent in self._spent])

    def _work(self) -> None:
        spent = _Spent()
        self._spent.append(spent)
        seconds = 0.0
        while (job := self._jobs.get()) is not None:
            since = time.monotonic()
            spent.state = seconds, since
            _run(*job)
            del job  # or its request would live until the next one
            seconds += time.monotonic() - since
            spent.state = seconds, math.inf
        with self._lock:
            self._threads -= 1
            last = not self._threads
        if last:
            self._at_end()

    def _end(self, at_end: Callable[[], None], ended: asyncio.Future[None]) -> None:
        try:
            at_end()
        except Exception:
            _log.exception("closing %s failed", self._name)
        _deliver(ended, None, None)


class _Spent:
    """A thread's time: the seconds on functions before, and since when it runs the one of now. Only the thread writes,
    always both at once."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = (0.0, math.inf)


def _run(function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
    if future.cancelled():
        return
    try:
        result = function()
    except InferenceError as error:
        _deliver(future, None, error)
    except BaseException as error:  # even a handler's SystemExit must be answered
        failure = HandlerFailed(in_short(error))
        failure.__cause__ = error
        _deliver(future, None, failure)
    else:
        _deliver(future, result, None)


def _deliver(future: asyncio.Future[Any], result: Any, error: InferenceError | None) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        future.get_loop().call_soon_threadsafe(settle)


def in_short(error: BaseException) -> str:
    """The type and the first line of `error`, for a status message."""
    text = str(error).strip().partition("\n")[0]
    if len(text) > 200:
        text = f"{text[:199]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one version's folder gave.

    Attributes:
        platform: the backend's name.
        threads: how many threads may run the model.
    """

    model: Model
    handler: Handler
    platform: str
    threads: int


class LoadedVersion:
    """One version of a model in memory, with threads of its own, on which all of it happens, `Model.close` too."""

    def __init__(self, model_name: str, number: int, meter: LoadMeter) -> None:
        self.number = number
        self._model_name = model_name
        self._meter = meter
        self._work: Work
        self._workers = Workers(f"{model_name}/{number}")
        self._loaded: Loaded | None = None

    async def load(self, load: Callable[[], Loaded]) -> None:
        """Fill this version with what `load` gives. Whatever comes of that, cancellation too, `close` must follow.

        Raises:
            InferenceError: what `load` raised; HandlerFailed for what is none.
        """

        def job() -> None:
            self._loaded = loaded = load()
            self._work = self._meter.watch(self._workers.worked, loaded.threads)

        await self._workers.run(job)
        self._workers.grow(self.loaded.threads)

    @property
    def loaded(self) -> Loaded:
        """What was loaded; not before `load` has ended."""
        assert self._loaded is not None
        return self._loaded

    async def answer(self, call: Call, protocol: Protocol, request: Request | None = None) -> bytes | Request:
        """The answer's bytes; or the request, decoded, where it names another version.

        Raises:
            InferenceError: DeadlineExceeded before any work; HandlerFailed for what handler or model raised.
        """
        return await self._workers.run(partial(self._answer, call, protocol, request))

    async def answer_each(self, call: Call, requests: Sequence[Request]) -> bytes:
        """The answer to a MultiInference call, which asked for all of `requests`.

        Raises:
            InferenceError: as `answer`; the first failure ends it.
        """

        def job() -> bytes:
            answers: list[Any] = [
                self._answer(call, PROTOCOLS[f"tfserving_{request.method.name.lower()}"], request)
                for request in requests
            ]
            return tfserving_examples.encode_multi_inference(requests, answers)

        return await self._workers.run(job)

    def _answer(self, call: Call, protocol: Protocol, request: Request | None) -> bytes | Request:
        if call.deadline is not None and time.monotonic() >= call.deadline:
            raise DeadlineExceeded(f'the deadline passed in the queue of model "{self._model_name}"')
        loaded = self.loaded
        model, handler = loaded.model, loaded.handler
        stage = "decoding a request"
        try:
            if request is None:
                request = protocol.codec.decode_request(call.request)
                if request.version not in (None, self.number) or request.label:
                    return request
            with model.session():
                stage = "preprocess"
                inputs = handler.preprocess(request)
                stage = "run_model"
                outputs = handler.run_model(model, inputs, request)
                stage = "postprocess"
                payload = handler.postprocess(outputs, request)
            stage = "encoding the answer"
            response = Response(
                payload=narrow(payload, request),
                model=self._model_name,
                version=self.number,
                tags=request.tags,
                id=request.id,
            )
            return protocol.codec.encode_response(response, request)
        except InferenceError:
            raise
        except BaseException as error:
            raise HandlerFailed(
                f'model "{self._model_name}" version {self.number}: {stage} failed: {in_short(error)}'
            ) from error

    async def close(self) -> None:
        """Finish what was asked for, then close the model and let go of it."""
        await self._workers.close(self._release)

    def _release(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._meter.forget(self._work)
            loaded.model.close()


class ServedModel:
    """One model and its versions, as one event loop sees them. Only the repository changes it, by `publish`."""

    def __init__(self, name: str, meter: LoadMeter) -> None:
        self.name = name
        self._meter = meter
        self.task_id: int | None = None
        self.versions: Mapping[int, VersionStatus] = MappingProxyType({})
        """Every version that is served, is to be, or was until a moment ago."""
        self.refusal = ""
        """Why its folder, as it is now, cannot be taken; "" if it can. What was loaded before stays."""
        self._loaded: Mapping[int, LoadedVersion] = {}
        self._labels: Mapping[str, int] = {}
        self._newest: LoadedVersion | None = None

    def publish(
        self,
        *,
        task_id: int | None,
        loaded: Mapping[int, LoadedVersion],
        versions: Mapping[int, VersionStatus],
        labels: Mapping[str, int],
        refusal: str,
    ) -> None:
        """Replace everything, in one step. What is not in `loaded` gets no more requests and may be closed."""
        self.task_id = task_id
        self.versions = MappingProxyType(dict(versions))
        self._loaded = loaded
        self._labels = labels
        self.refusal = refusal
        self._newest = loaded[max(loaded)] if loaded else None

    @property
    def ready(self) -> bool:
        """Whether requests that name no version are answered."""
        return self._newest is not None

    async def answer(self, call: Call, protocol: Protocol) -> bytes:
        """The answer to `call`, from beginning to end by one version: the one that it names by number or label, or the
        newest. `protocol` may also be one of `protocol.QUESTIONS`.

        Cancelling it takes the request out of the queue; what runs already runs to its end.

        Raises:
            ModelNotFound: no such version.
            ModelNotReady: that version, or with none named every version, cannot answer now.
            DeadlineExceeded: `call.deadline` had passed before the request's turn came.
            BadRequest: the request is malformed or does not fit the model; no version has that label.
            HandlerFailed: handler or model raised, or the protocol cannot hold the answer; its cause is attached.
        """
        if not protocol.codec_at and protocol is not MULTI_INFERENCE:
            return await _QUESTIONS[protocol.name](self, call)
        try:
            answer = await (self._infer(call, protocol) if protocol.codec_at else self._multi_inference(call))
        except InferenceError as error:
            self._meter.answered(call, error)
            raise
        self._meter.answered(call)
        return answer

    async def _infer(self, call: Call, protocol: Protocol) -> bytes:
        # Between `_pick` and the queue nothing waits: a version gets no request after `publish` without it.
        answer = await self._pick(None).answer(call, protocol)
        while isinstance(answer, Request):
            answer = await self._pick_for(answer).answer(call, protocol, answer)
        return answer

    async def _multi_inference(self, call: Call) -> bytes:
        requests = await asyncio.to_thread(tfserving_examples.decode_multi_inference, call.request)
        return await self._pick_for(requests[0]).answer_each(call, requests)

    async def _metadata(self, call: Call) -> bytes:
        # Name and version stand where they stand in a ModelInferRequest.
        loaded = self._pick(openinference.decode_request(call.request).version).loaded
        signature = loaded.model.signature
        return openinference.encode_metadata(
            self.name,
            sorted(self._loaded),
            loaded.platform,
            inputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.inputs],
            outputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.outputs],
        )

    async def _signatures(self, call: Call) -> bytes:
        version = self._pick_for(tfserving_models.decode_metadata_request(call.request))
        signatures = version.loaded.model.signatures
        return tfserving_models.encode_metadata(
            self.name,
            version.number,
            {
                name: (signature.method, _described(signature.inputs), _described(signature.outputs))
                for name, signature in signatures.items()
            },
        )

    async def _status(self, call: Call) -> bytes:
        asked = tfserving_models.decode_status_request(call.request)
        number = self._labelled(asked.label) if asked.label else asked.version
        statuses = {n: status for n, status in sorted(self.versions.items(), reverse=True) if number in (None, n)}
        if not statuses:
            which = "any versions" if number is None else f"version {number}"
            raise ModelNotFound(f"Could not find {which} of model {self.name}")
        return tfserving_models.encode_status(
            (
                n,
                _TENSORFLOWS_STATES[status.state],
                (Code.UNKNOWN if status.state is State.FAILED else Code.OK).value,
                status.error,
            )
            for n, status in statuses.items()
        )

    def signature(self, version: int | None = None) -> Signature:
        """What that version, or the newest, takes and gives.

        Raises:
            ModelNotFound, ModelNotReady: as `answer`.
        """
        return self._pick(version).loaded.model.signature

    def platform(self, version: int | None = None) -> str:
        """The name of the backend that runs that version, or the newest.

        Raises:
            ModelNotFound, ModelNotReady: as `answer`.
        """
        return self._pick(version).loaded.platform

    def _pick_for(self, request: Request) -> LoadedVersion:
        return self._pick(self._labelled(request.label) if request.label else request.version)

    def _labelled(self, label: str) -> int:
        if label not in self._labels:
            have = ", ".join(f'"{known}"' for known in sorted(self._labels)) or "none"
            raise BadRequest(
                f'Unrecognized servable version label: {label[:100]}; model "{self.name}" has the labels {have}'
            )
        return self._labels[label]

    def _pick(self, version: int | None) -> LoadedVersion:
        picked = self._newest if version is None else self._loaded.get(version)
        if picked is not None:
            return picked
        if version is None:
            raise ModelNotReady(f'model "{self.name}" is not ready: {self._why()}')
        if version in self.versions:
            state = self.versions[version].state.value
            raise ModelNotReady(f'version {version} of model "{self.name}" is not ready: it is {state}')
        have = ", ".join(map(str, sorted(self._loaded))) or "none"
        raise ModelNotFound(
            f"Servable not found for request: Specific({self.name}, {version}); "
            f'model "{self.name}" has no version {version}; it has {have}'
        )

    def _why(self) -> str:
        return (
            ", ".join(f"version {number} is {status.state.value}" for number, status in sorted(self.versions.items()))
            or "it has no versions"
        )


_QUESTIONS: Mapping[str, Callable[[ServedModel, Call], Awaitable[bytes]]] = {
    METADATA.name: ServedModel._metadata,
    SIGNATURES.name: ServedModel._signatures,
    VERSIONS.name: ServedModel._status,
}
_TENSORFLOWS_STATES = {
    State.LOADING: "LOADING",
    State.AVAILABLE: "AVAILABLE",
    State.UNLOADING: "UNLOADING",
    State.FAILED: "END",
}


def _described(specs: Iterable[TensorSpec]) -> list[tfserving_models.Described]:
    return [(spec.name, spec.native_name, spec.dtype, spec.shape) for spec in specs]
