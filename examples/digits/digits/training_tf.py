"""The same network in Keras, in two versions: the second is the first, trained for longer. Imports TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from dl_inference_tf_backend.importing import import_tensorflow

from digits.data import Data, HeldOut, Integers
from digits.handler import SIDE

os.environ["KERAS_BACKEND"] = "tensorflow"
# That there is no GPU it calls an error, later on, between the progress bars.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

tf = import_tensorflow()

EPOCHS = {1: 3, 2: 9}
"""By version, on top of those of the version before."""
TASK_ID = 70


def new() -> Any:
    """A `keras.Model` that has learned nothing: image: float32 [n, 1, 8, 8] → scores: float32 [n, 10].

    From now on, the process's random numbers and TensorFlow's operations are the same every time.
    """
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    layers = tf.keras.layers
    image = tf.keras.Input((1, SIDE, SIDE), name="image")
    # TensorFlow's convolutions take the channels last; on a CPU, only so.
    out = layers.Permute((2, 3, 1))(image)
    out = layers.Conv2D(16, 3, padding="same", activation="relu")(out)
    out = layers.Conv2D(32, 3, padding="same", activation="relu")(out)
    out = layers.Flatten()(layers.MaxPooling2D(2)(out))
    net = tf.keras.Model({"image": image}, {"scores": layers.Dense(10)(out)})
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer=tf.keras.optimizers.Adam(3e-3), loss={"scores": loss})
    return net


def train(net: Any, data: Data, version: int, epoch_done: Callable[[], None]) -> None:
    """Turn `net`, as `new` or the version before left it, into `version`. Calls `epoch_done` `EPOCHS[version]` times;
    the same every time."""
    shuffled = np.random.default_rng(version)
    for _ in range(EPOCHS[version]):
        order = shuffled.permutation(len(data.labels))
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            net.train_on_batch({"image": data.images[batch]}, {"scores": data.labels[batch]})
        epoch_done()


def answers(net: Any, held_out: HeldOut) -> Integers:
    """What `net` takes each held-out digit for, int64 [n]; asked one at a time, as they are served."""
    call = tf.function(net)
    return np.array([int(call({"image": image[None]})["scores"].numpy().argmax()) for image in held_out.images])


def export(net: Any, folder: Path) -> None:
    """Write `folder/saved_model.pb` and what belongs to it, for any number of images at once."""
    net.export(str(folder), verbose=False)


def configure(models: Path) -> None:
    """Write `models/digits-tf/model.toml`: the handler is the torch model's, and two versions are served."""
    folder = models / "digits-tf"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(
        f'task_id = {TASK_ID}\nhandler = "digits"\nkeep_versions = 2\n', encoding="utf-8"
    )
