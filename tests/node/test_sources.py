from __future__ import annotations

import gc
import importlib
import inspect
import os
import pickle
import py_compile
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dl_inference_core.errors import ModelError
from dl_inference_core.node.sources import Sources, imports_from, load_module


def write(directory: Path, **sources: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (directory / f"{name}.py").write_text(text)
    return directory


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path):
    modules, path = dict(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    assert {name: sys.modules.get(name) for name in modules} == modules
    left = [name for name, module in sys.modules.items() if str(tmp_path) in repr(module)]
    assert left == []


def test_two_directories_have_each_their_own_module_of_one_name(tmp_path):
    one = write(tmp_path / "1", net="who = 'one'", handler="import net\ndef who(): return net.who")
    two = write(tmp_path / "2", net="who = 'two'", handler="import net\ndef who(): return net.who")
    handlers = [load_module(directory / "handler.py") for directory in (one, two, one)]
    assert [handler.who() for handler in handlers] == ["one", "two", "one"]
    assert len({handler.__name__ for handler in handlers}) == 3
    assert "net" not in sys.modules


def test_a_module_of_that_name_from_elsewhere_does_not_shadow_it_and_comes_back(tmp_path, monkeypatch):
    elsewhere = write(tmp_path / "elsewhere", net="who = 'elsewhere'")
    monkeypatch.syspath_prepend(elsewhere)
    import net

    own = write(tmp_path / "own", net="who = 'own'")
    try:
        with imports_from(own):
            assert __import__("net").who == "own"
        assert sys.modules["net"] is net
    finally:
        del sys.modules["net"]


def test_packages_and_folders_without_init_are_forgotten_with_what_is_in_them(tmp_path):
    def make(version: str) -> Path:
        directory = write(tmp_path / version)
        write(directory / "package", __init__="", part=f"who = {version!r}")
        write(directory / "folder", part=f"who = {version!r}")
        return directory

    for version in ("1", "2"):
        with imports_from(make(version)):
            import folder.part
            import package.part

            assert package.part.who == folder.part.who == version
        assert not {"package", "package.part", "folder", "folder.part"} & sys.modules.keys()


def test_files_that_are_no_sources_displace_nothing(tmp_path):
    (tmp_path / "json.pth").touch()
    write(tmp_path / "pytest", notes="")
    before = sys.modules["json"], sys.modules["pytest"]
    with imports_from(tmp_path):
        assert (sys.modules["json"], sys.modules["pytest"]) == before


def test_installed_modules_that_a_source_imports_stay(tmp_path):
    write(tmp_path, net="import this_is_installed")
    installed = write(tmp_path / "site", this_is_installed="")
    sys.path.append(str(installed))
    try:
        load_module(tmp_path / "net.py")
        assert "this_is_installed" not in sys.modules, "below the directory, so the directory's own"
        other = write(tmp_path / "other", net="import this_is_installed")
        load_module(other / "net.py")
        assert sys.modules.pop("this_is_installed").__file__ == str(installed / "this_is_installed.py")
    finally:
        sys.path.remove(str(installed))


def test_nested_blocks_share_their_modules(tmp_path):
    write(tmp_path, net="class Net: pass", model="from net import Net")
    with imports_from(tmp_path):
        import net

        assert load_module(tmp_path / "model.py").Net is net.Net
        assert sys.modules["net"] is net


def test_a_dataclass_can_be_made_while_its_module_loads(tmp_path):
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n"
    assert load_module(write(tmp_path, model=text) / "model.py").Point(3).x == 3


def test_nothing_is_written_beside_the_model(tmp_path):
    write(tmp_path, net="", model="import net")
    before = sys.dont_write_bytecode
    load_module(tmp_path / "model.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py", "net.py"]
    assert sys.dont_write_bytecode is before


@pytest.mark.parametrize("text", ["import no_such_module", "1 +", "raise SystemExit(3)", "raise BaseException", "\x00"])
def test_a_source_that_fails_is_a_model_error_with_its_cause_and_leaves_nothing(tmp_path, text):
    write(tmp_path, net="", model=f"import net\n{text}")
    with pytest.raises(ModelError, match=r"model\.py cannot be imported") as error:
        load_module(tmp_path / "model.py")
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("name", ["missing.py", "missing/model.py"])
def test_a_source_that_is_not_there_is_a_model_error(tmp_path, name):
    with pytest.raises(ModelError, match=r"\.py cannot be imported"):
        load_module(tmp_path / name)


def test_threads_wait_for_each_other(tmp_path):
    one, two = write(tmp_path / "1", net="who = 'one'"), write(tmp_path / "2", net="who = 'two'")
    seen: list[str] = []
    waiting = threading.Event()

    def load() -> None:
        waiting.set()
        seen.append(load_module(two / "net.py").who)

    thread = threading.Thread(target=load)
    with imports_from(one):
        thread.start()
        waiting.wait(10)
        thread.join(0.05)
        import net

        seen.append(net.who)
    thread.join(10)
    assert seen == ["one", "two"]


def test_other_threads_may_import_meanwhile(tmp_path):
    (tmp_path / "source.py").write_text("value = 1")
    ended = threading.Event()

    def enter_modules() -> None:
        while not ended.is_set():
            names = [f"entered_meanwhile_{number}" for number in range(1000)]
            sys.modules.update({name: ModuleType(name) for name in names})
            for name in names:
                del sys.modules[name]

    thread = threading.Thread(target=enter_modules)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for _ in range(50):
            with imports_from(tmp_path):
                assert load_module(tmp_path / "source.py").value == 1
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join(10)


def test_a_source_may_change_the_path(tmp_path):
    write(tmp_path, model="import sys\nsys.path.pop(0)")
    load_module(tmp_path / "model.py")


KEPT = """
import pickle, inspect, multiprocessing
from concurrent.futures import ProcessPoolExecutor
import pydantic
import net

class Order(pydantic.BaseModel):
    item: "Item"

class Item(pydantic.BaseModel):
    n: int

def twice(x):
    return net.two() * x

def in_pool(method):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        return pool.submit(twice, 21).result(60)

def in_process(method):
    context = multiprocessing.get_context(method)
    ends, end = context.Pipe(False)
    process = context.Process(target=send, args=(end,))
    process.start()
    answer = ends.recv()
    process.join(60)
    return answer

def send(end):
    end.send(twice(21))
"""


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Any]:
    write(tmp_path / "a folder_1", net="def two(): return 2\nclass Net: pass", handler=KEPT)
    with Sources() as sources:
        module = load_module(tmp_path / "a folder_1" / "handler.py")
    yield module
    sources.close()


def test_what_looks_a_class_up_by_its_module_finds_it_while_the_version_is_loaded(kept):
    assert pickle.loads(pickle.dumps(kept.Item(n=3))).n == 3
    assert pickle.loads(pickle.dumps(kept.net.Net())).__class__ is kept.net.Net
    assert "n: int" in inspect.getsource(kept.Item)
    assert "return 2" in inspect.getsource(kept.net.two)
    assert kept.Order.model_validate({"item": {"n": 1}}).item.n == 1
    assert "net" not in sys.modules


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_a_handler_starts_finds_its_functions(kept, method):
    assert kept.in_pool(method) == 42
    assert kept.in_process(method) == 42


LATE = """
import package

def statements():
    import net
    import package.part
    import package.part as part
    from package import part as same
    from package.part import VALUE
    from net import other as others
    assert package.part is part is same
    import json, xml.dom
    assert json.dumps([1]) == "[1]" and xml.dom.__name__ == "xml.dom"
    return net.other().__name__, others().__name__, VALUE

def missing():
    import package.missing

def submit(method):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        return pool.submit(statements).result(60)
"""


@pytest.fixture
def late(tmp_path: Path) -> Iterator[Any]:
    folder = tmp_path / "late"
    write(folder / "package", __init__="", part="VALUE = 5")
    write(folder, net="def other():\n    import other\n    return other", other="", handler=LATE)
    with Sources() as sources:
        module = load_module(folder / "handler.py")
    yield module
    sources.close()


def test_a_function_may_import_a_module_beside_it_later(late):
    package = late.__name__.rpartition(".")[0]
    for _ in range(2):
        assert late.statements() == (f"{package}.other", f"{package}.other", 5)
    for name in ("net", "other", "package"):
        assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="missing"):
        late.missing()


def test_a_function_in_a_process_that_a_handler_starts_may_import_later(late):
    *_, value = late.submit("spawn")
    assert value == 5


def test_a_version_that_is_unloaded_leaves_no_module(tmp_path):
    write(tmp_path / "package", __init__="from . import part", part="")
    write(tmp_path, net="", handler="import net, package.part")
    before = set(sys.modules)
    sources = Sources()
    with sources:
        module = load_module(tmp_path / "handler.py")
    left = set(sys.modules) - before
    assert {name.rpartition(".")[2] for name in left} >= {"handler", "net", "package", "part"}
    gone = weakref.ref(module)
    sources.close()
    assert set(sys.modules) - before == set()
    del module
    gc.collect()
    assert gone() is None


def test_a_module_is_one_whether_it_is_imported_by_its_short_name_or_relatively(tmp_path):
    write(tmp_path / "package", __init__="from . import part", part="import package\nwho = package")
    write(tmp_path, net="", handler="import package.part, net\nfrom . import net as same\nfrom package import part")
    module = load_module(tmp_path / "handler.py")
    assert module.part.who is module.package
    assert module.same is module.net


def test_sources_may_import_each_other_in_a_circle_and_fall_back_where_one_fails(tmp_path):
    write(
        tmp_path,
        net="import other\nwho = 'net'",
        other="import net\ndef who(): return net.who",
        broken="import no_such_module",
        handler="import net, other\ntry:\n    import broken\nexcept ImportError:\n    broken = None\n",
    )
    module = load_module(tmp_path / "handler.py")
    assert module.other.who() == "net"
    assert module.broken is None


def test_bytecode_that_lies_beside_a_source_is_not_run(tmp_path):
    source = write(tmp_path, net="who = 1") / "net.py"
    status = source.stat()
    py_compile.compile(str(source))
    source.write_text("who = 2")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_module(source).who == 2


def test_a_name_alone_does_not_have_a_folders_sources_run(tmp_path, kept):
    write(tmp_path / "evil", net="raise AssertionError('run')")
    name = kept.__name__.replace("a_20folder_5f1", "evil")
    assert name != kept.__name__
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name.replace(".handler", ".net"))
