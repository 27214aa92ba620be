"""The way of a batch on a model thread: decode → preprocess → model → postprocess → encode.

A model thread calls `Execution.run` with the first request. The batcher takes the others from that thread. Every
request is answered or failed here, whatever handler and model do. The answers of a batch go back together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from dl_inference_core import children
from dl_inference_core.errors import (
    BadRequest,
    Blame,
    DeadlineExceeded,
    HandlerFailed,
    InferenceError,
)
from dl_inference_core.failures import as_inference_error, fail
from dl_inference_core.node.batcher import BatchCost, Batcher
from dl_inference_core.node.batching import Batching, NotRowwise, Part
from dl_inference_core.node.handler_inputs import check_answer, inputs_of, kind_of, refused_by, unchanged
from dl_inference_core.node.handling import narrow
from dl_inference_core.node.kinds import Kinds, request_kind
from dl_inference_core.node.queue import QueuedRequest
from dl_inference_core.node.suspects import Suspects, client_of
from dl_inference_core.tensors import Request, Response
from dl_inference_core.wire.protocol import Protocol

if TYPE_CHECKING:
    from dl_inference_core.metrics import Metrics
    from dl_inference_core.node.backend import Model
    from dl_inference_core.node.load import LoadMeter
    from dl_inference_core.node.model_threads import ModelThread
    from dl_inference_core.node.version import Instance
    from dl_inference_core.transport import Reply
    from dl_inference_core.wire.codecs import Codec, SeveralCodec

_log = logging.getLogger(__name__)


def fail_request(meter: LoadMeter, request: QueuedRequest, error: InferenceError) -> None:
    """End `request` with `error`, unless it has ended. Any thread."""
    if not request.ended:
        request.end()
        error.trailers = meter.answered(error)
        fail(request.exchange, error)


class Completions:
    """The answers of one batch, until they go back together. One thread's."""

    def __init__(self, meter: LoadMeter, thread: ModelThread) -> None:
        self._meter = meter
        self._thread = thread
        self._replies: list[Reply] = []

    def reply(self, request: QueuedRequest, message: bytes) -> None:
        """Answer `request` at the next `send`, unless it has ended."""
        if not request.ended:
            request.ended = True
            self._replies.append((request.exchange, message, ()))

    def fail(self, request: QueuedRequest, error: InferenceError) -> None:
        """As `fail_request`."""
        if not request.ended:
            self._thread.release(1)
        fail_request(self._meter, request, error)

    def send(self) -> None:
        """Give the answers to the transport."""
        replies, self._replies = self._replies, []
        if not replies:
            return
        self._thread.release(len(replies))
        if trailers := self._meter.answered(count=len(replies)):
            exchange, message, _ = replies[0]
            replies[0] = exchange, message, trailers
        kinds = {type(reply[0]) for reply in replies}  # gRPC's and HTTP's have classes of their own
        for kind in kinds:
            kind.reply_all(replies if len(kinds) == 1 else [reply for reply in replies if type(reply[0]) is kind])


class Execution:
    """Runs requests on the instances of one version. Model threads only."""

    def __init__(
        self,
        model_name: str,
        number: int,
        instances: Sequence[Instance],
        batching: Batching | None,
        *,
        cost: BatchCost,
        meter: LoadMeter,
        metrics: Metrics | None,
    ) -> None:
        self._model_name = model_name
        self._number = number
        self._where = f'model "{model_name}" version {number}'
        self._instances = instances
        self._meter = meter
        self._metrics = metrics
        self._suspects = Suspects()
        self._takes_what_fits = instances[0].handler.takes_what_fits  # all are of one class
        self._batcher = None if batching is None else Batcher(batching, cost, at_once=self._takes_what_fits)
        self._codecs: dict[str, Codec] = {}
        self._kinds = Kinds()
        self._complained = False

    def run(self, first: QueuedRequest, thread: ModelThread) -> int:
        """Answer `first` and the requests that share its batch, which it takes from `thread`. Returns how many came to
        the model. Does not raise."""
        completions, came = Completions(self._meter, thread), 0
        instance = self._instances[thread.number % len(self._instances)]
        try:
            with instance.model.session():
                if first.protocol.several:
                    self._run_signatures(instance, first, completions)
                elif self._batcher is None:
                    came = self._run_alone(instance, first, completions)
                else:
                    came = self._run_together(instance, self._batcher, first, thread, completions)
        except BaseException as error:  # a model's session, say: whatever it is, everybody is answered
            for request in thread.requests:
                completions.fail(request, as_inference_error(error))
        completions.send()
        return came

    # Requests that share calls of the model

    def _run_together(
        self,
        instance: Instance,
        batcher: Batcher,
        first: QueuedRequest,
        thread: ModelThread,
        completions: Completions,
    ) -> int:
        batching = batcher.batching
        parts = batcher.gather(first, thread, partial(self._prepare, instance, batching, completions))
        thread.begin_model(len(parts), sum([part.rows for part in parts]))
        for batch in batching.batches(parts):
            self._run_batch(instance, batching, batch, completions)
        return len(parts)

    def _run_batch(
        self, instance: Instance, batching: Batching, parts: Sequence[Part], completions: Completions
    ) -> None:
        """Answer `parts` by one call of the model. A batch that fails is halved again and again: one request at fault
        among N costs 2 log2 N more calls. Where the outputs cannot be taken apart, each request gets a call."""
        parts = self._wanted(parts, completions)
        if not parts:
            return
        requests = [part.request for part in parts]

        def call(inputs: Any) -> Any:
            return instance.handler.run_batch(instance.model, inputs, requests)

        try:
            shares = self._run_model(
                instance, parts[0], batching.run, parts, call, self._check_wanted, self._count_rows
            )
        except InferenceError as error:
            alone = isinstance(error.__cause__, NotRowwise)
            if alone:
                self._complain(error.__cause__)
            if len(parts) == 1:
                if not alone and error.blame is not Blame.NOBODY:  # the model's fault; its client has left
                    self._suspects.failed(client_of(parts[0].queued.metadata))
                completions.fail(parts[0].queued, error)
                return
            half = len(parts) // 2
            smaller = [[part] for part in parts] if alone else [parts[:half], parts[half:]]
        else:
            self._answer(instance, parts, shares, completions)
            completions.send()
            return
        for batch in smaller:  # not in `except`, where each error would lead to those before it
            self._run_batch(instance, batching, batch, completions)

    def _check_wanted(self, parts: Sequence[Part]) -> None:
        """Between the calls that one batch is split into.

        Raises:
            DeadlineExceeded: nobody waits for any of its requests any more; those whose clients have left have ended.
        """
        if all(part.queued.cancelled() for part in parts):
            raise DeadlineExceeded(f'the deadline passed between two calls of model "{self._model_name}"')

    def _count_rows(self, rows: int) -> None:
        """Count a call of the model with so many rows of requests; none are known where inputs have no rows."""
        if self._metrics is not None and rows:
            self._metrics.batch(self._model_name, rows)

    def _complain(self, why: BaseException | None) -> None:
        """Say, once, that batches are useless."""
        if not self._complained:
            self._complained = True
            _log.error(
                'model "%s" version %d is called again for each request of a batch, for %s: '
                "say enabled = false under [batching] in model.toml",
                self._model_name,
                self._number,
                why,
            )

    # Requests that have a call of the model, or several, of their own

    def _run_alone(self, instance: Instance, queued: QueuedRequest, completions: Completions) -> int:
        """Returns 1 if it came to the model, else 0."""
        part = self._prepare(instance, None, completions, queued, time.monotonic())
        if part is None:
            return 0
        try:
            outputs = self._outputs(instance, part)
        except InferenceError as error:
            completions.fail(queued, error)
        else:
            self._answer(instance, [part], [outputs], completions)
        return 1

    def _run_signatures(self, instance: Instance, queued: QueuedRequest, completions: Completions) -> None:
        """Answer a call that asks several signatures; the first that fails ends it."""
        if queued.cancelled():
            self._fail_late(queued, completions)
            return
        stage = "decoding a request"
        try:
            response = self._response()
            codec = cast("SeveralCodec", queued.protocol.codec)
            requests = codec.decode_requests(queued.message)
            answers: list[bytes] = []
            for request in requests:
                request.call = queued
                stage = "preprocess"
                part = Part.alone(queued, request, self._inputs(instance, request))
                outputs = self._outputs(instance, part)
                stage = "postprocess"
                payload = instance.handler.postprocess(outputs, request)
                stage = "encoding the answer"
                answers.append(self._encode(codec, instance.model, request, payload, response))
            encoded = codec.join(requests, answers)
        except BaseException as error:
            completions.fail(queued, self._failed(stage, error))
        else:
            completions.reply(queued, encoded)

    # The stages

    def _wanted(self, parts: Sequence[Part], completions: Completions) -> Sequence[Part]:
        """Those whose clients wait and have time; the others end."""
        now = time.monotonic()
        wanted = [part for part in parts if not part.queued.ended and now < part.queued.answer_by]
        if len(wanted) < len(parts):
            for part in parts:
                if now >= part.queued.answer_by:
                    self._fail_late(part.queued, completions)
        return wanted

    def _fail_late(self, queued: QueuedRequest, completions: Completions) -> None:
        """End `queued`, whose deadline has passed, unless its client has left."""
        completions.fail(queued, DeadlineExceeded(f'the deadline passed in the queue of model "{self._model_name}"'))

    def _prepare(
        self,
        instance: Instance,
        batching: Batching | None,
        completions: Completions,
        queued: QueuedRequest,
        now: float,
    ) -> Part | None:
        """What a request brings to the model, at `now` by `time.monotonic`; None if it is answered already."""
        if queued.ended or now >= queued.answer_by:
            self._fail_late(queued, completions)
            return None
        stage = "decoding a request"
        try:
            codec = self._codecs.get(queued.protocol.codec_at) or self._codec(queued.protocol)
            request = codec.decode_request(queued.message)
            request.call = queued
            stage = "preprocess"
            kind = request_kind(request) if self._takes_what_fits else None
            known = None if kind is None else self._kinds.known.get(kind)
            if known is not None and known.inputs:
                inputs: Any = request.payload
                if not known.ordered:
                    inputs = {name: inputs[name] for name in known.inputs}
                if known.rows:
                    part = Part(queued, request, inputs, known.key, known.rows)
                    return self._kept_apart(part) if self._suspects.any else part
            else:
                inputs = self._inputs(instance, request)
            stage = "batching"
            part = Part.alone(queued, request, inputs) if batching is None else batching.part(queued, request, inputs)
            if kind is not None and known is None:
                self._kinds.note(kind, batching, part)
        except BaseException as error:
            completions.fail(queued, self._failed(stage, error))
            return None
        return self._kept_apart(part) if self._suspects.any else part

    def _kept_apart(self, part: Part) -> Part:
        """`part`, which shares no batch with others' if its client keeps failing."""
        if part.rows and self._suspects.isolates(client := client_of(part.queued.metadata)):
            part.key = (*part.key, client)
        return part

    def _codec(self, protocol: Protocol) -> Codec:
        """What decodes requests in `protocol`, and encodes their answers."""
        codec = self._codecs.get(protocol.codec_at)
        if codec is None:
            codec = protocol.codec
            if type(protocol) is Protocol:  # REST makes a protocol of its own for each request
                self._codecs[protocol.codec_at] = codec
        return codec

    def _inputs(self, instance: Instance, request: Request) -> Any:
        """What the model takes: what `preprocess` makes of the request."""
        inputs = inputs_of(instance.handler, request)
        children.end_child()  # a framework's threads are not there in a child, and its model may hang
        return inputs

    def _outputs(self, instance: Instance, part: Part) -> Any:
        """What the model gives for a request that shares no call of it."""
        run_model = instance.handler.run_model
        return self._run_model(instance, part, run_model, instance.model, part.taken_inputs(), part.request)

    def _run_model(self, instance: Instance, first: Part, function: Callable[..., Any], *args: Any) -> Any:
        """What `function`, which calls the model, returns.

        Args:
            first: what the model is called with; of a batch the first.

        Raises:
            InferenceError: HandlerFailed for any other exception; HandlerFailed also where the model refused what the
                handler's own `preprocess` had made, rather than what the client had sent.
        """
        try:
            return function(*args)
        except InferenceError as error:
            made = instance.handler.makes_inputs and not unchanged(first.inputs, first.request.payload)
            if not (isinstance(error, BadRequest) and made and refused_by(instance.model, error)):
                raise
            raise HandlerFailed(f"{self._where}: it refuses what preprocess returned: {error}") from error
        except BaseException as error:
            raise self._failure_of(instance.model, error) from error

    def _failure_of(self, model: Model, error: BaseException) -> InferenceError:
        # Not where `error` is caught: it leads to the variables there, and one that led back to it would keep the
        # messages of the batch until the garbage collector ran.
        explained = model.explain(error)  # a handler may call the framework's own model
        if isinstance(explained, BadRequest):
            explained = HandlerFailed(f"{self._where}: run_model failed: {explained}")
        return as_inference_error(explained, f"{self._where}: run_model failed: ")

    def _answer(
        self, instance: Instance, parts: Sequence[Part], shares: Sequence[Any], completions: Completions
    ) -> None:
        """Answer each of `parts`, or fail it, whatever becomes of the others; `shares` are their outputs."""
        handler, model, suspects, response = instance.handler, instance.model, self._suspects, self._response()
        for part, outputs in zip(parts, shares, strict=True):
            queued, request = part.queued, part.request
            if suspects.any:
                suspects.succeeded(client_of(queued.metadata))
            stage = "postprocess"
            try:
                payload = handler.postprocess(outputs, request)
                stage = "encoding the answer"
                codec = self._codecs.get(queued.protocol.codec_at) or self._codec(queued.protocol)
                answer = self._encode(codec, model, request, payload, response)
            except BaseException as error:
                completions.fail(queued, self._failed(stage, error))
            else:
                completions.reply(queued, answer)

    def _failed(self, stage: str, error: BaseException) -> InferenceError:
        """What a client is told of `error`, which ended a stage of its request."""
        return as_inference_error(error, f"{self._where}: {stage} failed: ")

    def _encode(
        self, codec: Codec | SeveralCodec, model: Model, request: Request, payload: Any, response: Response
    ) -> bytes:
        """Args:
            response: of `_response`; filled in anew for each answer.

        Raises:
            BadRequest: the request asks for an output that is not in `payload`.
            TypeError: the protocol cannot hold `payload`.
        """
        if payload is None:
            check_answer(payload)
        response.payload = narrow(payload, request) if request.outputs else payload
        response.tags, response.id = request.tags, request.id
        try:
            return codec.encode_response(response, request)
        except TypeError as error:
            said = str(error)  # not the error: it leads to this frame, and the request would be garbage
        try:  # the framework's own tensors, perhaps
            payload = model.to_numpy(payload)
            response.payload = narrow(payload, request)
            return codec.encode_response(response, request)
        except TypeError as error:
            raise TypeError(f"{error}; postprocess returned {kind_of(payload)}") from error
        except RecursionError:  # it is nested more deeply than Python recurses
            raise TypeError(f"{said}; postprocess returned {kind_of(payload)}") from None

    def _response(self) -> Response:
        """What codecs are given for each answer of a batch. To make one takes 0.5 µs."""
        return Response(payload=None, model=self._model_name, version=self._number)
