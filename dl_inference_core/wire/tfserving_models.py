"""TensorFlow Serving's questions about a model: its signatures, and the state of its versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Tensors
from dl_inference_core.wire import messages
from dl_inference_core.wire.tfserving import dtype_number, encode_tensor

if TYPE_CHECKING:
    import numpy as np

    from dl_inference_core.transport import Message

    Described = tuple[str, str, np.dtype[Any] | None, tuple[int | None, ...] | None]
    """Of a tensor its name, the framework's name, dtype and shape; None where it is not known."""

_FIELD = "signature_def"


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedSignature:
    """Attributes:
    method: as "tensorflow/serving/predict".
    inputs: of each its description.
    outputs: likewise.
    defaults: by name, the values of inputs that a request may leave out.
    """

    method: str
    inputs: Iterable[Described]
    outputs: Iterable[Described]
    defaults: Tensors


def check_metadata_request(body: Message) -> None:
    """Raises:
    BadRequest: the request is malformed, or asks for anything but signatures.
    """
    message = messages.parse(messages.GetModelMetadataRequest, body)
    if not message.metadata_field:
        raise BadRequest(f'GetModelMetadataRequest must specify at least one metadata_field; there is "{_FIELD}"')
    for field in message.metadata_field:
        if field != _FIELD:
            raise BadRequest(f'Metadata field {field[:100]} is not supported; expected "{_FIELD}"')


def encode_metadata(name: str, version: int, signatures: Mapping[str, DescribedSignature]) -> bytes:
    """A GetModelMetadataResponse; `signatures` by name."""
    message = messages.GetModelMetadataResponse()
    message.model_spec.name = name
    message.model_spec.version.value = version
    message.metadata[_FIELD].Pack(encode_signatures(signatures))
    return message.SerializeToString()  # type: ignore[no-any-return]


def encode_signatures(signatures: Mapping[str, DescribedSignature]) -> Any:
    """A SignatureDefMap; `signatures` by name."""
    message = messages.SignatureDefMap()
    for name, given in signatures.items():
        signature = message.signature_def[name]
        signature.method_name = given.method
        for default, value in given.defaults.items():
            encode_tensor(value, signature.defaults[default])
        for described, tensors in ((given.inputs, signature.inputs), (given.outputs, signature.outputs)):
            for tensor, native_name, dtype, shape in described:
                info = tensors[tensor]
                info.name = native_name or tensor
                info.dtype = dtype_number(dtype)
                info.tensor_shape.SetInParent()
                if shape is None:
                    info.tensor_shape.unknown_rank = True
                for size in shape or ():
                    info.tensor_shape.dim.add(size=-1 if size is None else size)
    return message


def encode_status(versions: Iterable[tuple[int, str, int, str]]) -> bytes:
    """A GetModelStatusResponse.

    Args:
        versions: of each version its number, the state by TensorFlow Serving's name, the gRPC code and the text of what
            is wrong with it.
    """
    message = messages.GetModelStatusResponse()
    for number, state, code, text in versions:
        message.model_version_status.add(
            version=number, state=state, status={"error_code": code, "error_message": text}
        )
    return message.SerializeToString()  # type: ignore[no-any-return]
