"""Python sources that lie beside a model: imported for that model alone, under names of their own.

A module is imported as `dl_inference_core.node.sources.FOLDER.NAME`, where FOLDER stands for the path of its folder and
is another one for each import. It stays in `sys.modules` under that name for as long as its version is loaded, so that
everything finds it that looks a class or a function up by its module: pickle, process pools, `inspect.getsource`,
pydantic. While a folder's sources are imported they also have their short names, by which they import each other
(`import net`); the short names are gone afterwards, so that two models, or two versions, may both have a `net.py`. An
`import net` inside a function of one of these modules imports the `net.py` beside that module.

A process that a handler starts finds the modules, too: a forked one has them, and one that is spawned imports them
again, from the path that their name stands for.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import itertools
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType

from dl_inference_core.errors import ModelError
from dl_inference_core.node.model_files import is_ignored

__path__: list[str] = []
"""Makes this module a package, below which `_Finder` finds modules."""

_changed = threading.Condition()
"""Guards `_turns`, and whatever `_Block` changes; told of each turn that ends and each load that is given up."""
_turns: list[_Turn] = []
"""The turn that a thread has now; empty while none has one."""
_count = itertools.count(1)


class Sources:
    """The modules that one version's load imports from its folders. In a `with` block, everything that this thread
    imports by `imports_from` and `load_module` belongs to it; outside of any, modules are forgotten at once."""

    def __init__(self) -> None:
        self.packages: list[str] = []
        self.given_up = False
        self._waited_s = 0.0
        self._waits_since: float | None = None

    def __enter__(self) -> Sources:
        self._before, _thread.sources = _thread.sources, self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.sources = self._before

    @property
    def waits(self) -> bool:
        """Whether the thread of the load now waits for another load's imports. Any thread."""
        return self._waits_since is not None

    def waited_s(self) -> float:
        """The seconds that the thread of the load has waited for other loads' imports. Any thread."""
        with _changed:
            since = self._waits_since
            return self._waited_s + (time.monotonic() - since if since is not None else 0.0)

    def give_up(self) -> None:
        """Let other loads import, though an import of this load hangs. The load cannot import its sources any more. Any
        thread."""
        with _changed:
            self.given_up = True
            if _turns and _turns[0].sources is self:
                _turns[0].give_up()
            _changed.notify_all()

    def wait_for_turn(self) -> None:
        """Wait until no thread has its turn. Called with `_changed`.

        Raises:
            ImportError: the load was given up.
        """
        self._waits_since = time.monotonic()
        _changed.wait_for(lambda: not _turns or self.given_up)
        self._waited_s += time.monotonic() - self._waits_since
        self._waits_since = None
        self.check()

    def check(self) -> None:
        """Raises:
        ImportError: the load was given up.
        """
        if self.given_up:
            raise ImportError("the load was given up, so it imports nothing any more")

    def close(self) -> None:
        """Take the modules out of `sys.modules`. May be called again, and on any thread."""
        packages, self.packages = self.packages, []
        for package in packages:
            for name in list(sys.modules):
                if name == package or name.startswith(f"{package}."):
                    sys.modules.pop(name, None)


@dataclass(slots=True, eq=False)
class _Block:
    """One `imports_from` that a thread is in. `enter` and `leave` change what the whole process shares: `sys.path`,
    `sys.modules` and whether bytecode is written.

    Attributes:
        own: the names of the modules and packages in `directory`.
        short_names: those under which modules stand in `sys.modules` for the length of the block.
    """

    directory: Path
    package: str
    own: frozenset[str]
    sources: Sources
    short_names: set[str] = field(default_factory=set)
    _before: set[str] = field(default_factory=set)
    _displaced: dict[str, ModuleType] = field(default_factory=dict)
    _writes: bool = False

    def enter(self) -> None:
        # Copies: other threads import modules meanwhile, and a dict that grows cannot be iterated over.
        before = sys.modules.copy()
        self._before = set(before)
        self._displaced = {name: module for name, module in before.items() if name.partition(".")[0] in self.own}
        for name in self._displaced:
            del sys.modules[name]
        self._writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path.insert(0, str(self.directory))

    def leave(self) -> None:
        with suppress(ValueError):  # a source may have changed the path itself
            sys.path.remove(str(self.directory))
        sys.dont_write_bytecode = self._writes
        for name in self.short_names:
            sys.modules.pop(name, None)
        for name, module in sys.modules.copy().items():  # what a source found by a path that it added
            if name not in self._before and not name.startswith(f"{__name__}.") and _lies_in(module, self.directory):
                del sys.modules[name]
        sys.modules.update(self._displaced)


@dataclass(slots=True, eq=False)
class _Turn:
    """The time for which one thread alone imports: from its outermost block's beginning to its end, or until its load
    is given up. All methods are called with `_changed`.

    Attributes:
        blocks: those that the thread is in, the outermost first.
    """

    sources: Sources
    blocks: list[_Block] = field(default_factory=list)

    def enter(self, block: _Block) -> None:
        """Raises:
        ImportError: the load was given up.
        """
        self.sources.check()
        block.enter()
        self.blocks.append(block)

    def leave(self, block: _Block) -> None:
        """Does nothing if the turn has ended before."""
        if block in self.blocks:
            block.leave()
            self.blocks.remove(block)

    def give_up(self) -> None:
        """End the turn although its thread goes on, perhaps for ever."""
        # That thread holds importlib's lock on the short name of the module whose import hangs, and another model may
        # have a module of that name. Without this entry importlib makes a new lock. Nothing public does that.
        locks: dict[str, object] = getattr(importlib, "_bootstrap")._module_locks  # noqa: B009
        for block in self.blocks:
            for name in block.short_names:
                locks.pop(name, None)
        self.end()

    def end(self) -> None:
        """May be called again."""
        for block in reversed(self.blocks):
            block.leave()
        self.blocks.clear()
        if self in _turns:
            _turns.remove(self)
            _changed.notify_all()


class _Thread(threading.local):
    """What a thread imports."""

    sources: Sources | None = None

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self.turn: _Turn | None = None


_thread = _Thread()


@contextmanager
def imports_from(directory: Path) -> Iterator[str]:
    """Let `import` find the modules in `directory` first, by their short names, for the length of the block; gives the
    package that they are imported into.

    An `import` of a sibling by its short name in one of the modules themselves works later, too, inside a function.
    One thread at a time; others wait, until the load of that thread is given up at most. Blocks for one directory may
    nest, and share what they import. Nothing is written into `directory`.

    Raises:
        ImportError: the load that this thread works on was given up.
    """
    directory = directory.resolve()
    blocks = _thread.blocks
    if blocks and blocks[-1].directory == directory:
        blocks[-1].sources.check()
        yield blocks[-1].package
        return
    sources = _thread.sources or Sources()
    package = f"{__name__}.{_encode(directory)}_n{next(_count)}"
    sources.packages.append(package)
    sys.modules[package] = module = ModuleType(package)
    module.__path__ = [str(directory)]
    try:
        with _short_names(directory, package):
            yield package
    finally:
        if _thread.sources is None:
            sources.close()


@contextmanager
def _short_names(directory: Path, package: str) -> Iterator[_Block]:
    """For the length of the block, what is imported into `package` stands under its short name, too.

    Raises:
        ImportError: the load that this thread works on was given up.
    """
    blocks = _thread.blocks
    if blocks and blocks[-1].package == package:
        blocks[-1].sources.check()
        yield blocks[-1]
        return
    with _turn() as turn:
        block = _Block(directory, package, frozenset(_importable(directory)), turn.sources)
        with _changed:
            turn.enter(block)
        blocks.append(block)
        try:
            yield block
        finally:
            blocks.pop()
            with _changed:
                turn.leave(block)


@contextmanager
def _turn() -> Iterator[_Turn]:
    """This thread's turn, which it may have already.

    Raises:
        ImportError: the load that this thread works on was given up.
    """
    if _thread.turn is not None:
        yield _thread.turn
        return
    turn = _Turn(_thread.sources or Sources())
    with _changed:
        turn.sources.wait_for_turn()
        _turns.append(turn)
    _thread.turn = turn
    try:
        yield turn
    finally:
        _thread.turn = None
        with _changed:
            turn.end()


def load_module(path: Path) -> ModuleType:
    """Import the file at `path`, inside `imports_from` its folder.

    Raises:
        ModelError: it cannot be read or raises; the cause is attached.
    """
    try:
        with imports_from(path.parent) as package:
            return importlib.import_module(f"{package}.{path.stem}")
    except BaseException as error:  # a source may raise anything, SystemExit too
        raise ModelError(f"{path} cannot be imported") from error


def is_model_source(module: str) -> bool:
    """Whether a module of that name was imported for one model."""
    return module.startswith(f"{__name__}.")


class _Finder(MetaPathFinder):
    """Finds modules by the names that this module gives them, and by their short names in a block of this thread's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        blocks = _thread.blocks
        if blocks and fullname.partition(".")[0] in blocks[-1].own:
            blocks[-1].sources.check()
            # importlib enters the module into `sys.modules` by the name in its spec, and `_execute` by the short one.
            return _spec(f"{blocks[-1].package}.{fullname}")
        return _spec(fullname) if fullname.startswith(f"{__name__}.") else None


def _spec(name: str) -> ModuleSpec | None:
    parent, _, last = name.rpartition(".")
    if parent == __name__:
        # A package that this process has imported is in `sys.modules`. To import another by its name alone would let
        # whoever can name a module run any folder's sources, so only a process that was spawned may: it has the name
        # from its parent. `_inheriting` holds while such a process still unpickles what it is to run.
        spawned = getattr(multiprocessing.current_process(), "_inheriting", False)
        if multiprocessing.parent_process() is None and not spawned:
            return None
        spec = ModuleSpec(name, _Folder(), is_package=True)
        spec.submodule_search_locations = [_decode(last)]
        return spec
    for folder in sys.modules[parent].__path__:
        found = importlib.machinery.FileFinder(
            folder,
            (_Extension, importlib.machinery.EXTENSION_SUFFIXES),
            (_Source, importlib.machinery.SOURCE_SUFFIXES),
            (_Bytecode, importlib.machinery.BYTECODE_SUFFIXES),
        ).find_spec(name)
        if found is not None:
            found.loader = found.loader or _Folder()
            return found
    return None


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run `module`, whose siblings it can import by their short names, as they can it; its functions can later, too."""
    token = module.__name__.removeprefix(f"{__name__}.").partition(".")[0]
    package = f"{__name__}.{token}"
    short_name = module.__name__.removeprefix(f"{package}.")
    with _short_names(Path(sys.modules[package].__path__[0]), package) as block:
        block.short_names.add(short_name)
        sys.modules[short_name] = module
        # Python looks `__import__` up where a function looks its built-in names up: in its module.
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": partial(_import, package, block.own)}
        try:
            execute(module)
        except BaseException:
            if sys.modules.get(short_name) is module:  # not another load's, if this one was given up
                del sys.modules[short_name]
            raise


def _import(
    package: str,
    own: frozenset[str],
    name: str,
    namespace: Mapping[str, object] | None = None,
    variables: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__` in the modules of `package`, whose short names are `own`: finds those, also once they are gone."""
    top = name.partition(".")[0]
    blocks = _thread.blocks
    if level or top not in own or (blocks and blocks[-1].package == package):
        return builtins.__import__(name, namespace, variables, fromlist or (), level)
    module = builtins.__import__(f"{package}.{name}", namespace, variables, fromlist or (), 0)
    return module if fromlist else sys.modules[f"{package}.{top}"]


class _Source(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _execute(super().exec_module, module)

    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew: bytecode that lies there is known by size and time of its source, which another may share."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Bytecode(importlib.machinery.SourcelessFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _execute(super().exec_module, module)


class _Extension(importlib.machinery.ExtensionFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _execute(super().exec_module, module)


class _Folder(Loader):
    """Of a folder without `__init__.py`."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__.rpartition(".")[0] != __name__:
            _execute(lambda _: None, module)


sys.meta_path.insert(0, _Finder())


def _encode(directory: Path) -> str:
    """A path as a name of a module: letters and digits stay, "/" becomes "__", other bytes their two digits."""
    quoted = (
        chr(byte) if chr(byte).isalnum() and byte < 128 else "__" if byte == ord("/") else f"_{byte:02x}"
        for byte in os.fsencode(directory)
    )
    return "".join(quoted)


def _decode(token: str) -> str:
    """The reverse of `_encode`, from the name of a package."""
    path = token.rpartition("_n")[0].encode()
    quoted = re.compile(rb"__|_([0-9a-f]{2})")
    return os.fsdecode(quoted.sub(lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"/", path))


def _importable(directory: Path) -> set[str]:
    """Names of the modules and packages in `directory`; a folder without `__init__.py` counts unless a module of that
    name is installed."""
    suffixes = tuple(importlib.machinery.all_suffixes())
    names: set[str] = set()
    for entry in directory.iterdir():
        if is_ignored(entry.name):
            continue
        name = entry.name.partition(".")[0]
        is_module = entry.name.endswith(suffixes) or (entry / "__init__.py").is_file()
        if is_module or (entry.is_dir() and entry.name.isidentifier() and not _is_installed(name)):
            names.add(name)
    return names


def _is_installed(name: str) -> bool:
    """Whether a module of that name can be imported, a folder without `__init__.py` apart."""
    if name in sys.modules:
        return True
    specs = (finder.find_spec(name, None) for finder in sys.meta_path if not isinstance(finder, _Finder))
    return any(spec is not None and spec.origin is not None for spec in specs)


def _lies_in(module: ModuleType | None, directory: Path) -> bool:
    """Whether `module` is a file below `directory`, or a folder of it that has no file of its own."""
    file = getattr(module, "__file__", None)
    places = [file] if file is not None else list(getattr(module, "__path__", ()))
    return any(directory in Path(place).parents for place in places)
