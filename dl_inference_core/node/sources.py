"""Python sources that lie beside a model: imported for that model alone."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from dl_inference_core.errors import ModelError

_lock = threading.RLock()  # sys.path and sys.modules are the process's
_count = itertools.count(1)


@contextmanager
def imports_from(directory: Path) -> Iterator[None]:
    """Let `import` find the modules in `directory` first, for the length of the block.

    Afterwards they are forgotten: two models, or two versions of one, that both have a `net.py` never see each other's.
    What was imported lives on in whoever holds it, but an `import` of a sibling that runs later, inside a function,
    finds nothing: sources must import each other at their top. One thread at a time; others wait. Blocks for one
    directory may nest, and share what they import. Nothing is written into `directory`.
    """
    directory = directory.resolve()
    with _lock:
        own = _importable(directory)
        before = set(sys.modules)
        displaced = {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in own and not _lies_in(module, directory)
        }
        for name in displaced:
            del sys.modules[name]
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path.insert(0, str(directory))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            with suppress(ValueError):  # a source may have changed the path itself
                sys.path.remove(str(directory))
            sys.dont_write_bytecode = writes
            for name, module in list(sys.modules.items()):
                if (name not in before or name in displaced) and _lies_in(module, directory):
                    del sys.modules[name]
            sys.modules.update(displaced)


def load_module(path: Path) -> ModuleType:
    """Execute the file at `path` as a module with a name of its own, inside `imports_from` its folder.

    Raises:
        ModelError: it cannot be read or raises; the cause is attached.
    """
    name = f"{path.stem}_{next(_count)}_of_model"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is no Python source")
    module = importlib.util.module_from_spec(spec)
    try:
        with imports_from(path.parent):
            sys.modules[name] = module  # dataclasses look their module up while they are made
            try:
                spec.loader.exec_module(module)
            finally:
                sys.modules.pop(name, None)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{path} cannot be imported") from error
    return module


def _importable(directory: Path) -> set[str]:
    """Names of the modules and packages in `directory`; a folder without `__init__.py` displaces nothing."""
    suffixes = tuple(importlib.machinery.all_suffixes())
    return {
        entry.name.partition(".")[0]
        for entry in directory.iterdir()
        if entry.name.endswith(suffixes) or (entry / "__init__.py").is_file()
    }


def _lies_in(module: ModuleType | None, directory: Path) -> bool:
    """Whether `module` is a file below `directory`, or a folder of it that has no file of its own."""
    file = getattr(module, "__file__", None)
    places = [file] if file is not None else list(getattr(module, "__path__", ()))
    return any(directory in Path(place).parents for place in places)
