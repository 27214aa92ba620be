"""TensorFlow Serving's own config of models, a ModelServerConfig → `NamedModel`s of ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import ConfigError
from dl_inference_core.wire import messages
from dl_inference_tfserving import text

_log = logging.getLogger(__name__)

_TENSORFLOW = 1  # of the deprecated enum ModelType


def parse(content: bytes, file: Path) -> dict[str, NamedModel] | None:
    """The models that a `model_config_file` names; relative paths in it are taken from its folder. None if it names not
    even an empty list.

    Raises:
        ConfigError: it is no ModelServerConfig in protobuf's text form, or as `named_models`.
    """
    message = text.parse(content, messages.ModelServerConfig, file)
    if message.WhichOneof("config") is None:
        return None
    return named_models(message, str(file), file.parent)


def named_models(message: Any, where: str, folder: Path | None = None) -> dict[str, NamedModel]:
    """The models that a ModelServerConfig names.

    Args:
        where: it comes from, for errors.
        folder: what relative paths are taken from; without it they are errors.

    Raises:
        ConfigError: it says what cannot be; names the place in it, and says what was expected.
    """
    if message.WhichOneof("config") == "custom_model_config":
        raise ConfigError(f"{where}: custom_model_config is not supported; expected model_config_list")
    models: dict[str, NamedModel] = {}
    logging_for: list[str] = []
    for index, config in enumerate(message.model_config_list.config):
        place = f'{where}: model_config_list.config[{index}] ("{config.name[:100]}")'
        name = checked_name(config.name, place)
        if name in models:
            raise ConfigError(f"{place}: Illegal to list model {name} multiple times in config list")
        path = checked_path(config.base_path, place, folder)
        models[name] = NamedModel(path=path, settings=_settings(config, place), flat=False)
        if config.HasField("logging_config"):
            logging_for.append(name)
    if logging_for:
        _log.warning("%s: requests are not logged here: logging_config of %s is ignored", where, ", ".join(logging_for))
    return models


def checked_name(name: str, place: str) -> str:
    """`name`, if it is one that a model can have.

    Raises:
        ConfigError: it is not; begins with `place`.
    """
    if not name:
        raise ConfigError(f"{place}: the name is missing or empty; expected the name that clients ask for")
    if len(name) > 255 or "/" in name or not name.isprintable():
        raise ConfigError(
            f'{place}: no model can have that name; expected at most 255 printable characters without "/"'
        )
    return name


def checked_path(base_path: str, place: str, folder: Path | None) -> Path:
    """The folder of a model.

    Args:
        folder: as of `named_models`.

    Raises:
        ConfigError: it can be none; begins with `place`.
    """
    if not base_path:
        raise ConfigError(f"{place}: base_path is missing or empty; expected the folder that holds the versions")
    if "://" in base_path:
        raise ConfigError(f"{place}: base_path is {base_path}; expected a folder of this machine")
    if not base_path.isprintable():
        raise ConfigError(f"{place}: base_path is {base_path!r}; expected printable characters")
    path = Path(base_path)
    if folder is not None:
        return folder / path
    if not path.is_absolute():
        raise ConfigError(f"{place}: Expected model to have an absolute path or URI; got base_path()={base_path}")
    return path


def _settings(config: Any, place: str) -> dict[str, Any]:
    """Keys of `model.toml`."""
    settings: dict[str, Any] = _policy(config.model_version_policy, place)
    if config.version_labels:
        settings["version_labels"] = _labels(config.version_labels, place)
    if config.model_type:
        if config.model_platform:
            raise ConfigError(
                f"{place}: Illegal setting both ModelServerConfig::model_type (deprecated) and "
                "ModelServerConfig::model_platform; expected model_platform alone"
            )
        if config.model_type != _TENSORFLOW:
            raise ConfigError(
                f"{place}: ModelServerConfig::model_type choice {config.model_type} not supported; "
                'expected model_platform: "tensorflow"'
            )
        _log.warning('%s: model_type is deprecated; model_platform: "tensorflow" says the same', place)
        settings["backend"] = "tensorflow"
    elif config.model_platform:
        settings["backend"] = config.model_platform
    return settings


def _policy(policy: Any, place: str) -> dict[str, Any]:
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return {"versions": "all"}
    if choice == "specific":
        versions = tuple(policy.specific.versions)
        if not versions:
            raise ConfigError(f"{place}: model_version_policy.specific names no versions; expected one or more")
        for version in versions:
            _check_version(version, f"{place}: model_version_policy.specific")
        return {"versions": versions}
    return {"versions": "newest", "keep_versions": policy.latest.num_versions or 1}


def _labels(labels: Mapping[str, int], place: str) -> dict[str, int]:
    for label, version in labels.items():
        if not label:
            raise ConfigError(f"{place}: a key of version_labels is empty; expected a label")
        _check_version(version, f'{place}: version_labels "{label}"')
    return dict(labels)


def _check_version(version: int, place: str) -> None:
    if version < 0:
        raise ConfigError(f"{place}: {version} is no version; expected 0 or more")
