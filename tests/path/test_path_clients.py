"""Clients that others make, against a node and against a gateway in front of it: gRPC's own, Triton's, buf, and one in
C++, which is compiled here."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from dl_inference_core.client import build
from dl_inference_core.wire import messages, openinference, seldon

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tritonclient.grpc as triton
    import tritonclient.grpc.aio as triton_aio
    from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[2]
INFER = "/inference.GRPCInferenceService/ModelInfer"
SELDON = "/seldon.protos.Model/Predict"
X = np.array([[1, 2, 3]], np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
CHANNEL = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
METADATA = (("x-request-id", "an id"), ("x-two", "one"), ("x-two", "two"), ("x-raw-bin", bytes(range(256))))
# Whoever compares metadata leaves out what the network adds to them.
OWN = frozenset(key for key, _ in METADATA)


def infer(model: str = "linear", x: Any = X) -> bytes:
    body: bytes = build(model, {"x": x})[1]
    return body


def say(text: str) -> bytes:
    """A request to the model "trouble"."""
    body: bytes = build(12, text)[1]
    return body


def own(metadata: Any) -> list[tuple[str, str | bytes]]:
    return sorted((key, value) for key, value in metadata if key in OWN)


class Foreign(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A node that is none of ours, and does as the model's name says."""

    DETAILS = b"\x08\x0a\x12\x04more\xff\x00"
    SAID = "“nein”: 100 % é\n輸入"

    def __init__(self) -> None:
        self.left = threading.Event()

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.answer) if details.method == INFER else None

    def answer(self, body: bytes, context: Any) -> bytes:
        request = messages.ModelInferRequest.FromString(body)
        sent_back = [(key, value) for key, value in context.invocation_metadata() if key in OWN]
        if request.model_name == "hang":
            context.add_callback(self.left.set)
            self.left.wait(30)
        if request.model_name == "refuse":
            context.set_trailing_metadata((*sent_back, ("grpc-status-details-bin", self.DETAILS)))
            context.abort(grpc.StatusCode.ABORTED, self.SAID)
        context.set_trailing_metadata(sent_back)
        answer: bytes = messages.ModelInferResponse(model_name=request.model_name, id="foreign").SerializeToString()
        return answer


@pytest.fixture(scope="module")
def foreign() -> Iterator[tuple[Foreign, str]]:
    """The node and its address."""
    handler = Foreign()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield handler, address
    server.stop(0).wait(10)


@pytest.fixture(scope="module")
def front(serve: Callable[[str], Any], foreign: tuple[Foreign, str]) -> Any:
    """A gateway in front of it."""
    names = ("back", "refuse", "hang")
    return serve("".join(f'[[routes]]\nname = "{name}"\nnodes = ["{foreign[1]}"]\n' for name in names))


# gRPC's own, for threads and for asyncio


@dataclass(frozen=True, kw_only=True)
class Answer:
    body: bytes
    trailers: list[tuple[str, str | bytes]]


Ask = Callable[..., Answer]


def ask_with_threads(address: str, method: str, body: bytes, compression: Any = None, **how: Any) -> Answer:
    with grpc.insecure_channel(address, options=CHANNEL, compression=compression) as channel:
        answer, call = channel.unary_unary(method).with_call(body, **how)
        return Answer(body=answer, trailers=own(call.trailing_metadata()))


def ask_with_asyncio(address: str, method: str, body: bytes, compression: Any = None, **how: Any) -> Answer:
    async def ask() -> Answer:
        async with grpc.aio.insecure_channel(address, options=CHANNEL, compression=compression) as channel:
            call = channel.unary_unary(method)(body, **how)
            return Answer(body=await call, trailers=own(await call.trailing_metadata()))

    return asyncio.run(ask())


@pytest.fixture(params=[ask_with_threads, ask_with_asyncio], ids=["threads", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """(address, method, body, compression, **how): the answer; raises grpc.RpcError."""
    ask: Ask = request.param
    return ask


COMPRESSIONS = [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["plain", "gzip", "deflate"])
def test_grpc_with_compression_metadata_and_a_deadline(ask: Ask, peer: Any, make: Any, compression: Any) -> None:
    x = np.tile(X, (1000, 1))
    answer = ask(peer.address, INFER, infer(x=x), compression, metadata=METADATA, timeout=20)
    payload: Any = openinference.decode_response(answer.body).payload
    np.testing.assert_array_equal(payload["y"], make.answer(x, 10))


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip], ids=["plain", "gzip"])
def test_grpc_with_large_messages_in_both_directions(ask: Ask, peer: Any, compression: Any) -> None:
    payload = np.random.default_rng(7).bytes(10_000_000)
    answer = ask(peer.address, SELDON, build("echo", payload)[1], compression, timeout=30)
    assert seldon.decode_response(answer.body).payload == payload[::-1]


def test_grpc_with_metadata_that_come_back(ask: Ask, front: Any) -> None:
    answer = ask(front.address, INFER, infer("back"), metadata=METADATA, timeout=20)
    assert answer.trailers == sorted(METADATA)


def test_grpc_with_a_status_and_its_details(ask: Ask, front: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(front.address, INFER, infer("refuse"), metadata=METADATA, timeout=20)
    error = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, Foreign.SAID)
    trailers = [(key, value) for key, value in error.trailing_metadata()]
    assert own(trailers) == sorted(METADATA)
    assert ("grpc-status-details-bin", Foreign.DETAILS) in trailers


def test_grpc_with_a_deadline_that_passes(ask: Ask, peer: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        ask(peer.address, SELDON, say(f"await {gate}"), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.25 < time.monotonic() - began < 5
    gate.touch()
    assert seldon.decode_response(ask(peer.address, SELDON, say("hello"), timeout=20).body).payload == "done "


def test_grpc_asks_after_health(peer: Any, tasks: dict[str, int]) -> None:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    for service in ("", "inference.GRPCInferenceService", *tasks):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == SERVING
    for service, status in (("", SERVING), ("linear", SERVING), ("no", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert next(watch).status == status
        watch.cancel()


async def test_grpc_watches_health_with_asyncio_while_it_calls(peer: Any) -> None:
    async with grpc.aio.insecure_channel(peer.address, options=CHANNEL) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="linear"))
        assert (await watch.read()).status == SERVING
        await asyncio.gather(*(channel.unary_unary(INFER)(infer(), timeout=20) for _ in range(100)))
        unread = asyncio.ensure_future(watch.read())
        await channel.unary_unary(INFER)(infer(), timeout=20)
        assert not unread.done(), "nothing has changed"
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unread


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_grpc_reflects(peer: Any, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol"),
    ]
    method = peer.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    answers = method(iter([request.SerializeToString() for request in requests]), timeout=20)
    listed, found, missing = (reflection_pb2.ServerReflectionResponse.FromString(body) for body in answers)
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {"inference.GRPCInferenceService", "grpc.health.v1.Health", "seldon.protos.Seldon"}
    (content, *_) = found.file_descriptor_response.file_descriptor_proto
    file = descriptor_pb2.FileDescriptorProto.FromString(content)
    assert file.name == "inference.proto"
    methods = {method.name: method for service in file.service for method in service.method}
    assert methods["ModelInfer"].input_type == ".inference.ModelInferRequest"
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# Triton's, for asyncio; the one for threads has a file of its own


def inputs(x: Any = X) -> list[Any]:
    tensor = triton_aio.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    return [tensor]


async def test_triton_asks_after_server_and_models(peer: Any) -> None:
    async with triton_aio.InferenceServerClient(peer.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("linear")
        assert await client.is_model_ready("linear", "1")
        assert (await client.get_server_metadata()).name == "dl-inference-core"
        metadata = await client.get_model_metadata("linear")
        assert sorted(metadata.versions) == ["1", "2"]
        assert [(x.name, x.datatype, list(x.shape)) for x in metadata.inputs] == [("x", "FP32", [-1, 3])]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_triton_infers(peer: Any, make: Any, compression: str | None) -> None:
    async with triton_aio.InferenceServerClient(peer.address) as client:
        result = await client.infer(
            "linear",
            inputs(),
            model_version="1",
            request_id="an id",
            headers={"x-request-id": "an id"},
            client_timeout=20,
            compression_algorithm=compression,
        )
    np.testing.assert_array_equal(result.as_numpy("y"), make.answer(X, 1))
    assert result.get_response().id == "an id"


async def test_triton_infers_many_at_once_and_each_gets_its_own(peer: Any, make: Any) -> None:
    async with triton_aio.InferenceServerClient(peer.address) as client:
        results: list[Any] = await asyncio.gather(
            *(client.infer("linear" if n % 5 else f"no{n}", inputs(np.full((1, 3), n, np.float32))) for n in range(60)),
            return_exceptions=True,
        )
    for n, result in enumerate(results):
        if n % 5:
            np.testing.assert_array_equal(result.as_numpy("y"), make.answer(np.full((1, 3), n), 10))
        else:
            assert isinstance(result, InferenceServerException)
            assert f'"no{n}"' in str(result)


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        (lambda client: client.infer("nobody", inputs()), "NOT_FOUND", '"nobody"'),
        (lambda client: client.infer("linear", inputs(), model_version="9"), "NOT_FOUND", "it has 1, 2"),
        (lambda client: client.infer("linear", inputs(X[0])), "INVALID_ARGUMENT", "[3]"),
        (lambda client: client.get_model_metadata("nobody"), "NOT_FOUND", "nobody"),
        (lambda client: client.get_model_repository_index(), "UNIMPLEMENTED", ""),
    ],
    ids=["model", "version", "shape", "metadata", "method"],
)
async def test_triton_is_told_what_is_wrong(peer: Any, call: Any, status: str, said: str) -> None:
    async with triton_aio.InferenceServerClient(peer.address) as client:
        with pytest.raises(InferenceServerException) as caught:
            await call(client)
        assert caught.value.status() == f"StatusCode.{status}"
        assert said in caught.value.message()
        assert await client.is_server_live()


async def test_triton_gives_up_and_the_node_is_told(front: Any, foreign: tuple[Foreign, str]) -> None:
    node, _ = foreign
    node.left.clear()
    async with triton_aio.InferenceServerClient(front.address) as client:
        with pytest.raises(InferenceServerException) as caught:
            await client.infer("hang", inputs(), client_timeout=0.3)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert await asyncio.to_thread(node.left.wait, 10)
        assert (await client.infer("back", inputs())).get_response().id == "foreign"


def test_triton_streams_are_not_offered(peer: Any) -> None:
    answers: list[Any] = []
    answered = threading.Event()

    def take(result: Any, error: Any) -> None:
        answers.append(error)
        answered.set()

    with triton.InferenceServerClient(peer.address) as client:
        client.start_stream(take)
        assert answered.wait(20)
        client.stop_stream()
    assert answers[0].status() == "StatusCode.UNIMPLEMENTED"


# buf, which is Go's connect


@pytest.fixture
def buf(peer: Any, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `buf curl` with arguments, the last of them the URL's path."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        *options, path = arguments
        command = [str(Path(sys.executable).with_name("buf")), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
        return subprocess.run(
            [*command, *map(str, options), f"http://{peer.address}{path}"],
            env={"HOME": str(tmp_path), "BUF_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


JSON = json.dumps(
    {
        "model_name": "linear",
        "id": "ä",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "contents": {"fp32_contents": [1, 2, 3]}}],
    }
)


@pytest.mark.parametrize(
    "schema",
    [
        ("--schema", ROOT / "protos"),
        ("--reflect", "--reflect-protocol", "grpc-v1"),
        ("--reflect", "--reflect-protocol", "grpc-v1alpha"),
    ],
    ids=["protos", "v1", "v1alpha"],
)
def test_buf_infers(buf: Any, make: Any, schema: tuple[str | Path, ...]) -> None:
    done = buf(*schema, "--data", JSON, INFER)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["modelName"], answer["modelVersion"], answer["id"]) == ("linear", "2", "ä")
    (y,) = answer["rawOutputContents"]
    assert np.frombuffer(base64.b64decode(y), np.float32).tolist() == make.answer(X, 10).ravel().tolist()


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (
            {"model_name": "模型é"},
            grpc.StatusCode.NOT_FOUND,
            'Servable not found for request: Latest(模型é); no model or task is named "模型é"',
        ),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "model_name is missing or empty; expected the name of a model"),
    ],
    ids=["unknown", "nameless"],
)
def test_buf_is_told_what_is_wrong(buf: Any, data: dict[str, str], code: grpc.StatusCode, said: str) -> None:
    done = buf("--schema", ROOT / "protos", "--data", json.dumps(data), INFER)
    assert done.returncode == code.value[0] << 3
    assert json.loads(done.stderr) == {"code": code.value[1].replace(" ", "_"), "message": said}


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
def test_buf_lists_what_there_is(buf: Any, protocol: str) -> None:
    done = buf("--reflect-protocol", protocol, "--list-methods", "")
    assert done.returncode == 0, done.stderr
    assert {INFER[1:], SELDON[1:], "grpc.health.v1.Health/Watch"} <= set(done.stdout.split())


# C++


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one call of the client's in C++."""

    number: int
    code: grpc.StatusCode
    said: str
    answer: str
    trailers: list[tuple[str, bytes]] = field(default_factory=list)


Cpp = Callable[..., list[Outcome]]
CODES = {code.value[0]: code for code in grpc.StatusCode}


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Cpp:
    """(address, method, argument, count, in_flight, timeout_s, metadata): the outcomes, of a client compiled here."""
    found = [shutil.which(tool) for tool in ("g++", "pkg-config", "protoc", "grpc_cpp_plugin")]
    libraries = ("grpc++", "protobuf")
    if not all(found) or subprocess.run(["pkg-config", "--exists", *libraries], check=False).returncode:
        pytest.skip("needs Debian's g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc")
    folder = tmp_path_factory.mktemp("cpp")
    protos = ("inference", "seldon", "tensorflow")
    subprocess.run(
        ["protoc", f"--proto_path={ROOT / 'protos'}", f"--plugin=protoc-gen-grpc={found[3]}"]
        + [f"--{kind}_out={folder}" for kind in ("cpp", "grpc")]
        + [f"{name}.proto" for name in protos],
        check=True,
        timeout=60,
    )
    sources = [ROOT / "tests/clients/client.cc", *sorted(folder.glob("*.cc"))]

    def compiled(source: Path) -> Path:
        made = folder / f"{source.name}.o"
        options = ("-std=c++17", "-Wall", "-Wextra", "-I", folder, "-c")
        subprocess.run(["g++", *options, source, "-o", made], check=True, timeout=300)
        return made

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    flags = subprocess.run(["pkg-config", "--libs", *libraries], check=True, capture_output=True, text=True).stdout
    client = folder / "client"
    subprocess.run(["g++", *objects, "-o", client, *flags.split()], check=True, timeout=300)
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}

    def run(
        address: str,
        method: str,
        argument: str,
        count: int = 1,
        in_flight: int = 1,
        timeout_s: float = 20,
        metadata: tuple[str, ...] = (),
    ) -> list[Outcome]:
        numbers = (str(count), str(in_flight), str(int(timeout_s * 1000)))
        done = subprocess.run(
            [client, address, method, argument, *numbers, *metadata],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        outcomes: list[Outcome] = []
        for line in done.stdout.splitlines():
            number, *words = line.split("\t")
            if number:
                code, said, answer = words
                outcomes.append(Outcome(number=int(number), code=CODES[int(code)], said=said, answer=answer))
            else:
                key, value = words
                outcomes[-1].trailers.append((key, bytes.fromhex(value)))
        return outcomes

    return run


def numbers(outcome: Outcome) -> list[float]:
    assert outcome.code is grpc.StatusCode.OK, outcome
    return [float(word) for word in outcome.answer.split()]


def test_cpp_infers(cpp: Cpp, peer: Any, make: Any) -> None:
    (outcome,) = cpp(peer.address, "infer", "linear")
    assert numbers(outcome) == make.answer([[0, 2, 3]], 10).ravel().tolist()


def test_cpp_is_told_what_is_wrong(cpp: Cpp, peer: Any) -> None:
    (outcome,) = cpp(peer.address, "infer", "模型 é 100%")
    assert outcome.code is grpc.StatusCode.NOT_FOUND
    name = "模型 é 100%"
    assert outcome.said == f'Servable not found for request: Latest({name}); no model or task is named "{name}"'


def test_cpp_sends_metadata(cpp: Cpp, peer: Any) -> None:
    (outcome,) = cpp(peer.address, "say", "raise run_model boom", metadata=("x-request-id", "from C++", "x-more", ""))
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert outcome.said.endswith("RuntimeError: boom (request id from C++)")


def test_cpp_gets_its_metadata_back(cpp: Cpp, front: Any) -> None:
    metadata = ("x-request-id", "from C++", "x-two", "one", "x-two", "two", "x-raw-bin", "é\x7f\x01")
    (outcome,) = cpp(front.address, "infer", "back", metadata=metadata)
    assert outcome.code is grpc.StatusCode.OK
    sent = zip(metadata[::2], metadata[1::2], strict=True)
    assert own(outcome.trailers) == sorted((key, value.encode()) for key, value in sent)


def test_cpp_gives_up_at_its_deadline(cpp: Cpp, peer: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    (outcome,) = cpp(peer.address, "say", f"await {gate}", timeout_s=0.3)
    gate.touch()
    assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
    (outcome,) = cpp(peer.address, "say", "hello")
    assert outcome.answer == "done "


def test_cpp_makes_a_thousand_calls_on_one_channel(cpp: Cpp, peer: Any, make: Any) -> None:
    outcomes = cpp(peer.address, "infer", "linear", count=1000, in_flight=32)
    assert sorted(outcome.number for outcome in outcomes) == list(range(1000))
    for outcome in outcomes:
        assert numbers(outcome) == make.answer([[outcome.number, 2, 3]], 10).ravel().tolist()
