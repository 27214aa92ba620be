"""TensorFlow Serving's Classify, Regress and MultiInference: `tf.Example`s in, labels and scores or values out.

A model sees the serialized examples, a tensor of strings; it parses them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dl_inference_core.errors import BadRequest, Unimplemented
from dl_inference_core.tensors import (
    DEFAULT_SIGNATURE,
    Form,
    Method,
    Request,
    Response,
    Tensor,
    as_tensors,
    json_kind,
)
from dl_inference_core.wire import messages
from dl_inference_core.wire.arrays import from_strings
from dl_inference_core.wire.tfserving import MOST_REPEATED_BYTES, decode_spec, encode_asked, encode_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplesCodec:
    """The codec of one of the two methods, as `protocol.Codec` has it.

    Attributes:
        put: writes a model's outputs into an empty result message.
        take: the reverse.
    """

    method: Method
    request: Any
    response: Any
    put: Callable[[Mapping[str, Tensor], Any], None]
    take: Callable[[Any], dict[str, Tensor]]

    def decode_request(self, body: bytes) -> Request:
        message = messages.parse(self.request, body)
        return Request(
            payload=_decode_input(message.input),
            form=Form.EXAMPLES,
            method=self.method,
            **decode_spec(message.model_spec),
        )

    def encode_response(self, response: Response, request: Request) -> bytes:
        message = self.answer(response, request)
        encode_spec(message.model_spec, response, request)
        return message.SerializeToString()  # type: ignore[no-any-return]

    def answer(self, response: Response, request: Request) -> Any:
        """The message that answers `request`, but for its `model_spec`.

        Raises:
            TypeError: the method cannot hold the payload, or it is not for as many examples.
        """
        message = self.response()
        self.put(as_tensors(response.payload), message.result)
        examples = request.payload
        answers = sum(len(answer) for _, answer in message.result.ListFields())
        if isinstance(examples, np.ndarray) and answers != len(examples):
            raise TypeError(f"expected an answer for each of the {len(examples)} examples; got {answers}")
        return message

    def encode_request(self, request: Request) -> bytes:
        """The payload is a sequence of examples, each serialized, or a mapping from feature names to values."""
        message = self.request()
        encode_asked(message.model_spec, request)
        if isinstance(request.payload, Mapping | str | bytes | None):
            raise TypeError("Classify and Regress take a sequence of examples")
        for example in request.payload:  # type: ignore[union-attr] # numbers have no examples
            if not isinstance(example, Mapping | bytes):
                raise TypeError(f"an example is a mapping or serialized, no {type(example).__name__}")
            serialized = example if isinstance(example, bytes) else encode_example(example).SerializeToString()
            message.input.example_list.examples.append(messages.parse_answer(messages.Example, serialized))
        return message.SerializeToString()  # type: ignore[no-any-return]

    def decode_response(self, body: bytes) -> Response:
        message = messages.parse_answer(self.response, body)
        spec = message.model_spec
        return Response(
            payload=self.take(message.result),
            model=spec.name,
            version=spec.version.value if spec.HasField("version") else None,
        )


def _decode_input(given: Any) -> Tensor:
    """The examples of an `Input`, serialized; features of a context belong to each of them.

    Raises:
        BadRequest: there are none; the context, which becomes a part of each, would take too much memory.
    """
    kind = given.WhichOneof("kind")
    examples = () if kind is None else getattr(given, kind).examples
    if not examples:
        raise BadRequest("Input is empty.")
    # Messages that stand behind one another are one message, merged.
    context = given.example_list_with_context.context.SerializeToString() if kind != "example_list" else b""
    if len(context) * len(examples) > MOST_REPEATED_BYTES:
        raise BadRequest(
            f"a context of {len(context)} bytes for {len(examples)} examples would take "
            f"{len(context) * len(examples)} bytes; expected at most {MOST_REPEATED_BYTES}"
        )
    return from_strings([context + example.SerializeToString() for example in examples], len(examples))


def encode_example(features: Mapping[str, Any]) -> Any:
    """A `tf.Example` of values or lists of them: integers and booleans, floats, or bytes and text.

    Floats are rounded to float32, beyond its range to an infinity. An empty list is a feature of no kind, which models
    read as a missing one.

    Raises:
        TypeError: a value of another kind, or of several; an integer beyond 64 bits.
    """
    example = messages.Example()
    for name, value in features.items():
        values = value if isinstance(value, list | tuple | np.ndarray) else [value]
        feature = example.features.feature[name]
        kinds = {_kind(item, name) for item in values}
        if len(kinds) > 1:
            found = " and ".join(_NOUNS[kind] for kind in sorted(kinds))
            raise TypeError(f"Unexpected element type in feature: {name}; it mixes {found}, and a feature has one kind")
        for kind in kinds:
            try:
                getattr(feature, kind).value.extend(map(_CONVERT[kind], values))
            except ValueError as error:
                beyond = " has uint64_t element. Only int64_t is supported" if kind == "int64_list" else ""
                raise TypeError(f"Feature: {name}{beyond}: {error}") from error
    return example


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _as_float32(value: Any) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


_CONVERT: Mapping[str, Callable[[Any], Any]] = {"int64_list": int, "float_list": _as_float32, "bytes_list": _as_bytes}
_NOUNS = {"int64_list": "integers", "float_list": "floats", "bytes_list": "strings"}


def _kind(value: Any, name: str) -> str:
    if isinstance(value, str | bytes):
        return "bytes_list"
    if isinstance(value, bool | int | np.integer | np.bool_):
        return "int64_list"
    if isinstance(value, float | np.floating):
        return "float_list"
    raise TypeError(
        f"Feature: {name} has element with unexpected JSON type: {json_kind(value)}; "
        f"expected numbers or strings, not a {type(value).__name__}"
    )


def _put_classes(outputs: Mapping[str, Tensor], result: Any) -> None:
    """`classes` [examples, classes] of strings, `scores` likewise of floats; either may be missing."""
    classes, scores = outputs.get("classes"), outputs.get("scores")
    given = [array for array in (classes, scores) if array is not None]
    if not given:
        raise TypeError(f"expected the outputs classes, scores or both; got {', '.join(outputs) or 'none'}")
    shape = given[0].shape
    if len(shape) != 2 or any(array.shape != shape for array in given):
        shapes = " and ".join(str(list(array.shape)) for array in given)
        raise TypeError(f"expected classes and scores of one shape, [examples, classes]; got {shapes}")
    if classes is not None and classes.dtype.kind != "O":
        raise TypeError(f"expected classes of strings; got {classes.dtype.name}")
    if scores is not None and scores.dtype.kind in "Oc":
        raise TypeError(f"expected scores of floats; got {scores.dtype.name}")
    labels = classes.tolist() if classes is not None else [[b""] * shape[1]] * shape[0]
    values = scores.astype(np.float32).tolist() if scores is not None else [[0.0] * shape[1]] * shape[0]
    for row in zip(labels, values, strict=True):
        listed = result.classifications.add().classes
        for label, score in zip(*row, strict=True):
            listed.add(label=label.decode(errors="replace"), score=score)
    result.SetInParent()


def _take_classes(result: Any) -> dict[str, Tensor]:
    rows = [each.classes for each in result.classifications]
    if len({len(row) for row in rows}) > 1:
        raise BadRequest("the examples have different numbers of classes")
    shape = len(rows), len(rows[0]) if rows else 0
    labels = from_strings([each.label.encode() for row in rows for each in row], shape[0] * shape[1])
    scores = np.array([each.score for row in rows for each in row], np.float32)
    return {"classes": labels.reshape(shape), "scores": scores.reshape(shape)}


def _put_values(outputs: Mapping[str, Tensor], result: Any) -> None:
    """`outputs` [examples] or [examples, 1] of floats."""
    if "outputs" not in outputs:
        raise TypeError(f"expected the output outputs; got {', '.join(outputs) or 'none'}")
    values = outputs["outputs"]
    if values.dtype.kind != "f" or not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise TypeError(
            f"expected floats of shape [examples] or [examples, 1]; got {values.dtype} {list(values.shape)}"
        )
    for value in values.ravel().tolist():
        result.regressions.add(value=value)
    result.SetInParent()


def _take_values(result: Any) -> dict[str, Tensor]:
    return {"outputs": np.array([each.value for each in result.regressions], np.float32)}


CLASSIFY = ExamplesCodec(
    method=Method.CLASSIFY,
    request=messages.ClassificationRequest,
    response=messages.ClassificationResponse,
    put=_put_classes,
    take=_take_classes,
)
REGRESS = ExamplesCodec(
    method=Method.REGRESS,
    request=messages.RegressionRequest,
    response=messages.RegressionResponse,
    put=_put_values,
    take=_take_values,
)
_RESULTS = {Method.CLASSIFY: "classification_result", Method.REGRESS: "regression_result"}


class MultiInferenceCodec:
    """The codec of MultiInference, a `codecs.SeveralCodec`."""

    def decode_requests(self, body: bytes) -> list[Request]:
        """A request for each task; all have the same payload.

        Raises:
            BadRequest: no tasks, no examples, or a signature twice.
            Unimplemented: a task of another method.
        """
        message = messages.parse(messages.MultiInferenceRequest, body)
        whole = Request(payload=_decode_input(message.input), form=Form.EXAMPLES)
        requests: list[Request] = []
        signatures: set[str] = set()
        for task in message.tasks:
            try:
                method = Method(task.method_name)
            except ValueError:
                method = Method.PREDICT
            if method not in _RESULTS:
                raise Unimplemented(f"Unsupported signature method_name: {task.method_name[:100]}")
            request = replace(whole, method=method, **decode_spec(task.model_spec))
            signature = request.signature or DEFAULT_SIGNATURE
            if signature in signatures:
                raise BadRequest(f"Duplicate evaluation of signature: {signature[:100]}")
            signatures.add(signature)
            requests.append(request)
        if not requests:
            raise BadRequest("there are no tasks; expected one for each signature to be evaluated")
        return requests

    def encode_response(self, response: Response, request: Request) -> bytes:
        """As `CLASSIFY` or `REGRESS`, whichever `request` asks for."""
        return _codec_of(request).encode_response(response, request)

    def join(self, requests: Sequence[Request], answers: Sequence[bytes]) -> bytes:
        """As `codecs.SeveralCodec`."""
        message = messages.MultiInferenceResponse()
        for request, answer in zip(requests, answers, strict=True):
            part = messages.parse_answer(_codec_of(request).response, answer)
            result = message.results.add()
            result.model_spec.CopyFrom(part.model_spec)
            getattr(result, _RESULTS[request.method]).CopyFrom(part.result)
        return message.SerializeToString()  # type: ignore[no-any-return]


def _codec_of(request: Request) -> ExamplesCodec:
    return CLASSIFY if request.method is Method.CLASSIFY else REGRESS


MULTI_INFERENCE = MultiInferenceCodec()
