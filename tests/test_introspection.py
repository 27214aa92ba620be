"""Health, reflection and the Open Inference Protocol's questions, asked by the official clients over real sockets."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import dl_inference_core
from dl_inference_core.errors import Code
from dl_inference_core.wire import messages

Lab = Any  # tests/conftest.py

Status = health_pb2.HealthCheckResponse
OIP = "/inference.GRPCInferenceService"
SERVICES = {
    "com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
    "seldon.protos.Generic",
    "seldon.protos.Model",
    "seldon.protos.Seldon",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}


async def check(gateway: Any, service: str = "") -> Any:
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def ask(gateway: Any, method: str, request: Any, answer: Any) -> Any:
    return answer.FromString(await gateway.start_call(body=request.SerializeToString(), method=f"{OIP}/{method}"))


# Health


async def test_check_answers_for_the_server_its_services_and_its_models(lab: Lab) -> None:
    a, b = await lab.nodes("ab")
    gateway = await lab.gateway(lab.route(a) + lab.route(b, name="n", task=70))
    services = ("inference.GRPCInferenceService", "seldon.protos.Model", "tensorflow.serving.ModelService")
    for service in ("", "m", "n", "69", "x-70", *services):
        assert await check(gateway, service) == Status.SERVING, service
    await b.stop()
    await gateway.refusal("n")
    assert await check(gateway, "n") == Status.NOT_SERVING
    assert await check(gateway, "m") == Status.SERVING
    assert await check(gateway) == Status.SERVING
    await b.start()
    await lab.until(lambda: gateway.usable(b, "n"))
    assert await check(gateway, "n") == Status.SERVING
    for service in ("none", "x" * 100_000, "inference"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(gateway, service)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert a.count == 0


async def test_a_malformed_check_is_the_clients_fault(lab: Lab) -> None:
    gateway = await lab.front(await lab.node())
    assert (await gateway.refusal(body=b"\xff", method="/grpc.health.v1.Health/Check"))[0] is Code.INVALID_ARGUMENT


async def test_watch_tells_each_change(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="m"))
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="none"))
    assert (await watch.read()).status == Status.SERVING
    assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
    await node.stop()
    await gateway.refusal()
    assert (await watch.read()).status == Status.NOT_SERVING
    await node.start()
    assert (await watch.read()).status == Status.SERVING
    gateway.file.write_text(gateway.file.read_text().replace('"m"', '"n"'))
    assert (await watch.read()).status == Status.SERVICE_UNKNOWN
    watch.cancel()
    unknown.cancel()


async def test_streams_say_that_the_server_ends_and_do_not_hold_it_up(lab: Lab) -> None:
    node = await lab.node(hangs=True)
    gateway = await lab.front(node)
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    overall, model = (stub.Watch(health_pb2.HealthCheckRequest(service=service)) for service in ("", "m"))
    idle = gateway.channel.stream_stream("/grpc.health.v1.Health/Watch")()  # asks nothing
    reflection = gateway.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
    await reflection.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    await reflection.read()
    for watch in (overall, model):
        assert (await watch.read()).status == Status.SERVING
    await idle.wait_for_connection()
    call = asyncio.ensure_future(gateway.call())
    await lab.until(lambda: node.count == 1)
    start = time.monotonic()
    closing = asyncio.ensure_future(gateway.app.close())
    for watch in (overall, model):
        assert (await watch.read()).status == Status.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
    assert await reflection.read() is grpc.aio.EOF
    node.release.set()
    assert await call == "a"
    await closing
    assert time.monotonic() - start < 2


# Reflection


def database(address: str) -> tuple[list[str], descriptor_pool.DescriptorPool]:
    with grpc.insecure_channel(address) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(found)
        names = list(found.get_services())
        for name in names:
            for method in pool.FindServiceByName(name).methods:
                message_factory.GetMessageClass(method.input_type)
                message_factory.GetMessageClass(method.output_type)
        assert pool.FindMessageTypeByName("tensorflow.TensorProto").fields_by_name["half_val"].number == 13
        assert pool.FindFileContainingSymbol("grpc.health.v1.Health").package == "grpc.health.v1"
        with pytest.raises(KeyError):
            pool.FindMessageTypeByName("no.such.Message")
        return names, pool


async def test_the_official_reflection_client_finds_every_service_and_message(lab: Lab) -> None:
    gateway = await lab.front(await lab.node())
    names, pool = await asyncio.to_thread(database, gateway.address)
    assert set(names) == SERVICES
    infer = pool.FindMethodByName("inference.GRPCInferenceService.ModelInfer")
    request = message_factory.GetMessageClass(infer.input_type)(model_name="m")
    assert await gateway.start_call(body=request.SerializeToString()) is not None


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_both_versions_of_reflection_answer(lab: Lab, version: str) -> None:
    gateway = await lab.front(await lab.node())
    method = gateway.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="seldon.protos.SeldonMessage"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol"),
    ]
    call = method(iter([request.SerializeToString() for request in requests]))
    listed, file, missing = [reflection_pb2.ServerReflectionResponse.FromString(body) async for body in call]
    assert {service.name for service in listed.list_services_response.service} == SERVICES
    assert file.file_descriptor_response.file_descriptor_proto
    assert missing.error_response.error_code == Code.NOT_FOUND


async def test_a_malformed_question_to_reflection_is_the_clients_fault(lab: Lab) -> None:
    gateway = await lab.front(await lab.node())
    call = gateway.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(iter([b"\xff"]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# The Open Inference Protocol


async def test_the_servers_own_questions_are_answered_here(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)
    live = await ask(gateway, "ServerLive", messages.ServerLiveRequest(), messages.ServerLiveResponse)
    ready = await ask(gateway, "ServerReady", messages.ServerReadyRequest(), messages.ServerReadyResponse)
    meta = await ask(gateway, "ServerMetadata", messages.ServerMetadataRequest(), messages.ServerMetadataResponse)
    assert live.live
    assert ready.ready
    assert (meta.name, meta.version) == ("dl-inference-core", dl_inference_core.__version__)
    assert node.count == 0


async def test_model_ready_follows_the_nodes(lab: Lab) -> None:
    node = await lab.node()
    gateway = await lab.front(node)

    async def ready(name: str, version: str = "") -> bool:
        request = messages.ModelReadyRequest(name=name, version=version)
        return bool((await ask(gateway, "ModelReady", request, messages.ModelReadyResponse)).ready)

    assert await ready("m")
    assert node.count == 0
    node.answer = b""  # ready = false
    assert not await ready("m", "3")
    assert gateway.node(node).endpoint.health._failures == 0
    node.calls.clear()
    node.answer = b"\x08\x01"
    assert await ready("m", "3")
    assert node.calls[0].method == f"{OIP}/ModelReady"
    assert node.calls[0].message == messages.ModelReadyRequest(name="m", version="3").SerializeToString()
    body = messages.ModelReadyRequest(name="none").SerializeToString()
    assert (await gateway.refusal(body=body, method=f"{OIP}/ModelReady"))[0] is Code.NOT_FOUND
    await node.stop()
    await gateway.refusal()
    assert not await ready("m")


async def test_model_metadata_is_the_nodes_answer(lab: Lab) -> None:
    answer = messages.ModelMetadataResponse(name="m", versions=["1"], platform="x").SerializeToString()
    node = await lab.node(answer=answer)
    gateway = await lab.front(node)
    body = messages.ModelMetadataRequest(name="m").SerializeToString()
    assert await gateway.start_call(body=body, method=f"{OIP}/ModelMetadata") == answer
    assert (await gateway.refusal(body=b"", method=f"{OIP}/ModelMetadata"))[0] is Code.INVALID_ARGUMENT
    assert node.count == 1


# TensorFlow Serving's


QUESTIONS = {
    "/tensorflow.serving.PredictionService/GetModelMetadata": messages.GetModelMetadataRequest,
    "/tensorflow.serving.ModelService/GetModelStatus": messages.GetModelStatusRequest,
}


@pytest.mark.parametrize("method", QUESTIONS)
async def test_tensorflows_questions_about_a_model_are_the_nodes_to_answer(lab: Lab, method: str) -> None:
    answer = messages.GetModelStatusResponse(model_version_status=[{"version": 3, "state": "AVAILABLE"}])
    node = await lab.node(answer=answer.SerializeToString())
    gateway = await lab.front(node)
    body = QUESTIONS[method](model_spec={"name": "x-69", "version_label": "stable"}).SerializeToString()
    assert await gateway.start_call(body=body, method=method) == answer.SerializeToString()
    assert [(call.method, call.message) for call in node.calls] == [(method, body)]
    nameless = QUESTIONS[method](model_spec={"signature_name": "s"}).SerializeToString()
    asks_status = method.endswith("GetModelStatus")  # TensorFlow Serving looks for a model of the empty name
    nameless_is = Code.NOT_FOUND if asks_status else Code.INVALID_ARGUMENT
    for wrong, expected, said in (
        (nameless, nameless_is, "" if asks_status else "ModelSpec has no name specified"),
        (b"", Code.INVALID_ARGUMENT, "Missing ModelSpec"),
        (b"\xff", Code.INVALID_ARGUMENT, ""),
    ):
        code, message = await gateway.refusal(body=wrong, method=method)
        assert code is expected
        assert said in message
    assert node.count == 1


@pytest.mark.parametrize("method", QUESTIONS)
async def test_a_question_that_one_node_cannot_answer_goes_to_another(lab: Lab, method: str) -> None:
    first, second = await lab.nodes("ab", status=lab.error(Code.UNAVAILABLE))
    gateway = await lab.front(first, second)
    body = QUESTIONS[method](model_spec={"name": "m"}).SerializeToString()
    assert (await gateway.refusal(body=body, method=method))[0] is Code.UNAVAILABLE
    assert (first.count, second.count) == (1, 1)
    second.status = first.status = lab.error(Code.NOT_FOUND, "Could not find version 3 of model m")
    assert await gateway.refusal(body=body, method=method) == (Code.NOT_FOUND, "Could not find version 3 of model m")
    assert first.count + second.count == 3


async def test_an_unknown_model_is_said_in_tensorflow_servings_words(lab: Lab) -> None:
    gateway = await lab.front(await lab.node())
    metadata, status = QUESTIONS
    body = messages.GetModelStatusRequest(model_spec={"name": "none"}).SerializeToString()
    assert await gateway.refusal(body=body, method=status) == (
        Code.NOT_FOUND,
        "Could not find any versions of model none",
    )
    body = messages.GetModelMetadataRequest(model_spec={"name": "none"}).SerializeToString()
    code, message = await gateway.refusal(body=body, method=metadata)
    assert code is Code.NOT_FOUND
    assert message.startswith("Servable not found for request: Latest(none)")
