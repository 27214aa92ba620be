from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from dl_inference_core.errors import ModelError
from dl_inference_core.node.sources import imports_from, load_module


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


@pytest.mark.parametrize("text", ["import no_such_module", "1 +", "raise SystemExit(3)", "\x00"])
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


def test_a_source_may_change_the_path(tmp_path):
    write(tmp_path, model="import sys\nsys.path.pop(0)")
    load_module(tmp_path / "model.py")
