"""The TensorFlow models that nodes are measured with, and what a call of their signatures costs without a server.

`python -m bench.saved_models make FOLDER` writes them; `… call FOLDER` calls them, as `bench.calls` has it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import bare, bodies, calls

SMALL_INPUT, IMAGE_INPUT = ("x", (1, 128)), ("image", (1, 224, 224, 3))
"""The one input of each model, float32, by its name and shape: messages of 546 bytes and of 602 KB."""
CONFIG = "[models]\ndirectory = {folder!r}\n[backends.tensorflow]\nintra_op_threads = 1\n"


@contextmanager
def made() -> Iterator[str]:
    """A folder with the models, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "bench.saved_models", "make", folder], check=True)
        yield folder


@contextmanager
def calling(folder: str) -> Iterator[bare.BareCalls]:
    """Calls of the models in `folder`, until the block ends."""
    with bare.calling(sys.executable, "-m", "bench.saved_models", "call", folder) as server:
        yield server


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
    known = {}
    for name, (tensor, shape) in (("small", SMALL_INPUT), ("image", IMAGE_INPUT)):
        model = backend.load(folder / name / "1", backend.ModelOptions(), "cpu")
        # In turn, as requests come.
        known[name] = partial(_next, model, tensor, itertools.cycle(bodies.rows(shape[1:])))
        several = bodies.rows(shape[1:], most_rows=bodies.MOST_ROWS)
        known[f"{name}x{bodies.MOST_ROWS}"] = partial(_next, model, tensor, itertools.cycle(several))
    calls.answer(known)


def _next(model: Any, tensor: str, arrays: Iterator[Any]) -> None:
    model({tensor: next(arrays)})


if __name__ == "__main__":
    {"make": _make, "call": _call}[sys.argv[1]](Path(sys.argv[2]))
