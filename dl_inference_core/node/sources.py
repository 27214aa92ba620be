"""Python sources that lie beside a model: imported for that model alone."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dl_inference_core.errors import ModelError

_lock = threading.RLock()  # sys.path and sys.modules are the process's
_count = itertools.count(1)


@contextmanager
def imports_from(directory: Path) -> Iterator[None]:
    """Let `import` find the modules in `directory` first, for the length of the block.

    Afterwards they are forgotten: two models, or two versions of one, that both have a `net.py` never see each other's.
    What was imported lives on in whoever holds it. So sources must import each other when they are imported, not when
    they are called. One thread at a time; others wait. Nothing is written into `directory`.
    """
    directory = directory.resolve()
    own = {entry.stem if entry.is_file() else entry.name for entry in directory.iterdir()}
    with _lock:
        elsewhere = {
            name: module for name, module in sys.modules.items() if name.partition(".")[0] in own and module is not None
        }
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        for name in elsewhere:
            del sys.modules[name]
        sys.path.insert(0, str(directory))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(directory))
            sys.dont_write_bytecode = writes
            for name, module in list(sys.modules.items()):
                file = getattr(module, "__file__", None)
                if file is not None and directory in Path(file).parents:
                    del sys.modules[name]
            sys.modules.update(elsewhere)


def load_module(path: Path) -> ModuleType:
    """Execute the file at `path` as a module with a name of its own, inside `imports_from` its folder.

    Raises:
        ModelError: it cannot be read or raises; the cause is attached.
    """
    name = f"{path.stem}_{next(_count)}_of_model"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with imports_from(path.parent):
        sys.modules[name] = module  # dataclasses look their module up while they are made
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ModelError(f"{path} cannot be imported") from error
        finally:
            sys.modules.pop(name, None)
    return module
