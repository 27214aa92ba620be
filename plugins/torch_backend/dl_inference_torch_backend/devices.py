"""Where a model runs, and how tensors get there and back."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch

Run = Callable[..., Sequence[torch.Tensor]]


class Device:
    """The CPU; and what every device can do. One object per loaded model, called from any of the model's threads."""

    def __init__(self, place: torch.device) -> None:
        self.place = place

    def session(self) -> AbstractContextManager[Any]:
        """Entered around each request."""
        return torch.inference_mode()

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """`array`, of a dtype that torch has, as a tensor on the device that may be written to."""
        # A model that works in place would write into the bytes that came from the wire. Copying 600 KB of them takes
        # 40 µs.
        if not (array.flags.carray and array.dtype.isnative):
            array = np.array(array, array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)

    def place_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, from wherever it is, on the device."""
        return tensor.to(self.place)

    def download(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`tensors` in the host's memory, complete; what lies there is not copied."""
        return tensors

    def settle(self) -> None:
        """Wait until what was put on the device, on whatever stream, is there."""

    def graphed(self, run: Run, batches: Sequence[Sequence[torch.Tensor]]) -> Run:
        """`run`, recorded for the shapes of `batches` where the device can replay what was recorded; within a session.
        Other shapes run as before. `run` returns tensors only."""
        return run


class Accelerator(Device):
    """A device with memory and streams of its own. What is asked of it lines up on one stream per model, so copies of
    one model run while another computes, and nothing waits but the one who reads results, once for all of them.

    What there is to ask comes from the subclass; the order is here.
    """

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        host = self.host_memory(array.shape, torch_dtype(array.dtype))
        host.numpy()[...] = array
        return self.send(host)

    def download(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # Each is fetched before any is waited for.
        hosts = [tensor if tensor.device.type == "cpu" else self.fetch(tensor) for tensor in tensors]
        self.synchronise()
        return hosts

    def graphed(self, run: Run, batches: Sequence[Sequence[torch.Tensor]]) -> Run:
        return _Graphs(self, run, batches)

    @abstractmethod
    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory of the host, which the device copies by itself; freed once such copies are done."""

    @abstractmethod
    def send(self, host: torch.Tensor) -> torch.Tensor:
        """Line up a copy of `host` to the device."""

    @abstractmethod
    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Line up a copy of `tensor` to page-locked memory; it is there after `synchronise`."""

    @abstractmethod
    def synchronise(self) -> None:
        """Wait for all that this thread lined up."""

    @abstractmethod
    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        """What lines up all that `run` did once more, on the very same memory, and the tensors it leaves its results
        in."""


class Cuda(Accelerator):
    """An NVIDIA GPU."""

    def __init__(self, place: torch.device) -> None:
        super().__init__(place)
        self._stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def session(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.cuda.stream(self._stream))  # makes its device the current one too
        return stack

    def place_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.place, non_blocking=tensor.is_pinned())

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def send(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.place, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.host_memory(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def synchronise(self) -> None:
        torch.cuda.current_stream(self.place).synchronize()

    def settle(self) -> None:
        torch.cuda.synchronize(self.place)

    def record(self, run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        for _ in range(3):  # libraries choose kernels and take workspace at their first calls
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other models' threads may allocate meanwhile. One pool, since results are copied out before
        # the next replay.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()
        self._pool = graph.pool()
        return graph.replay, outputs


class _Graphs:
    """A run recorded for some shapes, each with memory of its own for its inputs."""

    def __init__(self, device: Accelerator, run: Run, batches: Sequence[Sequence[torch.Tensor]]) -> None:
        self._run = run
        self._lock = threading.Lock()  # the memory of a recording is for one at a time, until its results are copied
        self._recorded: dict[Any, tuple[Sequence[torch.Tensor], Callable[[], None], Sequence[torch.Tensor]]] = {}
        for batch in batches:
            inputs = [tensor.clone() for tensor in batch]
            self._recorded[_shapes(inputs)] = (inputs, *device.record(lambda inputs=inputs: run(*inputs)))  # type: ignore[misc]

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        recorded = self._recorded.get(_shapes(tensors))
        if recorded is None:
            return self._run(*tensors)
        inputs, replay, outputs = recorded
        with self._lock:
            for own, given in zip(inputs, tensors, strict=True):
                own.copy_(given, non_blocking=True)
            replay()
            return [tensor.clone() for tensor in outputs]


def _shapes(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """torch's name for a numpy dtype.

    Raises:
        TypeError: it has none.
    """
    return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype


def device_for(place: torch.device) -> Device:
    """A model's own device object for `place`."""
    return Cuda(place) if place.type == "cuda" else Device(place)
