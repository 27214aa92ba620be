"""The TensorFlow models that nodes are measured with, and what a call of their signatures costs without a server.

`python -m bench.saved_models make FOLDER` writes them; `… call FOLDER` calls them, for each line "MODEL COUNT" on its
standard input, and tells as a line of JSON what that took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.load import LoadError, Run
from bench.processes import Server

SMALL_INPUT, IMAGE_INPUT = ("x", (1, 128)), ("image", (1, 224, 224, 3))
"""The one input of each model, float32, by its name and shape: messages of 546 bytes and of 602 KB."""
CONFIG = "[models]\ndirectory = {folder!r}\n[backends.tensorflow]\nintra_op_threads = 1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What a number of calls, one after another, came to."""

    cpu_us: float
    run: Run


class BareCalls(Server):
    """A process that calls signatures when asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(process.pid, "")
        assert process.stdin is not None
        assert process.stdout is not None
        self._asking: IO[str] = process.stdin
        self._told: IO[str] = process.stdout

    def call(self, model: str, count: int) -> Calls:
        """Raises:
        LoadError: the process has ended.
        """
        print(model, count, file=self._asking, flush=True)
        line = self._told.readline()
        if not line:
            raise LoadError("the process that calls signatures has ended")
        told = json.loads(line)
        return Calls(cpu_us=told.pop("cpu_us"), run=Run(**told))


@contextmanager
def made() -> Iterator[str]:
    """A folder with the models, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "bench.saved_models", "make", folder], check=True)
        yield folder


@contextmanager
def calling(folder: str) -> Iterator[BareCalls]:
    """Calls of the models in `folder`, until the block ends."""
    command = (sys.executable, "-m", "bench.saved_models", "call", folder)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield BareCalls(process)
        assert process.stdin is not None
        process.stdin.close()


def _make(folder: Path) -> None:
    import tensorflow as tf

    class Small(tf.Module):
        """A network of two layers: what a ranking model of a few features costs."""

        def __init__(self) -> None:
            super().__init__()
            random = tf.random.Generator.from_seed(1)
            self.first, self.second = tf.Variable(random.normal([128, 64])), tf.Variable(random.normal([64, 1]))

        @tf.function(input_signature=[tf.TensorSpec([None, 128], tf.float32, name="x")])
        def __call__(self, x: Any) -> Any:
            return {"y": tf.nn.sigmoid(tf.matmul(tf.nn.relu(tf.matmul(x, self.first)), self.second))}

    class Image(tf.Module):
        """The mean of each channel: next to nothing is computed, so that what is left is the way of 602 KB."""

        @tf.function(input_signature=[tf.TensorSpec([None, 224, 224, 3], tf.float32, name="image")])
        def __call__(self, image: Any) -> Any:
            return {"mean": tf.reduce_mean(image, axis=[1, 2])}

    for name, module in (("small", Small()), ("image", Image())):
        tf.saved_model.save(module, str(folder / name / "1"), signatures=module.__call__)


def _call(folder: Path) -> None:
    from dl_inference_tf_backend.backend import TensorFlowBackend

    backend = TensorFlowBackend(TensorFlowBackend.Options(intra_op_threads=1))
    models = {
        name: (
            backend.load(folder / name / "1", backend.ModelOptions(), "cpu"),
            {tensor: np.zeros(shape, np.float32)},
        )
        for name, (tensor, shape) in (("small", SMALL_INPUT), ("image", IMAGE_INPUT))
    }
    for line in sys.stdin:
        name, count = line.split()
        model, inputs = models[name]
        seconds = []
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(int(count)):
            begun = time.perf_counter()
            model(inputs)
            seconds.append(time.perf_counter() - begun)
        took = time.perf_counter() - start
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        told = {
            "cpu_us": (time.process_time() - cpu) / int(count) * 1e6,
            "requests_per_s": int(count) / took,
            "mean_ms": float(np.mean(seconds)) * 1000,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    {"make": _make, "call": _call}[sys.argv[1]](Path(sys.argv[2]))
