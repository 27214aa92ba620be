"""Whom the load is for, and the request that is sent again and again: from a file, or from the model's signature."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from dl_inference_core import certificates
from dl_inference_core.client import build
from dl_inference_core.config import ClientTls
from dl_inference_core.errors import BadRequest, Code, ConfigError, InferenceError, NodeFailed, from_status
from dl_inference_core.files import decode
from dl_inference_core.grpcio_transport import channel_credentials, name_options
from dl_inference_core.tensors import Payload, Tensor, as_tensor
from dl_inference_core.wire import messages, openinference
from dl_inference_core.wire.protocol import METADATA, METHODS, PROTOCOLS

_METHOD = re.compile(r"/[\w.]+/\w+")
_STATUS = b"\x0a"
"""How a SeldonMessage begins that has a status."""
_SEED = 0
_MOST_VALUES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server.

    Attributes:
        address: "host:port" or "unix:/path".
        timeout_s: how long one request may take.
    """

    address: str
    tls: ClientTls | None = None
    timeout_s: float = 10.0

    def channel(self, api: Any = grpc) -> Any:
        """A connection of its own, by `grpc` or `grpc.aio`.

        Raises:
            ConfigError: a file that `tls` names cannot be used.
        """
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.tls is None:
            return api.insecure_channel(self.address, options=options)
        credentials = channel_credentials(certificates.read(self.tls))
        return api.secure_channel(self.address, credentials, options=[*options, *name_options(self.tls, self.address)])

    def ask(self, method: str, body: bytes) -> bytes:
        """The answer to one request.

        Raises:
            InferenceError: by the status that came back.
            ConfigError: as `channel`.
        """
        with self.channel() as channel:
            try:
                answer: bytes = channel.unary_unary(method)(body, timeout=self.timeout_s)
            except grpc.RpcError as error:
                raise from_status(Code(error.code().value[0]), error.details() or "") from None
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What is sent.

    Attributes:
        method: "/package.Service/Method".
        body: the request message's bytes.
        contents: what is in it, for people.
    """

    method: str
    body: bytes
    contents: str

    def try_once(self, target: Target) -> None:
        """Send it.

        Raises:
            InferenceError: by the status that came back; NodeFailed: as `failure`.
        """
        failure = self.failure(target.ask(self.method, self.body))
        if failure:
            raise NodeFailed(failure)

    def failure(self, answer: bytes) -> str:
        """What an answer itself says is wrong, as a SeldonMessage may beside gRPC's OK; "" is nothing."""
        if not answer.startswith(_STATUS) or METHODS.get(self.method) is not PROTOCOLS["seldon"]:
            return ""
        try:
            PROTOCOLS["seldon"].codec.decode_response(answer)
        except (NodeFailed, BadRequest) as error:
            return str(error) or "FAILURE"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Who is asked.

    Attributes:
        model: a model's name, or a task id.
        version: None is the newest.
        protocol: a key of `PROTOCOLS`.
    """

    target: Target
    model: str
    version: int | None = None
    protocol: str = "openinference"

    def from_file(self, file: Path, dtype: str | None = None) -> Message:
        """The tensors in a file: .npz, or .json as {"name": [[…], …], …}. Seldon's protocol sends one tensor, which in
        JSON need not have a name, without it, several as jsonData, and any other file as binData.

        Args:
            dtype: of the tensors in JSON, by numpy's name; by default what the server says that the model takes, else
                float32. Text stays text.

        Raises:
            ConfigError: the file cannot be read, or its tensors not be sent.
        """
        try:
            match file.suffix:
                case ".npz":
                    with np.load(file, allow_pickle=False) as arrays:
                        payload: Payload = {name: as_tensor(array) for name, array in arrays.items()}
                case ".json":
                    payload = self._tensors(json.loads(decode(file.read_bytes())), dtype)
                case _ if self.protocol == "seldon":
                    payload = file.read_bytes()
                case _:
                    raise ConfigError(f"{file}: expected .json or .npz, or --protocol seldon for a file's bytes")
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{file}: {error}") from error
        return self._message(payload, file.name)

    def from_signature(self, rows: int | None = None) -> Message:
        """Random tensors of the dtypes and shapes that the server says the model takes: floats from [0, 1), whole
        numbers below 10, text "text"; the same in each run.

        Args:
            rows: the first size of each tensor where that is free; other free sizes are 1.

        Raises:
            InferenceError: the server does not say.
            ConfigError: it does not say enough, or no first size is free.
        """
        inputs = self._inputs()
        if not inputs:
            raise ConfigError(f'the server does not say what "{self.model}" takes; give --input')
        if rows is not None and not any(sizes and sizes[0] is None for _, _, sizes in inputs):
            raise ConfigError(f'no input of "{self.model}" has a free first size; --rows cannot be used')
        random = np.random.default_rng(_SEED)
        tensors: dict[str, Tensor] = {}
        for name, dtype, sizes in inputs:
            if dtype is None:
                raise ConfigError(f'the server does not say of which dtype "{name}" is; give --input')
            first = tuple(rows or 1 if size is None else size for size in (sizes or ())[:1])
            shape = first + tuple(1 if size is None else size for size in (sizes or ())[1:])
            if np.prod(shape, dtype=float) > _MOST_VALUES:
                raise ConfigError(f'"{name}" would have over {_MOST_VALUES} values, its shape is {list(shape)}')
            tensors[name] = _values(random, dtype, shape)
        return self._message(tensors, "from the model's signature")

    def _inputs(self) -> list[openinference.Described]:
        request = messages.ModelMetadataRequest(
            name=self.model, version="" if self.version is None else str(self.version)
        )
        return openinference.decode_metadata(self.target.ask(METADATA.node_method, request.SerializeToString()))

    def _dtypes(self) -> dict[str, np.dtype[Any]]:
        """As far as they are known."""
        try:
            return {name: dtype for name, dtype, _ in self._inputs() if dtype is not None}
        except InferenceError:
            return {}  # many servers have no such method

    def _tensors(self, values: Any, dtype: str | None) -> Payload:
        if not isinstance(values, dict):
            return _tensor(values, np.dtype(dtype or np.float64))
        known = self._dtypes() if dtype is None else {}
        default = np.dtype(dtype or np.float32)
        return {name: _tensor(value, known.get(name, default)) for name, value in values.items()}

    def _message(self, payload: Payload, source: str) -> Message:
        if self.protocol == "seldon" and isinstance(payload, Mapping) and len(payload) == 1:
            (payload,) = payload.values()
        try:
            protocol, body = build(self.model, payload, protocol=self.protocol, version=self.version)
        except BadRequest as error:
            raise ConfigError(f"{source}: {error}") from error
        if isinstance(payload, Mapping):
            contents = ", ".join(f"{name} {_described(array)}" for name, array in payload.items())
        else:
            contents = _described(payload) if isinstance(payload, np.ndarray) else "bytes"
        return Message(method=protocol.node_method, body=body, contents=f"{contents} ({source})")


def raw(file: Path, method: str) -> Message:
    """A message's bytes as they lie in a file.

    Args:
        method: "/package.Service/Method".

    Raises:
        ConfigError: the file cannot be read; `method` is no such path.
    """
    if not _METHOD.fullmatch(method):
        raise ConfigError(f'the method is "{method}"; expected /package.Service/Method')
    try:
        return Message(method=method, body=file.read_bytes(), contents=f"bytes ({file.name})")
    except OSError as error:
        raise ConfigError(f"{file}: {error}") from error


def _tensor(value: Any, dtype: np.dtype[Any]) -> Tensor:
    array = as_tensor(value)
    return array if array.dtype.kind == "O" else array.astype(dtype)


def _values(random: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
    match dtype.kind:
        case "O":
            return np.full(shape, b"text", dtype=object)
        case "b":
            return random.integers(0, 2, shape).astype(dtype)
        case "i" | "u":
            return random.integers(0, 10, shape).astype(dtype)
        case _:
            return np.asarray(random.random(shape)).astype(dtype)


def _described(tensor: Tensor) -> str:
    kind = "strings" if tensor.dtype.kind == "O" else tensor.dtype.name
    return f"{kind} {list(tensor.shape)}"
