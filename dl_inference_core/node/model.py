"""One model and its versions, as requests meet it: which version answers, and what is asked about it."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dl_inference_core.errors import BadRequest, Code, InferenceError, ModelNotFound, ModelNotReady
from dl_inference_core.failures import fail
from dl_inference_core.node.queue import QueuedRequest
from dl_inference_core.wire import messages, openinference, tfserving_models
from dl_inference_core.wire.protocol import (
    METADATA,
    NO_QUEUEING,
    READY,
    SIGNATURES,
    TRANSFORMS,
    VERSIONS,
    Protocol,
)
from dl_inference_core.wire.routing_keys import RoutingKey

if TYPE_CHECKING:
    from dl_inference_core.node.backend import Signature, TensorSpec
    from dl_inference_core.node.load import LoadMeter
    from dl_inference_core.node.version import LoadedVersion
    from dl_inference_core.transport import Exchange


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
class Published:
    """What a repository says of a model, replaced as a whole: a request reads one of them.

    Attributes:
        loaded: the versions that answer requests, by number.
        newest: of these; None if there are none.
        versions: every version that is served, is to be, or was until a moment ago.
        labels: the version that each label leads to.
        unserved_labels: the labels of its config whose versions are not loaded. Each stays where it was, if it was
            anywhere.
        task_id: None if it has none.
        refusal: why its folder, as it is now, cannot be taken; "" if it can. What was loaded before stays.
    """

    loaded: Mapping[int, LoadedVersion] = field(default_factory=dict)
    newest: LoadedVersion | None = field(init=False)
    versions: Mapping[int, VersionStatus] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    unserved_labels: Mapping[str, int] = field(default_factory=dict)
    task_id: int | None = None
    refusal: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "newest", self.loaded[max(self.loaded)] if self.loaded else None)


class ServedModel:
    """One model and its versions. Only the repository changes it, by `publish`; any thread may ask it."""

    def __init__(self, name: str, meter: LoadMeter) -> None:
        self.name = name
        self._meter = meter
        self._published = Published()

    def publish(self, published: Published) -> None:
        """Replace everything, in one step. A version that is not in `published.loaded` may be closed from then on."""
        self._published = published

    @property
    def task_id(self) -> int | None:
        return self._published.task_id

    @property
    def refusal(self) -> str:
        return self._published.refusal

    @property
    def versions(self) -> Mapping[int, VersionStatus]:
        return self._published.versions

    @property
    def labels(self) -> Mapping[str, int]:
        return self._published.labels

    @property
    def unserved_labels(self) -> Mapping[str, int]:
        return self._published.unserved_labels

    @property
    def loaded(self) -> Mapping[int, LoadedVersion]:
        return self._published.loaded

    def waiting(self) -> int:
        """How many requests wait for a thread of any version."""
        return sum(version.waiting() for version in self.loaded.values())

    def describe_labels(self) -> str:
        """What is wrong with `unserved_labels`; "" if there are none."""
        if not self.unserved_labels:
            return ""
        said = ", ".join(f'"{label}" is version {number}' for label, number in sorted(self.unserved_labels.items()))
        loaded = ", ".join(map(str, sorted(self.loaded))) or "none"
        return f"version_labels: {said}; expected versions that are loaded, which are {loaded}"

    @property
    def ready(self) -> bool:
        """Whether requests that name no version are answered."""
        newest = self._published.newest
        return newest is not None and not newest.stuck

    def begin_all(self, exchanges: Sequence[Exchange], protocol: Protocol, key: RoutingKey) -> None:
        """Have the version that `key` names answer each of `exchanges`, or the newest one. `protocol` may also be one
        of `protocol.QUESTIONS` or `protocol.TRANSFORMS`.

        A client's leaving takes its request out of the queue; a handler that runs may ask `Request.cancelled`. Requests
        fail with:

        - ModelNotFound: there is no such version.
        - ModelNotReady: that version, or with none named every version, cannot answer now.
        - DeadlineExceeded: the deadline passed before the request's turn came.
        - Overloaded: as `RequestQueue.put_all`; or the request's time in the queue passed, or a request of a higher
          priority took its place.
        - BadRequest: no version has that label, or the version is not a number; the message is malformed or does not
          fit the model.
        - HandlerFailed: handler or model raised, or the protocol cannot hold the answer.
        """
        if not protocol.codec_at:
            for exchange in exchanges:
                self._reply(exchange, protocol, key)
            return
        read = protocol.read_queueing if key.queueing else None
        now = time.monotonic()
        requests = []
        for exchange in exchanges:
            try:
                asked = NO_QUEUEING if read is None else read(exchange.message)
            except InferenceError as error:
                self._fail((exchange,), error)
                continue
            request = QueuedRequest(exchange, protocol, now, asked)
            exchange.on_cancel(request.end)
            requests.append(request)
        try:
            while not self._pick(key).submit_all(requests):
                pass  # closed meanwhile: the model has published other versions, or none
        except InferenceError as error:
            self._fail([request.exchange for request in requests], error)

    def _fail(self, exchanges: Sequence[Exchange], error: InferenceError) -> None:
        """End requests that were not queued. One of them carries the report of the load, if it is time for one."""
        trailers = self._meter.answered(error, count=len(exchanges)) if exchanges else ()
        for exchange in exchanges:
            own = copy(error)
            own.trailers, trailers = trailers, ()
            fail(exchange, own)

    def _reply(self, exchange: Exchange, question: Protocol, key: RoutingKey) -> None:
        try:
            exchange.reply(_QUESTIONS[question.name](self, exchange, key))
        except Exception as error:
            fail(exchange, error)

    def _same_message(self, exchange: Exchange, key: RoutingKey) -> bytes:
        self._pick(key)
        return bytes(exchange.message)

    def _metadata(self, exchange: Exchange, key: RoutingKey) -> bytes:
        loaded = self._pick(key).loaded
        signature = loaded.model.signature
        return openinference.encode_metadata(
            self.name,
            sorted(self.loaded),
            loaded.model.platform or loaded.platform,
            inputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.inputs],
            outputs=[(spec.name, spec.dtype, spec.shape) for spec in signature.outputs],
        )

    def _ready(self, exchange: Exchange, key: RoutingKey) -> bytes:
        try:
            ready = not self._pick(key).stuck
        except ModelNotReady:
            ready = False
        body: bytes = messages.ModelReadyResponse(ready=ready).SerializeToString()
        return body

    def _signatures(self, exchange: Exchange, key: RoutingKey) -> bytes:
        tfserving_models.check_metadata_request(exchange.message)
        version = self._pick(key)
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

    def _status(self, exchange: Exchange, key: RoutingKey) -> bytes:
        # TensorFlow Serving passes over a label here, and tells the states of all versions.
        number = key.version
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
            ModelNotFound, ModelNotReady: as `_pick`.
        """
        return self._pick(RoutingKey(self.name, version)).loaded.model.signature

    def platform(self, version: int | None = None) -> str:
        """The name of the backend that runs that version, or the newest.

        Raises:
            ModelNotFound, ModelNotReady: as `_pick`.
        """
        return self._pick(RoutingKey(self.name, version)).loaded.platform

    def _pick(self, key: RoutingKey) -> LoadedVersion:
        """The version that `key` names, or the newest.

        Raises:
            ModelNotFound, ModelNotReady, BadRequest: as `_pick`.
        """
        published = self._published
        version = key.version
        if key.label:
            version = self._labelled(published, key.label)
        elif isinstance(version, str):
            version = openinference.decode_version(version) if version else None
        picked = published.newest if version is None else published.loaded.get(version)
        if picked is None:
            raise self._no_version(published, version)
        return picked

    def _labelled(self, published: Published, label: str) -> int:
        if label not in published.labels:
            have = ", ".join(f'"{known}"' for known in sorted(published.labels)) or "none"
            raise BadRequest(
                f'Unrecognized servable version label: {label[:100]}; model "{self.name}" has the labels {have}'
            )
        return published.labels[label]

    def _no_version(self, published: Published, version: int | None) -> InferenceError:
        states = {number: status.state.value for number, status in sorted(published.versions.items())}
        if version is None:
            what = "still loading" if State.LOADING.value in states.values() else "not ready"
            why = ", ".join(f"version {number} is {state}" for number, state in states.items())
            return ModelNotReady(f'model "{self.name}" is {what}: {why or "it has no versions"}')
        if version in states:
            return ModelNotReady(f'version {version} of model "{self.name}" is not ready: it is {states[version]}')
        have = ", ".join(map(str, sorted(published.loaded))) or "none"
        return ModelNotFound(
            f"Servable not found for request: Specific({self.name}, {version}); "
            f'model "{self.name}" has no version {version}; it has {have}'
        )


_QUESTIONS: Mapping[str, Callable[[ServedModel, Exchange, RoutingKey], bytes]] = {
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
