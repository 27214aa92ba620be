"""A model as requests meet it: decode → preprocess → run_model → postprocess → encode, on one version's threads."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dl_inference_core import children
from dl_inference_core.coroutines import Coroutines
from dl_inference_core.errors import (
    AttemptCancelled,
    BadRequest,
    Code,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
    ModelNotFound,
    ModelNotReady,
)
from dl_inference_core.failures import fail
from dl_inference_core.metrics import Metrics
from dl_inference_core.node.backend import Model, Signature, TensorSpec
from dl_inference_core.node.batching import Batching, NotRowwise, Part
from dl_inference_core.node.handler_inputs import check_answer, inputs_of, kind_of, refused_by, unchanged
from dl_inference_core.node.handling import Handler, narrow
from dl_inference_core.node.load import LoadMeter, Work
from dl_inference_core.node.reclaiming import Remains
from dl_inference_core.node.rehearsal import rehearse
from dl_inference_core.node.scheduling import CallJob, Outbox, QueueLimits, Worker, Workers, as_failure
from dl_inference_core.node.sources import Sources
from dl_inference_core.tensors import Request
from dl_inference_core.transport import Answer, Exchange
from dl_inference_core.wire import messages, openinference, tfserving_examples, tfserving_models
from dl_inference_core.wire.protocol import (
    METADATA,
    MULTI_INFERENCE,
    PROTOCOLS,
    READY,
    SIGNATURES,
    TRANSFORMS,
    VERSIONS,
    Protocol,
)
from dl_inference_core.wire.templates import Templates

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One copy of a version's model, and what is done before and after it."""

    model: Model
    handler: Handler


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one version's folder gave.

    Attributes:
        instances: at least one; all of the same files.
        platform: the backend's name.
        threads: how many threads may run each instance.
        batching: None is one request at a time.
        folder: the version's.
        sources: the modules that were imported for it.
    """

    instances: tuple[Instance, ...]
    platform: str
    threads: int = 1
    batching: Batching | None = None
    queue: QueueLimits = field(default_factory=QueueLimits)
    folder: Path = Path()
    sources: Sources = field(default_factory=Sources)

    @property
    def model(self) -> Model:
        """The first instance's."""
        return self.instances[0].model


def unload(instances: list[Instance], sources: Sources, leads: list[object] | None = None) -> None:
    """Close each model, whatever becomes of another, forget the sources, and free the memory of all. Runs on a thread
    of the version.

    Args:
        instances: emptied; the caller must hold nothing of them elsewhere.
        leads: further objects that may lead to parts of the models; emptied as well.
    """
    leads = leads if leads is not None else []
    kinds = {type(instance.model) for instance in instances}
    remains = Remains(*instances, *leads)
    leads.clear()
    try:
        _close(instances, sources)
    finally:
        instances.clear()
        remains.reclaim()
        for kind in kinds:
            kind.return_memory()


def _close(instances: Sequence[Instance], sources: Sources) -> None:
    with ExitStack() as stack:  # each, whatever becomes of another
        stack.callback(sources.close)
        for instance in instances:
            stack.callback(instance.model.close)


class LoadedVersion:
    """One version of a model in memory, with threads of its own, on which all of it happens, `Model.close` too."""

    def __init__(self, model_name: str, number: int, meter: LoadMeter, metrics: Metrics | None = None) -> None:
        """Args:
        metrics: counts the sizes of batches.
        """
        self.number = number
        self._metrics = metrics
        self._model_name = model_name
        self._meter = meter
        self._work: Work
        self._workers = Workers(f"{model_name}/{number}")
        self._loaded: Loaded | None = None
        self._templates: dict[str, Templates] = {}
        self._complained = False

    async def load(self, load: Callable[[], Loaded]) -> None:
        """Fill this version with what `load` gives. Whatever comes of that, cancellation too, `close` must follow.

        Raises:
            InferenceError: what `load` raised; HandlerFailed for what is none.
        """

        def job() -> None:
            self._loaded = loaded = load()
            batching = loaded.batching
            if batching is None:
                self._workers.configure(loaded.queue)
            else:
                self._workers.configure(loaded.queue, batching.max_rows, holds=batching.delay_s > 0)
            self._work = self._meter.watch(self._workers.worked, len(loaded.instances) * loaded.threads)

        await self._workers.run(job)
        self._workers.grow(len(self.loaded.instances) * self.loaded.threads)

    @property
    def _where(self) -> str:
        return f'model "{self._model_name}" version {self.number}'

    @property
    def loaded(self) -> Loaded:
        """What was loaded; not before `load` has ended."""
        assert self._loaded is not None
        return self._loaded

    def begin(
        self,
        exchange: Exchange,
        protocol: Protocol,
        request: Request | None = None,
        *,
        priority: int = 0,
        expires: float = math.inf,
    ) -> asyncio.Future[bytes | Request]:
        """Queue an exchange. Gives the answer's bytes; or the request, decoded, where it names another version. Event
        loop only.

        Args:
            priority, expires: as in `CallJob`.

        Raises:
            InferenceError: Overloaded, BadRequest or DeadlineExceeded before any work. What handler or model raised
                becomes the future's exception.
        """
        future: asyncio.Future[bytes | Request] = asyncio.get_running_loop().create_future()
        self._workers.submit(_Asked(self, exchange, protocol, request, future, priority=priority, expires=expires))
        return future

    def begin_each(self, exchange: Exchange, requests: Sequence[Request]) -> asyncio.Future[bytes]:
        """Queue a MultiInference call, which asked for all of `requests`; the first failure ends it.

        Raises:
            InferenceError: as `begin`.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._workers.submit(_AskedForEach(self, exchange, requests, future))
        return future

    def _instance(self, worker: Worker) -> Instance:
        """What that thread runs."""
        instances = self.loaded.instances
        return instances[worker.number % len(instances)]

    def answer_together(self, together: list[_Asked], worker: Worker, outbox: Outbox) -> int:
        """Answer the one in `together` and, where requests share batches, those that come in time, which are added.
        Returns how many came as far as the model."""
        instance = self._instance(worker)
        batching = self.loaded.batching
        with instance.model.session():
            if batching is None:
                return self._answer_alone(instance, together[0], outbox)
            parts = self._gather(instance, batching, together, worker, outbox)
            worker.closed(len(parts), sum(part.rows for part in parts))
            for batch in batching.batches(parts):
                self._answer_batch(instance, batching, batch, outbox)
        return len(parts)

    def _gather(
        self, instance: Instance, batching: Batching, together: list[_Asked], worker: Worker, outbox: Outbox
    ) -> list[Part]:
        """What requests bring: that of the one in `together` and of those that come in time, which are added. Those
        that need no model are answered."""
        parts: list[Part] = []
        rows = answered = 0
        until = together[0].since + batching.delay_s
        soonest = math.inf
        asked: _Asked | None = together[0]
        while asked is not None:
            part = self._part(instance, batching, asked, outbox)
            if part is None:
                outbox.send()
                answered += 1
            else:
                parts.append(part)
                rows += part.rows
                deadline = asked.exchange.deadline
                if deadline is None:
                    until = min(until, asked.held_until)
                elif time.monotonic() + worker.takes_s(1) <= deadline:
                    soonest = min(soonest, deadline)
                    until = min(until, asked.held_until)
                # One more would be answered in time, perhaps, but another no longer.
                late = soonest < math.inf and time.monotonic() + worker.takes_s(len(parts) + 1) > soonest
                if late or not part.rows:
                    break
            if rows + answered >= batching.max_rows:
                break
            enough = 1
            if batching.delay_s:
                each = max(rows / len(parts), 1.0) if parts else 1.0
                enough = math.ceil((batching.next_size(rows) - rows) / each)
            asked = worker.take(_Asked, 0.0 if rows in batching.preferred else until, enough)
            if asked is not None:
                together.append(asked)
        return parts

    def answer_all(self, asked: CallJob, requests: Sequence[Request], worker: Worker, outbox: Outbox) -> None:
        """Answer a MultiInference call."""
        if not self._wanted(asked, outbox):
            return
        instance = self._instance(worker)
        answers: list[Any] = []
        try:
            with instance.model.session():
                for request in requests:
                    protocol = PROTOCOLS[f"tfserving_{request.method.name.lower()}"]
                    answers.append(self._answer_one(instance, self._codec(protocol), request))
            encoded = self._stage("encoding the answer", tfserving_examples.encode_multi_inference, requests, answers)
            outbox.put(asked.future, encoded)
        except InferenceError as error:
            outbox.put(asked.future, None, error)

    def _part(self, instance: Instance, batching: Batching, asked: _Asked, outbox: Outbox) -> Part | None:
        """What `asked` brings into a batch; None if it is answered already."""
        request = self._request(asked, outbox)
        if request is None:
            return None
        try:
            inputs = self._inputs(instance, request)
            part: Part = self._stage("batching", batching.part, asked, request, inputs)
        except InferenceError as error:
            outbox.put(asked.future, None, error)
            return None
        return part

    def _answer_batch(self, instance: Instance, batching: Batching, batch: Sequence[Part], outbox: Outbox) -> None:
        """Answer `batch` by one call of the model. A batch that fails is halved again and again: one request at fault
        among N costs 2 log2 N more calls. Where the outputs cannot be taken apart, each request is called for alone."""
        batch = [part for part in batch if self._wanted(part.asked, outbox)]
        if not batch:
            return
        requests = [part.request for part in batch]

        def model(inputs: Any) -> Any:
            return instance.handler.run_batch(instance.model, inputs, requests)

        try:
            inputs, request = batch[0].inputs, batch[0].request
            shares = self._run_model(instance, inputs, request, batching.run, batch, model, self._count_rows)
        except InferenceError as error:
            if isinstance(error.__cause__, NotRowwise):
                self._complain(error.__cause__)
            if len(batch) == 1:
                outbox.put(batch[0].asked.future, None, error)
                return
            half = len(batch) // 2
            alone = isinstance(error.__cause__, NotRowwise)
            for smaller in ([part] for part in batch) if alone else (batch[:half], batch[half:]):
                self._answer_batch(instance, batching, smaller, outbox)
            return
        for part, outputs in zip(batch, shares, strict=True):
            try:
                answer = self._finish(instance, self._codec(part.asked.protocol), part.request, outputs)
            except InferenceError as error:
                outbox.put(part.asked.future, None, error)
            else:
                outbox.put(part.asked.future, answer)
        outbox.send()

    def _count_rows(self, rows: int) -> None:
        """Count a call of the model with so many rows of requests; none are known where inputs have no rows."""
        if self._metrics is not None and rows:
            self._metrics.batch(self._model_name, rows)

    def _complain(self, why: NotRowwise) -> None:
        """Say, once, that requests share calls for nothing."""
        if not self._complained:
            self._complained = True
            _log.error(
                'model "%s" version %d is called again for each request of a batch, for %s: '
                "say enabled = false under [batching] in model.toml",
                self._model_name,
                self.number,
                why,
            )

    def _answer_alone(self, instance: Instance, asked: _Asked, outbox: Outbox) -> int:
        """Returns whether it came as far as the model, as a number."""
        request = self._request(asked, outbox)
        if request is None:
            return 0
        try:
            outbox.put(asked.future, self._answer_one(instance, self._codec(asked.protocol), request))
        except InferenceError as error:
            outbox.put(asked.future, None, error)
        return 1

    def _answer_one(self, instance: Instance, codec: Templates, request: Request) -> bytes:
        """The answer to one request, on one of the threads and in the model's session.

        Raises:
            InferenceError: HandlerFailed for what is none.
        """
        inputs = self._inputs(instance, request)
        run_model = instance.handler.run_model
        outputs = self._run_model(instance, inputs, request, run_model, instance.model, inputs, request)
        return self._finish(instance, codec, request, outputs)

    def _inputs(self, instance: Instance, request: Request) -> Any:
        """What the model takes: what `preprocess` returns, which is not asked where it is known to change nothing."""
        template, handler = request.template, instance.handler
        if template is not None and template.inputs:
            payload: Any = request.payload
            return {name: payload[name] for name in template.inputs}
        inputs = self._stage("preprocess", inputs_of, handler, request)
        children.end_child()  # a framework's threads are not there in a child, and its model may hang
        if template is not None and template.inputs is None:
            template.inputs = unchanged(inputs, request.payload) if handler.takes_what_fits else ()
        return inputs

    def _codec(self, protocol: Protocol) -> Templates:
        """What decodes requests for this version, and encodes its answers."""
        templates = self._templates.get(protocol.codec_at)
        if templates is None:
            templates = Templates(protocol.codec, self._model_name, self.number)
            if type(protocol) is Protocol:  # REST makes a protocol of its own for each request
                self._templates[protocol.codec_at] = templates
        return templates

    def _request(self, asked: _Asked, outbox: Outbox) -> Request | None:
        """What is asked for; None if there is nothing more to be done, for this version at least."""
        if not self._wanted(asked, outbox):
            return None
        if asked.request is not None:
            return asked.request
        try:
            request: Request = self._stage(
                "decoding a request", self._codec(asked.protocol).decode_request, asked.exchange.message
            )
        except InferenceError as error:
            outbox.put(asked.future, None, error)
            return None
        if request.version not in (None, self.number) or request.label:
            outbox.put(asked.future, replace(request, template=None))  # which is this version's
            return None
        return request

    def _wanted(self, asked: CallJob, outbox: Outbox) -> bool:
        """Whether somebody waits for it and has time."""
        deadline = asked.exchange.deadline
        if deadline is not None and time.monotonic() >= deadline:
            late = DeadlineExceeded(f'the deadline passed in the queue of model "{self._model_name}"')
            outbox.put(asked.future, None, late)
            return False
        return not asked.future.done()

    def _finish(self, instance: Instance, codec: Templates, request: Request, outputs: Any) -> bytes:
        payload = self._stage("postprocess", instance.handler.postprocess, outputs, request)
        return self._stage("encoding the answer", _encoded, codec, instance.model, request, payload)  # type: ignore[no-any-return]

    def _stage(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except InferenceError:
            raise
        except BaseException as error:
            raise as_failure(error, f"{self._where}: {stage} failed: ") from error

    def _run_model(
        self, instance: Instance, inputs: Any, request: Request, function: Callable[..., Any], *args: Any
    ) -> Any:
        """What `function`, which calls the model, returns.

        Args:
            inputs, request: what the model is called with, and for which request; of a batch the first.

        Raises:
            InferenceError: as `_stage`; HandlerFailed where the model refused what the handler's own `preprocess` had
                made, rather than what the client had sent.
        """
        try:
            return function(*args)
        except InferenceError as error:
            made = instance.handler.makes_inputs and not unchanged(inputs, request.payload)
            if not (isinstance(error, BadRequest) and made and refused_by(instance.model, error)):
                raise
            raise HandlerFailed(f"{self._where}: it refuses what preprocess returned: {error}") from error
        except BaseException as error:
            explained = instance.model.explain(error)  # a handler may call the framework's own model
            if isinstance(explained, BadRequest):
                explained = HandlerFailed(f"{self._where}: run_model failed: {explained}")
            raise as_failure(explained, f"{self._where}: run_model failed: ") from error

    async def rehearse(self) -> str:
        """As `rehearsal.rehearse`, on one of the threads, for the first instance.

        Raises:
            InferenceError: the handler cannot answer.
        """

        def job() -> str:
            instance = self.loaded.instances[0]
            with instance.model.session():
                return rehearse(self.loaded.folder, instance.model, instance.handler)

        return await self._workers.run(job)

    def waiting(self) -> int:
        """How many requests wait for one of the threads. Any thread."""
        return self._workers.waiting()

    async def close(self) -> None:
        """Finish what was asked for, then close the model and free its memory."""
        await self._workers.close(self._release)

    def _release(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._meter.forget(self._work)
        instances, sources = list(loaded.instances), loaded.sources
        del loaded  # or the models would outlive `unload`
        unload(instances, sources)


def _encoded(codec: Templates, model: Model, request: Request, payload: Any) -> bytes:
    """Raises:
    BadRequest: the request asks for an output that is not in `payload`.
    TypeError: the protocol cannot hold `payload`.
    """
    check_answer(payload)
    try:
        return codec.encode_response(narrow(payload, request), request)
    except TypeError as error:
        failure = error
    try:  # the framework's own tensors, perhaps
        return codec.encode_response(narrow(model.to_numpy(payload), request), request)
    except TypeError as error:
        failure = error
    except RecursionError:  # it is nested more deeply than Python recurses
        pass
    raise TypeError(f"{failure}; postprocess returned {kind_of(payload)}") from failure


class _Asked(CallJob):
    """A request for one inference."""

    __slots__ = ("_version", "protocol", "request")

    def __init__(
        self,
        version: LoadedVersion,
        exchange: Exchange,
        protocol: Protocol,
        request: Request | None,
        future: asyncio.Future[Any],
        *,
        priority: int,
        expires: float,
    ) -> None:
        super().__init__(exchange, future, priority=priority, expires=expires)
        self._version = version
        self.protocol = protocol
        self.request = request

    def run(self, worker: Worker) -> int:
        outbox, together, requests = Outbox(), [self], 0
        try:
            requests = self._version.answer_together(together, worker, outbox)
        except BaseException as error:  # a model's session, say: whatever it is, everybody is answered
            for asked in together:
                outbox.put(asked.future, None, as_failure(error))
        outbox.send()
        return requests


class _AskedForEach(CallJob):
    """A MultiInference call."""

    __slots__ = ("_requests", "_version")

    def __init__(
        self, version: LoadedVersion, exchange: Exchange, requests: Sequence[Request], future: asyncio.Future[Any]
    ) -> None:
        super().__init__(exchange, future)
        self._version = version
        self._requests = requests

    def run(self, worker: Worker) -> int:
        outbox = Outbox()
        try:
            self._version.answer_all(self, self._requests, worker, outbox)
        except BaseException as error:
            outbox.put(self.future, None, as_failure(error))
        outbox.send()
        return 0


class ServedModel:
    """One model and its versions, as one event loop sees them. Only the repository changes it, by `publish`."""

    def __init__(self, name: str, meter: LoadMeter) -> None:
        self.name = name
        self._meter = meter
        self._decoding = Coroutines()
        self.task_id: int | None = None
        self.versions: Mapping[int, VersionStatus] = MappingProxyType({})
        """Every version that is served, is to be, or was until a moment ago."""
        self.refusal = ""
        """Why its folder, as it is now, cannot be taken; "" if it can. What was loaded before stays."""
        self.unserved_labels: Mapping[str, int] = MappingProxyType({})
        """The labels of its config whose versions are not loaded. Each stays where it was, if it was anywhere."""
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
        unserved_labels: Mapping[str, int],
        refusal: str,
    ) -> None:
        """Replace everything, in one step. What is not in `loaded` gets no more requests and may be closed."""
        self.task_id = task_id
        self.versions = MappingProxyType(dict(versions))
        self._loaded = loaded
        self._labels = labels
        self.unserved_labels = MappingProxyType(dict(unserved_labels))
        self.refusal = refusal
        self._newest = loaded[max(loaded)] if loaded else None

    def waiting(self) -> int:
        """How many requests wait for a thread of any version. Any thread."""
        return sum(version.waiting() for version in self._loaded.values())

    @property
    def loaded(self) -> Mapping[int, LoadedVersion]:
        """The versions that answer requests, by number."""
        return self._loaded

    def describe_labels(self) -> str:
        """What is wrong with `unserved_labels`; "" if there are none."""
        if not self.unserved_labels:
            return ""
        said = ", ".join(f'"{label}" is version {number}' for label, number in sorted(self.unserved_labels.items()))
        loaded = ", ".join(map(str, sorted(self._loaded))) or "none"
        return f"version_labels: {said}; expected versions that are loaded, which are {loaded}"

    @property
    def ready(self) -> bool:
        """Whether requests that name no version are answered."""
        return self._newest is not None

    def begin(self, exchange: Exchange, protocol: Protocol) -> None:
        """Have one version answer `exchange` from beginning to end: the one that it names by number or label, or the
        newest. `protocol` may also be one of `protocol.QUESTIONS` or `protocol.TRANSFORMS`. Event loop only.

        The client's leaving takes the request out of the queue; what runs already runs to its end. The exchange fails
        with:

        - ModelNotFound: there is no such version.
        - ModelNotReady: that version, or with none named every version, cannot answer now.
        - DeadlineExceeded: its deadline had passed before the request's turn came.
        - BadRequest: the request is malformed or does not fit the model; no version has that label.
        - HandlerFailed: handler or model raised, or the protocol cannot hold the answer.
        """
        if protocol.codec_at:
            try:
                self._infer(exchange, protocol)
            except InferenceError as error:
                self._fail(exchange, error)
        elif protocol is MULTI_INFERENCE:
            self._decoding.answer(exchange, self._multi_inference)
        else:
            exchange.reply(_QUESTIONS[protocol.name](self, exchange))

    def _infer(self, exchange: Exchange, protocol: Protocol) -> None:
        priority, expires = 0, math.inf
        if protocol.read_queueing is not None:
            asked = protocol.read_queueing(exchange.message)
            priority = asked.priority
            if asked.timeout_s:
                expires = time.monotonic() + asked.timeout_s

        def queue(version: LoadedVersion, request: Request | None) -> None:
            # Between `_pick` and here nothing waits: a version gets no request after `publish` without it.
            answering = version.begin(exchange, protocol, request, priority=priority, expires=expires)
            exchange.on_cancel(answering.cancel)
            answering.add_done_callback(answered)

        def answered(answering: asyncio.Future[bytes | Request]) -> None:
            if answering.cancelled():
                exchange.fail(AttemptCancelled("the request was cancelled"))  # nothing, if the client has left
                return
            if (error := answering.exception()) is not None:
                self._fail(exchange, error)
                return
            answer = answering.result()
            if not isinstance(answer, Request):
                exchange.reply(answer, self._meter.answered())
                return
            try:
                queue(self._pick_for(answer), answer)
            except InferenceError as failure:
                self._fail(exchange, failure)

        queue(self._pick(None), None)

    def _fail(self, exchange: Exchange, error: BaseException) -> None:
        if isinstance(error, InferenceError):
            error.trailers = self._meter.answered(error)
        fail(exchange, error)

    async def _multi_inference(self, exchange: Exchange) -> Answer:
        try:
            requests = await asyncio.to_thread(tfserving_examples.decode_multi_inference, exchange.message)
            answer = await self._pick_for(requests[0]).begin_each(exchange, requests)
        except InferenceError as error:
            error.trailers = self._meter.answered(error)
            raise
        return Answer(answer, self._meter.answered())

    def _same_message(self, exchange: Exchange) -> bytes:
        self._pick(None)
        return bytes(exchange.message)

    def _metadata(self, exchange: Exchange) -> bytes:
        # Name and version stand where they stand in a ModelInferRequest.
        loaded = self._pick(openinference.decode_request(exchange.message).version).loaded
        signature = loaded.model.signature
        return openinference.encode_metadata(
            self.name,
            sorted(self._loaded),
            loaded.model.platform or loaded.platform,
            inputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.inputs],
            outputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.outputs],
        )

    def _ready(self, exchange: Exchange) -> bytes:
        try:
            self._pick(openinference.decode_request(exchange.message).version)
        except ModelNotReady:
            ready = False
        else:
            ready = True
        body: bytes = messages.ModelReadyResponse(ready=ready).SerializeToString()
        return body

    def _signatures(self, exchange: Exchange) -> bytes:
        version = self._pick_for(tfserving_models.decode_metadata_request(exchange.message))
        signatures = version.loaded.model.signatures
        return tfserving_models.encode_metadata(
            self.name,
            version.number,
            {
                name: tfserving_models.DescribedSignature(
                    method=signature.method,
                    inputs=_described(signature.inputs),
                    outputs=_described(signature.outputs),
                    defaults={spec.name: spec.default for spec in signature.inputs if spec.default is not None},
                )
                for name, signature in signatures.items()
            },
        )

    def _status(self, exchange: Exchange) -> bytes:
        # TensorFlow Serving passes over a label here, and tells the states of all versions.
        number = tfserving_models.decode_status_request(exchange.message).version
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
            loading = any(status.state is State.LOADING for status in self.versions.values())
            what = "still loading" if loading else "not ready"
            raise ModelNotReady(f'model "{self.name}" is {what}: {self._why()}')
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


_QUESTIONS: Mapping[str, Callable[[ServedModel, Exchange], bytes]] = {
    METADATA.name: ServedModel._metadata,
    READY.name: ServedModel._ready,
    SIGNATURES.name: ServedModel._signatures,
    VERSIONS.name: ServedModel._status,
    **{transform.name: ServedModel._same_message for transform in TRANSFORMS},
}
_TENSORFLOWS_STATES = {
    State.LOADING: "LOADING",
    State.AVAILABLE: "AVAILABLE",
    State.UNLOADING: "UNLOADING",
    State.FAILED: "END",
}


def _described(specs: Iterable[TensorSpec]) -> list[tfserving_models.Described]:
    return [(spec.name, spec.native_name, spec.dtype, spec.shape) for spec in specs]
