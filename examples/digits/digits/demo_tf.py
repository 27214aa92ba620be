"""TensorFlow beside torch on the same nodes: a second version of the model, dropped in under load.

Needs `dl-inference-tf-backend`; the requests are made of tensorflow-serving-api's own messages and stubs.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from digits import data, training, training_tf
from digits.demo_base import IN_FLIGHT, PREDICT, Ask, Demo, Failed, Report, Server, asking_for_pngs, command
from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.transport import Limits

# After `training_tf`, which says how TensorFlow is to be imported.
import tensorflow as tf  # isort: skip
from tensorflow_serving.apis import (  # isort: skip
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

TF, TORCH = "digits-tf", "digits"
_NODES = 2
_TORCH_IN_FLIGHT = 4
_LOAD_BEFORE_S, _COPY_S, _LOAD_AFTER_S = 1.0, 3.0, 1.0
_PIECES = 60
_SWITCH_S = 60.0
_TIMEOUT_S = 10.0


@dataclass(kw_only=True)
class SwitchReport(Report):
    """What was seen.

    Attributes:
        accuracy_offline: by model and version: "digits-tf 1".
        versions: the states of the TensorFlow model's versions, as the gateway has them from a node.
        switch: of the time in which the second version was dropped in.
    """

    accuracy_offline: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    switch: dict[str, Any] = field(default_factory=dict)


class Answers:
    """What came of asking again and again.

    Attributes:
        versions: how many answers each version gave.
        failed: why requests failed, or what was wrong with their answers.
        seconds: how long each answer took.
        last_old: when the last request was sent that version 1 answered.
        first_new: when the first answer of version 2 came; None before.
    """

    def __init__(self, held_out: data.HeldOut, expected: Mapping[int, data.Integers]) -> None:
        """Args:
        expected: what each version takes the held-out digits for.
        """
        self.versions: Counter[int] = Counter()
        self.failed: list[str] = []
        self.seconds: list[float] = []
        self.last_old = 0.0
        self.first_new: float | None = None
        self._held_out = held_out
        self._expected = expected
        self._next = 0

    @property
    def requests(self) -> int:
        """How many have been answered or have failed."""
        return self.versions.total() + len(self.failed)

    def figures(self) -> dict[str, Any]:
        """For the report."""
        p50, p99, longest = np.percentile(self.seconds or [np.nan], (50, 99, 100)) * 1000
        return {
            "requests": self.requests,
            "failed": len(self.failed),
            "answers": {str(version): count for version, count in sorted(self.versions.items())},
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "longest_ms": float(longest),
        }

    async def keep_asking(self, predict: Any, model: str, running: asyncio.Event) -> None:
        """One request after another, as long as `running` is set. Several may do so at once."""
        while running.is_set():
            index = self._next % len(self._held_out.labels)
            self._next += 1
            sent = time.monotonic()
            try:
                digit, version = await _predict(predict, model, self._held_out, index)
            except grpc.RpcError as error:
                self.failed.append(_in_words(error))
                continue
            self.take(index, digit, version, sent)

    def take(self, index: int, digit: int, version: int, sent: float) -> None:
        """Count an answer: what `version` took a held-out digit for; `sent` is when it was asked."""
        now = time.monotonic()
        self.seconds.append(now - sent)
        if version not in self._expected:
            self.failed.append(f"version {version} answered, which there is not")
            return
        if digit != self._expected[version][index]:
            self.failed.append(f"version {version} takes digit {index} for {digit}; offline it does not")
            return
        self.versions[version] += 1
        if version == 1:
            self.last_old = max(self.last_old, sent)
        elif self.first_new is None:
            self.first_new = now


class SwitchDemo(Demo):
    """The steps, in order."""

    report: SwitchReport

    def __init__(self, folder: Path, transport: str, progress: Progress) -> None:
        super().__init__(folder, transport, progress)
        self.report = SwitchReport()
        self._data = data.load()
        self._held_out = self._data.held_out
        self._expected: dict[str, dict[int, data.Integers]] = {}

    async def steps(self) -> None:
        await self._train()
        tasks = {TORCH: training.TASK_ID, TF: training_tf.TASK_ID}
        async with (
            self.servers(_NODES, tasks, backends=("torch", "tensorflow")) as (nodes, gateway),
            _channel(gateway.address) as channel,
        ):
            predict = _method(channel, PREDICT)
            await self._serve_all(TORCH, 1, predict, gateway)
            await self._serve_all(TF, 1, predict, gateway)
            await self._ask_versions(channel, "before", {1: "AVAILABLE"})
            await self._switch(nodes, channel)
            await self._ask_versions(channel, "after", {1: "AVAILABLE", 2: "AVAILABLE"})
            await self._serve_all(TF, 2, predict, gateway)
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            by_number = self._asking(stub.Predict, TF, 1, by_number=True)
            await self._measure(f"{TF} 1, by number", by_number, TF, 1)

    async def _train(self) -> None:
        """Both models; the TensorFlow model's second version stays beside the folder of models."""
        with self.bar("train torch", training.EPOCHS) as advance:
            net = await asyncio.to_thread(training.train, self._data, advance)
        await asyncio.to_thread(training.export, net, self.models)
        self._expected[TORCH] = {1: training.answers(net, self._held_out)}
        await asyncio.to_thread(training_tf.configure, self.models)
        keras_net = training_tf.new()
        self._expected[TF] = {}
        for version, folder in ((1, self.models / TF / "1"), (2, self.folder / "2")):
            with self.bar(f"train TensorFlow {version}", training_tf.EPOCHS[version]) as advance:
                await asyncio.to_thread(training_tf.train, keras_net, self._data, version, advance)
            await asyncio.to_thread(training_tf.export, keras_net, folder)
            self._expected[TF][version] = training_tf.answers(keras_net, self._held_out)
        self.report.accuracy_offline = {
            f"{model} {version}": self._held_out.accuracy(answers)
            for model, versions in self._expected.items()
            for version, answers in versions.items()
        }
        if not self._offline(TF, 2) > self._offline(TF, 1):
            raise Failed(f"version 2 is no better than version 1: {self.report.accuracy_offline}")

    def _offline(self, model: str, version: int) -> float:
        return self.report.accuracy_offline[f"{model} {version}"]

    async def _serve_all(self, model: str, version: int, predict: Any, gateway: Server) -> None:
        """Every held-out digit: as a tensor in TensorFlow Serving's message, and as a PNG."""
        await self._measure(f"{model} {version}, tensor", self._asking(predict, model, version), model, version)
        connection = GrpcioTransport(GrpcioTransport.Options()).connect(gateway.address, Limits())
        task_id = {TORCH: training.TASK_ID, TF: training_tf.TASK_ID}[model]
        as_png = asking_for_pngs(connection, task_id, self._held_out)
        await self._measure(f"{model} {version}, PNG", as_png, model, version)
        await connection.close()

    async def _measure(self, what: str, ask: Ask, model: str, version: int) -> None:
        await self.measure(what, ask, self._held_out, self._offline(model, version))

    def _asking(self, predict: Any, model: str, version: int, *, by_number: bool = False) -> Ask:
        """By tensors; `version` must answer, and is named in the request if `by_number`."""

        async def ask(index: int) -> int:
            asked = version if by_number else None
            try:
                digit, answered = await _predict(predict, model, self._held_out, index, asked)
            except grpc.RpcError as error:
                raise Failed(_in_words(error)) from error
            if answered != version:
                raise Failed(f"version {answered} of {model} answered, not {version}")
            return digit

        return ask

    async def _ask_versions(self, channel: Any, when: str, expected: Mapping[int, str]) -> None:
        statuses = await _statuses(channel)
        states = {version: status.State.Name(status.state) for version, status in sorted(statuses.items())}
        self.report.versions[when] = {str(version): state for version, state in states.items()}
        if states != expected:
            raise Failed(f"GetModelStatus says {states}; expected {expected}")

    async def _switch(self, nodes: list[Server], gateway: Any) -> None:
        """Drop the second version in, slowly, under load.

        The load goes through the gateway; beside it each node is asked directly, by one client, so that it is known
        who switched when.

        Args:
            gateway: a channel to it.
        """
        predict = _method(gateway, PREDICT)
        load = Answers(self._held_out, self._expected[TF])
        beside = Answers(self._held_out, self._expected[TORCH])
        watched = {node.address: Answers(self._held_out, self._expected[TF]) for node in nodes}
        running = asyncio.Event()
        running.set()
        async with AsyncExitStack() as channels, asyncio.TaskGroup() as group:
            try:
                for _ in range(IN_FLIGHT):
                    group.create_task(load.keep_asking(predict, TF, running))
                for _ in range(_TORCH_IN_FLIGHT):
                    group.create_task(beside.keep_asking(predict, TORCH, running))
                for address, answers in watched.items():
                    channel = await channels.enter_async_context(_channel(address))
                    group.create_task(answers.keep_asking(_method(channel, PREDICT), TF, running))
                await self.pass_time("load", _LOAD_BEFORE_S)
                dropped = time.monotonic()
                await self._copy_slowly(self.folder / "2", self.models / TF / "2")
                copied = time.monotonic()
                switched = await self._until_all_switched(watched, gateway)
                await self.pass_time("load", _LOAD_AFTER_S)
            finally:
                running.clear()
        self.report.switch = {
            "gateway": load.figures(),
            "gateway_torch": beside.figures(),
            "nodes": {
                address: {**answers.figures(), "first_of_2_after_s": switched[address] - dropped}
                for address, answers in watched.items()
            },
            "copy_s": copied - dropped,
            "all_nodes_after_s": max(switched.values()) - dropped,
            "all_nodes_after_copy_s": max(switched.values()) - copied,
        }
        check(load, beside, watched, copied, switched)

    async def _copy_slowly(self, source: Path, target: Path) -> None:
        """As `cp -r` from a slow disk does it, in about `_COPY_S`."""
        pieces = _pieces(source)
        with self.bar("copy version 2", len(pieces)) as advance:
            for path, piece in pieces:
                await asyncio.to_thread(_append, target / path, piece)
                await asyncio.sleep(_COPY_S / len(pieces))
                advance()

    async def _until_all_switched(self, watched: Mapping[str, Answers], gateway: Any) -> dict[str, float]:
        """When each node gave its first answer of version 2, by its address."""
        end = time.monotonic() + _SWITCH_S
        with self.bar("until all nodes answer with it", len(watched)) as advance:
            switched: dict[str, float] = {}
            while len(switched) < len(watched):
                if time.monotonic() > end:
                    why = "; ".join(str(status.status.error_message) for status in (await _statuses(gateway)).values())
                    raise Failed(f"not all nodes answer with version 2 after {_SWITCH_S:g} s: {why}")
                await asyncio.sleep(0.01)
                for address, answers in watched.items():
                    if answers.first_new is not None and address not in switched:
                        switched[address] = answers.first_new
                        advance()
        return switched

    def show(self, console: Console) -> None:
        self.show_served(console)
        console.print("tensor: Predict of WpaiDLPredictOnlineService; PNG: its PytorchPredict")
        console.print("by number: Predict of TensorFlow Serving's PredictionService, with a version")
        report, switch = self.report, self.report.switch
        offline = ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in report.accuracy_offline.items())
        console.print(f"offline: {offline}: the same")
        for when, versions in report.versions.items():
            console.print(f"GetModelStatus {when} the switch: {', '.join(map(' '.join, versions.items()))}")
        table = Table("while version 2 comes", "requests", "failed", "by 1", "by 2", "p99 ms", "max ms")
        rows = {
            f"gateway, {TF}": switch["gateway"],
            f"gateway, {TORCH}": switch["gateway_torch"],
            **switch["nodes"],
        }
        for who, row in rows.items():
            answers = row["answers"]
            table.add_row(
                who,
                str(row["requests"]),
                str(row["failed"]),
                str(answers.get("1", 0)),
                str(answers.get("2", 0)),
                f"{row['p99_ms']:.1f}",
                f"{row['longest_ms']:.1f}",
            )
        console.print(table)
        console.print("none went back to version 1 after an answer of version 2")
        console.print(
            f"copied slowly in {switch['copy_s']:.1f} s; "
            f"all nodes answered with version 2 {switch['all_nodes_after_copy_s']:.1f} s after that"
        )


def check(
    load: Answers, beside: Answers, watched: Mapping[str, Answers], copied: float, switched: Mapping[str, float]
) -> None:
    """Args:
        load, beside: what came through the gateway of TensorFlow and of torch.
        watched: what came of each node.
        copied: when all of version 2 was there.
        switched: when each node gave its first answer of version 2.

    Raises:
        Failed: a request failed; a version answered at a time that was not its own.
    """
    everyone = {"the gateway": load, "the gateway, for torch": beside, **watched}
    for whom, answers in everyone.items():
        if answers.failed:
            raise Failed(f"{whom}: {len(answers.failed)} of {answers.requests} failed; the first: {answers.failed[0]}")
    for address, answers in watched.items():
        if switched[address] < copied:
            raise Failed(f"node {address} answered with version 2 before all of it was there")
        if answers.last_old >= switched[address]:
            raise Failed(f"node {address} went back to version 1 after an answer of version 2")
    if load.last_old >= max(switched.values()):
        raise Failed("version 1 answered a request that was sent after all nodes had switched")


async def _statuses(channel: Any) -> dict[int, Any]:
    """The `ModelVersionStatus` of each of the TensorFlow model's versions.

    Raises:
        Failed: it cannot be had.
    """
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = TF
    try:
        answer = await model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        raise Failed(f"GetModelStatus: {_in_words(error)}") from error
    return {status.version: status for status in answer.model_version_status}


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])


def _method(channel: grpc.aio.Channel, path: str) -> Any:
    """Predict at another path than TensorFlow Serving's, called as a stub calls it."""
    return channel.unary_unary(
        path,
        request_serializer=predict_pb2.PredictRequest.SerializeToString,
        response_deserializer=predict_pb2.PredictResponse.FromString,
    )


async def _predict(
    predict: Any, model: str, held_out: data.HeldOut, index: int, version: int | None = None
) -> tuple[int, int]:
    """What `model` takes a held-out digit for, and the version that answered.

    Raises:
        grpc.RpcError: as it came.
    """
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    request.inputs["image"].CopyFrom(tf.make_tensor_proto(held_out.images[index : index + 1]))
    response = await predict(request, timeout=_TIMEOUT_S)
    return response.outputs["digit"].int64_val[0], response.model_spec.version.value


def _pieces(folder: Path) -> list[tuple[Path, bytes]]:
    """The files in `folder`, one after another, as about `_PIECES` pieces: each a relative path and what comes next."""
    contents = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    size = sum(map(len, contents.values())) // _PIECES + 1
    return [
        (path.relative_to(folder), content[start : start + size])
        for path, content in contents.items()
        for start in range(0, len(content), size)
    ]


def _append(path: Path, piece: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(piece)


def _in_words(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"


main = command(
    SwitchDemo,
    "Serve a TensorFlow model beside a torch one on two nodes behind a gateway, and drop a second version in under "
    "load.",
)

if __name__ == "__main__":
    main()
