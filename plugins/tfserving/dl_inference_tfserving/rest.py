"""TensorFlow Serving's REST API: its URLs, and what is asked about a model. Values are `rest_codec`'s."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from google.protobuf import json_format

from dl_inference_core.errors import BadRequest, Code, InferenceError
from dl_inference_core.http_exchange import HttpExchange
from dl_inference_core.rest.answering import RestApi, decoded
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import SIGNATURES, VERSIONS, Protocol
from dl_inference_core.wire.routing_keys import RoutingKey

if TYPE_CHECKING:
    from dl_inference_core.transport import Message
    from dl_inference_core.wire.codecs import Codec

# Matched before percent-decoding, so that a name may hold "/" and ":". A path without a model would ask for the status
# of every model; TensorFlow Serving knows the path and refuses it.
_MODELS, _MODEL = r"/v1/models", r"/(?P<model>[^/:]+)"
_VERSION = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_QUESTION = re.compile(rf"{_MODELS}(?:{_MODEL})?{_VERSION}(?P<metadata>/metadata)?")
_VERB = re.compile(rf"{_MODELS}{_MODEL}{_VERSION}:(?P<verb>predict|classify|regress)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inference(Protocol):
    """One request of the API, as dispatcher and model take it: its bytes say nothing of what the URL says."""

    key: RoutingKey
    verb: str

    @property
    def codec(self) -> Codec:
        from dl_inference_tfserving.rest_codec import CODECS  # numpy with it

        return cast("Codec", CODECS[self.verb](self.key))


class TfServingRest(RestApi):
    """Answers the requests below `/v1`."""

    paths = ("/v1/",)

    def begin(self, exchange: HttpExchange) -> None:
        path, verb = exchange.path, exchange.verb
        if verb == "POST" and (found := _VERB.fullmatch(path)):
            self._infer(exchange, _key_in(found), found["verb"])
        elif verb in ("GET", "HEAD") and (found := _QUESTION.fullmatch(path)):
            if not found["model"]:
                raise BadRequest("Missing model name in request.")
            spec = _spec(_key_in(found))
            if found["metadata"]:
                asked = messages.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
                self.ask(exchange, SIGNATURES, asked.SerializeToString(), _metadata)
            else:
                asked = messages.GetModelStatusRequest(model_spec=spec)
                self.ask(exchange, VERSIONS, asked.SerializeToString(), _status)
        else:
            raise BadRequest(
                f"Malformed request: {verb} {path[:200]}; expected POST and "
                "/v1/models/MODEL[/versions/NUMBER|/labels/LABEL] with :predict, :classify or :regress, or GET and the "
                "same with /metadata or nothing"
            )

    def describe(self, error: InferenceError, status: int) -> Any:
        return {"error": str(error)}

    def _infer(self, exchange: HttpExchange, key: RoutingKey, verb: str) -> None:
        self.infer(
            exchange,
            _Inference(
                name=f"rest_{verb}",
                node_method="",
                read_key=lambda _: key,
                codec_at="rest",
                key=key,
                verb=verb,
            ),
        )


def _status(message: Message) -> bytes:
    answer = messages.parse_answer(messages.GetModelStatusResponse, message)
    state = messages.GetModelStatusResponse.DESCRIPTOR.fields_by_name["model_version_status"].message_type
    names = state.fields_by_name["state"].enum_type.values_by_number
    return _dumped(
        {
            "model_version_status": [
                {
                    "version": str(each.version),
                    "state": names[each.state].name,
                    "status": {
                        "error_code": Code(each.status.error_code).name,
                        "error_message": each.status.error_message,
                    },
                }
                for each in answer.model_version_status
            ]
        }
    )


def _metadata(message: Message) -> bytes:
    answer = messages.parse_answer(messages.GetModelMetadataResponse, message)
    signatures = messages.SignatureDefMap()
    answer.metadata["signature_def"].Unpack(signatures)
    return _dumped({"model_spec": _printed(answer.model_spec), "metadata": {"signature_def": _printed(signatures)}})


def _key_in(found: re.Match[str]) -> RoutingKey:
    """The model and the version that a URL names.

    Raises:
        BadRequest: a version that no model can have; what is not UTF-8 after percent-decoding.
    """
    version = found["version"]
    if version is not None and (len(version) > 19 or int(version) >= 2**63):
        raise BadRequest(f"Failed to convert version: {version[:100]} to numeric.")
    return RoutingKey(
        model=decoded(found["model"], "model name"),
        version=None if version is None else int(version),
        label=decoded(found["label"] or "", "version label"),
    )


def _spec(key: RoutingKey) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": key.model}
    if key.version is not None:
        spec["version"] = {"value": key.version}
    elif key.label:
        spec["version_label"] = key.label
    return spec


def _printed(message: Any) -> Any:
    """A message as TensorFlow Serving prints it: every field of it, under the names of the .proto."""
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        descriptor_pool=messages.pool,
    )


def _dumped(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()
