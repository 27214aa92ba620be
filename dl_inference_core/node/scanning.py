"""What lies in the folders of models: which versions there are, and whether their files have changed."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import InferenceError, ModelError
from dl_inference_core.files import Stamp, stamp
from dl_inference_core.node.loading import CONFIG_FILE, MODELS_OWN, ModelConfig, in_words, read_config
from dl_inference_core.node.model_files import is_ignored

Fingerprint: TypeAlias = tuple[tuple[str, Stamp], ...]
"""(path, stamp) of each file, in order."""

_UNREADABLE: Fingerprint = (("", (-1,)),)
TOO_LARGE: Fingerprint = (("", (-2,)),)

_MOST_ENTRIES = 10_000
"""Files and folders that one version may consist of."""

_VERSION = re.compile(r"[0-9]{1,19}")
_LARGEST_VERSION = 2**63 - 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One model's folder, as one look found it.

    Attributes:
        named: where it lies, and what is said of it there.
        own: of the files that all versions share, `model.toml` and sources.
        config: what `model.toml` says; the default where it cannot be read.
        problem: why it cannot; "" if it can.
        versions: each version's folder, and of its files, the sources that all share, and what `model.toml` says of it.
        doubles: folders that are left out, for another has the same number.
    """

    named: NamedModel
    own: Fingerprint
    config: ModelConfig
    problem: str
    versions: Mapping[int, tuple[Path, Fingerprint]]
    doubles: tuple[str, ...] = ()


def scan(
    directory: Path | None,
    named: Mapping[str, NamedModel],
    defaults: Mapping[str, Any],
    before: Mapping[str, Sight],
) -> dict[str, Sight]:
    """Every model under `directory`, and those in `named`. Cheap where nothing has changed since `before`.

    Raises:
        OSError, ValueError: `directory` cannot be read, or is not a path.
    """
    there = {
        path.name: NamedModel(path=path)
        for path in (sorted(directory.iterdir()) if directory is not None else ())
        if not is_ignored(path.name) and path.is_dir()
    }
    sights = {}
    for name, model in {**there, **named}.items():
        known = before.get(name)
        try:
            sights[name] = _look_at(model, defaults, known)
        except (OSError, ValueError, ModelError) as error:
            if name not in named and isinstance(error, FileNotFoundError):  # it went away between two lines
                continue
            sights[name] = Sight(
                named=model,
                own=_UNREADABLE,
                config=ModelConfig(),
                problem=str(error),
                versions=known.versions if known is not None else {},
            )
    return sights


def misplacement(directory: Path, sights: Mapping[str, Sight], recognises: Callable[[Path], bool]) -> str:
    """Why `directory` does not look like a folder of models; "" if it does.

    Args:
        sights: as `scan` found them.
        recognises: whether any backend recognises the files in a folder.
    """
    expected = "expected a folder of models, which holds NAME/VERSION/files"
    folders = {
        name: [folder for folder, _ in sight.versions.values()]
        for name, sight in sights.items()
        if sight.named.path == directory / name
    }
    numbers = [
        name
        for name, found in folders.items()
        if _VERSION.fullmatch(name) and sights[name].config.task_id is None and found in ([], [directory / name])
    ]
    others = [folder for name, found in folders.items() if name not in numbers for folder in found]
    if any(map(recognises, others)):
        return ""
    if recognises(directory):
        is_version = bool(_VERSION.fullmatch(directory.name))
        parent = directory.parent.parent if is_version else directory.parent
        return f"it holds the files of one version of a model; {expected}: give {parent}"
    if numbers:
        listed = ", ".join(f'"{name}"' for name in numbers[:3])
        return (
            f"it looks like the folder of one model, because names in it are version numbers ({listed}); {expected}: "
            f"give {directory.parent} (a model whose name is a number needs a task_id in its {CONFIG_FILE})"
        )
    return "" if folders else f"it holds no models; {expected}"


def _look_at(named: NamedModel, defaults: Mapping[str, Any], before: Sight | None) -> Sight:
    folder = named.path
    entries = _children(folder)
    own = _fingerprint(entry for entry in entries if entry.name == CONFIG_FILE or entry.name.endswith(".py"))
    if before is not None and before.own == own and before.named == named:
        config, problem = before.config, before.problem
    else:
        config, problem = ModelConfig(), ""
        try:
            config = read_config(folder, settings=named.settings, defaults=defaults)
        except InferenceError as error:
            problem = in_words(error)
    shared = own
    if not problem:  # what `model.toml` says, not that it changed: a version need not be loaded again for a new label
        said = json.dumps(config.model_dump(exclude=set(MODELS_OWN)), sort_keys=True, default=str)
        shared = (*(file for file in own if file[0] != CONFIG_FILE), (said, (int(named.sources),)))
    folders, doubles = _versions(entries)
    # A folder without files is about to be filled.
    files = {number: (Path(entry.path), _fingerprint([entry])) for number, entry in folders.items()}
    if not files and named.flat:
        files = {1: (folder, _fingerprint(entry for entry in entries if entry.name != CONFIG_FILE))}
    versions = {number: (path, shared + found) for number, (path, found) in files.items() if found}
    if doubles and (before is None or before.doubles != doubles):
        _log.warning("%s: left out, another folder has the same number: %s", folder, ", ".join(doubles))
    return Sight(named=named, own=own, config=config, problem=problem, versions=versions, doubles=doubles)


def _versions(entries: Iterable[os.DirEntry[str]]) -> tuple[dict[int, os.DirEntry[str]], tuple[str, ...]]:
    """The folders that are versions, by number; and those that could be, but for another's being written shorter."""
    folders: dict[int, os.DirEntry[str]] = {}
    doubles = []
    for entry in sorted(entries, key=lambda entry: len(entry.name)):
        if not _VERSION.fullmatch(entry.name) or not entry.is_dir():
            continue
        number = int(entry.name)
        if number > _LARGEST_VERSION:
            continue
        if number in folders:
            doubles.append(entry.name)
        else:
            folders[number] = entry
    return folders, tuple(doubles)


def _children(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name.

    Raises:
        ModelError: it is more than a version may hold.
        OSError, ValueError: the folder cannot be read, or is not a path.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in itertools.islice(entries, _MOST_ENTRIES + 1) if not is_ignored(entry.name)]
    if len(found) > _MOST_ENTRIES:
        raise too_large(folder)
    return sorted(found, key=lambda entry: entry.name)


def _fingerprint(entries: Iterable[os.DirEntry[str]]) -> Fingerprint:
    """Of every file in and below `entries`; a link counts as what it leads to, a folder only where it is met first.
    `TOO_LARGE` if they are over `_MOST_ENTRIES`."""
    files: list[tuple[str, Stamp]] = []
    visited: set[tuple[int, int]] = set()
    left = [("", entry) for entry in entries]
    met = 0
    while left:
        prefix, entry = left.pop()
        met += 1
        if met + len(left) > _MOST_ENTRIES:
            return TOO_LARGE
        name = prefix + entry.name
        try:
            if not entry.is_dir():
                files.append((name, stamp(entry)))
            elif (folder := (entry.stat().st_dev, entry.stat().st_ino)) not in visited:
                visited.add(folder)
                if entry.is_symlink():
                    files.append((name, (str(Path(entry.path).readlink()),)))
                left += [(f"{name}/", child) for child in _children(entry.path)]
        except OSError as error:
            files.append((name, (-1, error.errno or 0)))
        except ModelError:
            return TOO_LARGE
    return tuple(sorted(files))


def too_large(folder: Path | str) -> ModelError:
    return ModelError(
        f"{folder}: it holds over {_MOST_ENTRIES} files and folders; expected no more than a model consists of"
    )
