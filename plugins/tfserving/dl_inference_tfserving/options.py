"""What a config may say to TensorFlow Serving's API: `[apis.tfserving]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field

from dl_inference_core.config import PluginOptions


class TfServingOptions(PluginOptions):
    """TensorFlow Serving's ways to name models."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model_config_file: Path | None = None
    """a `model_config_file` of TensorFlow Serving's, whose models are served as if they stood under `[models.named]`;
    relative to the config file"""
    model_config_poll_interval_ms: int = Field(default=0, ge=0)
    """milliseconds between two looks at `model_config_file`; 0 looks at the start and at SIGHUP only"""
    allow_remote_reload: bool = False
    """whether clients may replace the models of `[models.named]` and of `model_config_file` by
    `ModelService/HandleReloadConfigRequest`; needs `workers = 1`. Whoever can call it can have any folder of this
    machine loaded, but `handler.py` and `processor.py` in it are run only if the operator has named the folder, too"""
