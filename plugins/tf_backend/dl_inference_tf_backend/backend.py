"""The backend "tensorflow": SavedModels of TensorFlow 1 and 2."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ModelError
from dl_inference_core.node.backend import Backend, Model
from dl_inference_core.node.model_files import HEAD_BYTES, describe_foreign
from dl_inference_tf_backend.importing import import_tensorflow

FILES = ("saved_model.pb", "saved_model.pbtxt")


class TensorFlowBackend(Backend):
    """Loads SavedModels, with all of their signatures: what `tf.saved_model.save`, Keras's `model.export` and the
    builder of TensorFlow 1 write."""

    name = "tensorflow"
    refuses_shapes = True

    class Options(PluginOptions):
        """Attributes:
        intra_op_threads: threads that one operation may use, shared by all models; if left out, a thread for each core
            of this worker's share; a CPU quota counts as so many cores, rounded up.
        inter_op_threads: threads that run independent operations of a model at the same time, shared by all models;
            0, the default, runs a request's operations one after another on the thread of the request, which costs
            least.
        custom_op_libraries: shared objects with operations of one's own, loaded before the first model.
        """

        intra_op_threads: int | None = Field(default=None, ge=1)
        inter_op_threads: int = Field(default=0, ge=0)
        custom_op_libraries: tuple[Path, ...] = ()

    class ModelOptions(PluginOptions):
        """Attributes:
        tags: which graph of the SavedModel is loaded: the one with just these tags.
        """

        tags: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=("serve",), min_length=1)

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._prepared = False
        self._lock = threading.Lock()

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        return any((directory / name).is_file() for name in FILES)

    def load(self, directory: Path, options: PluginOptions, device: str) -> Model:
        assert isinstance(options, self.ModelOptions)
        if not self.recognises(directory):
            raise ModelError(f"{directory} holds no SavedModel: it has neither {' nor '.join(FILES)}")
        self._prepare()
        from dl_inference_tf_backend.saved_model import SavedModel

        try:
            return SavedModel(directory, options.tags, self._session_config(device), _placement(device))
        except ModelError as error:
            if foreign := _foreign_file(directory):
                raise ModelError(f"{directory} holds no SavedModel: {foreign}") from error
            raise

    def _prepare(self) -> None:
        """Once per process: import TensorFlow, and load the libraries.

        Raises:
            ModelError: a library cannot be loaded.
        """
        with self._lock:
            if self._prepared:
                return
            tf = import_tensorflow()

            for library in self.options.custom_op_libraries:
                try:
                    tf.load_op_library(str(library))
                except (tf.errors.OpError, RuntimeError) as error:
                    raise ModelError(f"the library {library} cannot be loaded: {error}") from error
            self.imported()
            self._prepared = True

    def _session_config(self, device: str) -> Any:
        """A `tf.compat.v1.ConfigProto`."""
        import tensorflow as tf

        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=self.options.intra_op_threads or self.cores,
            # What is negative here means: on the thread that calls.
            inter_op_parallelism_threads=self.options.inter_op_threads or -1,
            allow_soft_placement=True,
        )
        config.gpu_options.allow_growth = True
        if device == "cpu":
            config.device_count["GPU"] = 0
        return config


def _foreign_file(directory: Path) -> str:
    """Which file of a SavedModel is something else, and what; "" if each may be what it should be."""
    for path in (directory / FILES[0], *sorted((directory / "variables").glob("variables.*"))):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        # A model without variables may have an empty file of them.
        if head and (found := describe_foreign(head)) is not None:
            return f"{path.relative_to(directory)} is {found}"
    return ""


def _placement(device: str) -> str | None:
    """The device that a graph is put on, in TensorFlow's words; None leaves it to TensorFlow.

    Raises:
        ModelError: this machine has no such device.
    """
    import tensorflow as tf

    if device in ("cpu", "auto"):
        return None
    kind, _, index = device.partition(":")
    gpus = len(tf.config.list_physical_devices("GPU"))
    if kind in ("gpu", "cuda") and (index.isdecimal() or not index):
        if int(index or 0) < gpus:
            return f"/GPU:{int(index or 0)}"
        has = ", ".join(["cpu", *(f"gpu:{number}" for number in range(gpus))])
        raise ModelError(f'device "{device}" is not available; this machine has {has}')
    raise ModelError(f'there is no device "{device}"; expected cpu, gpu, gpu:N or auto')
