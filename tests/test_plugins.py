from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dl_inference_core.cli import main
from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ConfigError, PluginError
from dl_inference_core.gateway.balancing import Balancer, RoundRobin
from dl_inference_core.plugins import Kind, Plugin, Plugins

GROUP = "dl_inference_core"

GOOD = """
from pydantic import Field
from dl_inference_core.config import PluginOptions
from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.hookspecs import hookimpl

class {cls}(Balancer):
    name = "{name}"

    class Options(PluginOptions):
        size: int = Field(default=1, ge=1)

    def choose(self, nodes, call):
        return nodes[0]

@hookimpl
def dl_inference_register_balancers():
    return [{cls}]
"""

HOOK = """
from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.hookspecs import hookimpl

@hookimpl
def dl_inference_register_balancers():
    {body}
"""


class Installed(Distribution):
    """A distribution as if it had been installed."""

    def __init__(self, name: str, version: str, requires: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        if requires:
            self._text += f"Requires-Dist: {requires}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(path)


class Installer:
    """Makes entry points of modules."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.modules: list[str] = []

    def __call__(
        self, name: str, source: str | None, *, distribution: str = "", module: str = "", requires: str = ""
    ) -> EntryPoint:
        module = module or f"plugin_under_test_{name}_{len(self.modules)}"
        if source is not None:
            (self._folder / f"{module}.py").write_text(source)
            self.modules.append(module)
        entry = EntryPoint(name=name, value=module, group=GROUP)
        dist = Installed(distribution or f"dist-of-{name}", "1.2.3", requires)
        vars(entry).update(dist=dist)  # as importlib.metadata does it
        return entry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    monkeypatch.syspath_prepend(str(tmp_path))
    installer = Installer(tmp_path)
    yield installer
    for module in installer.modules:
        sys.modules.pop(module, None)


def core() -> EntryPoint:
    return EntryPoint(name="core", value="dl_inference_core.builtins", group=GROUP)


def described(plugins: Plugins, name: str) -> Plugin:
    return next(plugin for plugin in plugins.describe() if plugin.name == name)


def test_a_plugin_is_found_with_what_it_provides(install: Installer) -> None:
    plugins = Plugins([core(), install("good", GOOD.format(cls="First", name="first"))])
    good = described(plugins, "good")
    assert (good.distribution, good.version, good.error) == ("dist-of-good", "1.2.3", "")
    assert good.provides == {Kind.BALANCERS: ["first"]}
    assert str(good) == 'plugin "good" of dist-of-good 1.2.3'
    assert issubclass(plugins.get(Kind.BALANCERS, "first", "x"), Balancer)
    assert plugins.get(Kind.BALANCERS, "round_robin", "x") is RoundRobin


BROKEN = {
    "does not import": ("raise OSError('libfoo.so is missing')", "OSError: libfoo.so is missing"),
    "imports what is missing": ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
    "is no python": ("def (", "SyntaxError"),
    "panics": (
        "class Panic(BaseException): pass\nraise Panic('unwrap on None')",  # as bindings to Rust have it
        "Panic: unwrap on None",
    ),
    "hook panics": (
        HOOK.format(body="raise type('Panic', (BaseException,), {})('unwrap on None')"),
        "dl_inference_register_balancers: Panic: unwrap on None",
    ),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "misspelt hook": (
        "from dl_inference_core.hookspecs import hookimpl\n@hookimpl\ndef dl_inference_register_balancer(): return []",
        "dl_inference_register_balancer",
    ),
    "hook with an argument": (
        "from dl_inference_core.hookspecs import hookimpl\n"
        "@hookimpl\ndef dl_inference_register_balancers(config): return []",
        "config",
    ),
    "hook raises": (HOOK.format(body="raise ValueError('bad luck')"), "ValueError: bad luck"),
    "hook exits": (HOOK.format(body="raise SystemExit(4)"), "SystemExit: 4"),
    "gives nothing": (HOOK.format(body="return None"), "the hook returned None; expected a list of classes"),
    "gives an object": (HOOK.format(body="return [object()]"), "which is not a subclass of Balancer"),
    "gives another class": (HOOK.format(body="return [dict]"), "<class 'dict'>, which is not a subclass of Balancer"),
    "gives a class without a name": (
        HOOK.format(body="return [type('Nameless', (Balancer,), {})]"),
        "balancer class Nameless has no `name`",
    ),
    "gives a class with the name of another class of its own": (
        HOOK.format(
            body="base = type('Base', (Balancer,), {'name': 'base'}); return [type('Heir', (base,), {})]",
        ),
        'balancer class Heir has no `name` of its own (it inherits "base")',
    ),
    "gives a handler that would replace the default one": (
        "from dl_inference_core.hookspecs import hookimpl\n"
        "from dl_inference_core.node.handling import Handler\n"
        "@hookimpl\ndef dl_inference_register_handlers(): return [type('Mine', (Handler,), {})]",
        'handler class Mine has no `name` of its own (it inherits "default")',
    ),
    "gives an abstract class": (
        HOOK.format(body="return [type('Half', (Balancer,), {'name': 'half'})]"),
        "balancer class Half is abstract: it does not define choose",
    ),
    "gives options that are a plain class": (
        HOOK.format(body="return [type('Odd', (Balancer,), {'name': 'odd', 'choose': print, 'Options': dict})]"),
        "balancer class Odd: its Options is <class 'dict'>; expected a subclass of",
    ),
    "gives model options that are an object": (
        "from dl_inference_core.hookspecs import hookimpl\n"
        "from dl_inference_core.testing import FakeBackend\n"
        "class Odd(FakeBackend):\n    name = 'odd'\n    ModelOptions = 3\n"
        "@hookimpl\ndef dl_inference_register_backends(): return [Odd]",
        "backend class Odd: its ModelOptions is 3; expected a subclass of",
    ),
    "has no hooks": ("import json", "has no hooks; expected one or more of dl_inference_register_backends, "),
    "forgets hookimpl": (
        "def dl_inference_register_balancers(): return []",
        "dl_inference_register_balancers is not decorated with dl_inference_core.hookspecs.hookimpl",
    ),
    "raises what cannot say what it is": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
        "Odd: ",
    ),
    "gives an empty name": (
        HOOK.format(body="return [type('Empty', (Balancer,), {'name': ''})]"),
        "balancer class Empty has no `name`",
    ),
    "takes a name": (
        HOOK.format(body="return [type('Second', (Balancer,), {'name': 'round_robin'})]"),
        'the balancer name "round_robin" is taken by plugin "core"',
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_go_on(install: Installer, case: str) -> None:
    source, said = BROKEN[case]
    plugins = Plugins(
        [
            core(),
            install("before", GOOD.format(cls="Before", name="before")),
            install("broken", source),
            install("after", GOOD.format(cls="After", name="after")),
        ]
    )
    assert set(plugins.classes(Kind.BALANCERS)) == {"round_robin", "before", "after"}
    assert plugins.classes(Kind.BALANCERS)["round_robin"] is RoundRobin
    broken = described(plugins, "broken")
    assert said in broken.error
    assert "\n" not in broken.error.strip()
    assert (broken.distribution, broken.version) == ("dist-of-broken", "1.2.3")
    assert [plugin.name for plugin in plugins.describe() if plugin.error] == ["broken"]
    with pytest.raises(PluginError) as caught:
        plugins.get(Kind.BALANCERS, "wanted", "route a: balancer")
    assert 'plugin "broken" of dist-of-broken 1.2.3 is broken: ' in str(caught.value)


def test_a_plugin_that_changes_the_current_folder_leaves_relative_paths_their_meaning(
    install: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanders = install("wanders", "import os\nos.chdir('/')\n" + HOOK.format(body="import os; os.chdir('/'); return []"))
    plugins = Plugins([core(), wanders])
    assert Path.cwd() == tmp_path
    assert not described(plugins, "wanders").error
    assert Path.cwd() == tmp_path


def test_what_a_plugin_gave_before_it_broke_is_usable(install: Installer) -> None:
    source = HOOK.format(body="return [type('Fine', (Balancer,), {'name': 'fine', 'choose': print}), 5]")
    plugins = Plugins([core(), install("half", source)])
    assert "fine" in plugins.classes(Kind.BALANCERS)
    half = described(plugins, "half")
    assert half.error.startswith("dl_inference_register_balancers: the hook returned 5")
    assert half.provides == {Kind.BALANCERS: ["fine"]}


CLASHING = """
from dl_inference_core.gateway.balancing import Balancer
from dl_inference_core.hookspecs import hookimpl

class Taker(Balancer):
    name = "round_robin"
    def choose(self, nodes, call): return nodes[0]

class Other(Taker):
    name = "other"

@hookimpl(trylast=True)
def dl_inference_register_balancers():
    return [Taker, Other]
"""


def test_the_cores_names_cannot_be_taken_by_a_plugin_that_is_found_before_it(install: Installer) -> None:
    plugins = Plugins([install("a_first", CLASHING), core()])
    assert plugins.classes(Kind.BALANCERS)["round_robin"] is RoundRobin
    taker = described(plugins, "a_first")
    assert 'balancer class Taker: the balancer name "round_robin" is taken by plugin "core"' in taker.error
    assert taker.provides == {Kind.BALANCERS: ["other"]}, "the plugin's other classes stay"


@pytest.mark.parametrize(
    ("requires", "said"),
    [
        ("dl-inference-core>=99", "it needs dl-inference-core>=99, but dl-inference-core"),
        ("DL_Inference.Core<0.0.1", "it needs dl-inference-core<0.0.1, but dl-inference-core"),
        ("dl-inference-core>=0.0.1", ""),
        ("dl-inference-core>=99; extra == 'demo'", ""),
        ("dl-inference-core>=99; python_version < '3'", ""),
        ("another-distribution>=99", ""),
        ("no requirement at all !", ""),
    ],
)
def test_a_plugin_that_needs_another_core_is_reported_and_not_imported(
    install: Installer, requires: str, said: str
) -> None:
    source = GOOD.format(cls="First", name="first")
    if said:
        source = f"raise AssertionError('imported')\n{source}"
    plugins = Plugins([core(), install("newer", source, requires=requires)])
    error = described(plugins, "newer").error
    assert error.startswith(said) if said else error == ""
    assert ("first" in plugins.classes(Kind.BALANCERS)) is not bool(said)


def test_options_that_cannot_be_described_are_reported(install: Installer) -> None:
    source = GOOD.format(cls="First", name="first").replace("default=1, ge=1", "default_factory=lambda: 1 / 0")
    plugins = Plugins([core(), install("odd", source)])
    assert plugins.provided(Kind.BALANCERS, "first").options == {}
    assert 'balancer "first" cannot be described: ZeroDivisionError' in described(plugins, "odd").error


@pytest.mark.parametrize("error", ["OSError", "SystemExit"])
def test_a_transport_that_cannot_tell_what_it_lacks_is_not_chosen(install: Installer, error: str) -> None:
    source = (
        "from dl_inference_core.grpcio_transport import GrpcioTransport\n"
        "from dl_inference_core.hookspecs import hookimpl\n"
        "class Fast(GrpcioTransport):\n    name = 'fast'\n    priority = 10\n"
        f"    @classmethod\n    def missing(cls): raise {error}('no disk')\n"
        "@hookimpl\ndef dl_inference_register_transports(): return [Fast]"
    )
    plugins = Plugins([core(), install("other", source)])
    assert plugins.choose_transport("auto") == (
        "grpcio",
        f"fast cannot run here: it cannot tell what it needs: {error}: no disk",
    )


def test_two_broken_hooks_are_both_reported(install: Installer) -> None:
    source = HOOK.format(body="raise ValueError('one')") + (
        "@hookimpl\ndef dl_inference_register_transports():\n    raise ValueError('two')\n"
    )
    error = described(Plugins([core(), install("both", source)]), "both").error
    assert "dl_inference_register_balancers: ValueError: one" in error
    assert "dl_inference_register_transports: ValueError: two" in error


def test_two_entry_points_of_one_name_are_told_apart(install: Installer) -> None:
    first = install("twin", GOOD.format(cls="One", name="one"), distribution="first")
    second = install("twin", GOOD.format(cls="Two", name="two"), distribution="second")
    plugins = Plugins([core(), first, second])
    assert set(plugins.classes(Kind.BALANCERS)) == {"round_robin", "one"}
    (broken,) = (plugin for plugin in plugins.describe() if plugin.error)
    assert broken.distribution == "second"
    assert 'is taken by plugin "twin" of first 1.2.3' in broken.error


def test_one_module_under_two_names_is_reported(install: Installer) -> None:
    first = install("first", GOOD.format(cls="One", name="one"), module="plugin_under_test_shared")
    second = install("second", None, module="plugin_under_test_shared")
    plugins = Plugins([core(), first, second])
    assert set(plugins.classes(Kind.BALANCERS)) == {"round_robin", "one"}
    assert [plugin.name for plugin in plugins.describe() if plugin.error] == ["second"]
    second_error = described(plugins, "second").error
    assert second_error == 'plugin_under_test_shared is registered already, by plugin "first" of dist-of-first 1.2.3'


def test_an_unknown_name_says_what_would_help() -> None:
    plugins = Plugins([core()])
    with pytest.raises(PluginError) as caught:
        plugins.get(Kind.BALANCERS, "dynamic_weighted_round_robin", "route 69: balancer")
    assert str(caught.value) == (
        'route 69: balancer names the balancer "dynamic_weighted_round_robin", which no installed plugin provides; '
        "installed: round_robin; try: pip install dl-inference-balancers"
    )
    with pytest.raises(PluginError, match="installed: none; try: pip install dl-inference-torch-backend"):
        plugins.get(Kind.BACKENDS, "torch", "x")


def test_options_are_strict(install: Installer) -> None:
    plugins = Plugins([core(), install("good", GOOD.format(cls="First", name="first"))])
    made = plugins.make(Kind.BALANCERS, "first", {"size": 3}, "route a: balancer")
    assert made.options.size == 3
    for options, said in (
        ({"sise": 3}, 'route a: balancer: options of balancer first: unknown key "sise" (known: size)'),
        ({"size": 0}, "route a: balancer: options of balancer first: size: Input should be greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            plugins.make(Kind.BALANCERS, "first", options, "route a: balancer")
        assert str(caught.value) == said
    with pytest.raises(ConfigError, match=r'unknown key "size" \(there are none\)'):
        plugins.make(Kind.BALANCERS, "round_robin", {"size": 3}, "route a: balancer")


def test_a_class_that_cannot_be_made_is_a_plugin_error(install: Installer) -> None:
    source = GOOD.format(cls="First", name="first").replace(
        "    def choose", "    def __init__(self, options):\n        raise KeyError('x')\n\n    def choose"
    )
    plugins = Plugins([core(), install("bad", source)])
    with pytest.raises(
        PluginError, match=r'route a: plugin "bad" of dist-of-bad 1.2.3 cannot make the balancer "first"'
    ):
        plugins.make(Kind.BALANCERS, "first", {}, "route a")


def test_the_hooks_of_other_kinds_are_not_called(install: Installer) -> None:
    source = HOOK.format(body="raise ValueError") + (
        "@hookimpl\ndef dl_inference_register_transports():\n    return []\n"
    )
    plugins = Plugins([core(), install("lazy", source)])
    plugins.classes(Kind.TRANSPORTS)
    assert [plugin.error for plugin in plugins._plugins.values()] == ["", ""]


COMMANDS = """
import click
from dl_inference_core.hookspecs import hookimpl

@click.command()
def {name}():
    click.echo("hello")

@hookimpl
def dl_inference_register_commands():
    return [{name}, {more}]
"""


def test_commands_of_plugins_are_found_by_name(install: Installer) -> None:
    plugins = Plugins([core(), install("one", COMMANDS.format(name="greet", more="click.Command('wave')"))])
    commands = plugins.commands({"serve"})
    assert set(commands) == {"greet", "wave"}
    assert CliRunner().invoke(commands["greet"]).output == "hello\n"
    one = described(plugins, "one")
    assert (one.commands, one.error) == (["greet", "wave"], "")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("click.Command('serve')", 'the command "serve" is taken by the core'),
        ("click.Command('greet')", 'the command "greet" is taken by plugin "one" of dist-of-one 1.2.3'),
        ("click.Command", "which is not a click.Command with a name"),
        ("click.Command(None)", "which is not a click.Command with a name"),
    ],
)
def test_a_command_that_cannot_be_used_leaves_the_others(install: Installer, more: str, said: str) -> None:
    plugins = Plugins([core(), install("one", COMMANDS.format(name="greet", more=more))])
    assert set(plugins.commands({"serve"})) == {"greet"}
    error = described(plugins, "one").error
    assert error.startswith("dl_inference_register_commands: ")
    assert said in error


def test_a_hook_without_commands_is_reported_and_others_commands_stay(install: Installer) -> None:
    broken = COMMANDS.format(name="greet", more="").replace("return [", "raise OSError('gone'); return [")
    none = COMMANDS.format(name="greet", more="").replace("return [greet, ]", "return greet")
    good = COMMANDS.format(name="wave", more="")
    plugins = Plugins([core(), install("bad", broken), install("none", none), install("good", good)])
    assert set(plugins.commands()) == {"wave"}
    assert described(plugins, "bad").error == "dl_inference_register_commands: OSError: gone"
    assert "expected a list of commands" in described(plugins, "none").error


def test_asking_for_balancers_and_transports_imports_neither_numpy_nor_a_framework() -> None:
    code = (
        "import sys; from dl_inference_core.plugins import Plugins, Kind; p = Plugins();"
        "assert 'round_robin' in p.classes(Kind.BALANCERS); assert 'grpcio' in p.classes(Kind.TRANSPORTS);"
        "print([m for m in ('numpy', 'torch', 'tensorflow', 'dl_inference_core.node') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_projects_own_plugins_are_all_well() -> None:
    plugins = {plugin.name: plugin for plugin in Plugins().describe()}
    assert {name: plugin.error for name, plugin in plugins.items()} == dict.fromkeys(plugins, "")
    assert plugins["core"].distribution == "dl-inference-core"
    provided = {
        (kind, name) for plugin in plugins.values() for kind, names in plugin.provides.items() for name in names
    }
    assert provided >= {
        (Kind.BACKENDS, "torch"),
        (Kind.HANDLERS, "default"),
        (Kind.BALANCERS, "round_robin"),
        (Kind.BALANCERS, "weighted_round_robin"),
        (Kind.BALANCERS, "dynamic_weighted_round_robin"),
        (Kind.BALANCERS, "orca_weighted_round_robin"),
        (Kind.BALANCERS, "random"),
        (Kind.BALANCERS, "least_request"),
        (Kind.BALANCERS, "peak_ewma"),
        (Kind.BALANCERS, "prequal"),
        (Kind.BALANCERS, "rendezvous_hash"),
        (Kind.TRANSPORTS, "grpcio"),
    }


def test_the_projects_own_commands_are_all_well() -> None:
    plugins = Plugins()
    assert set(plugins.commands(main.commands)) >= {"bench", "tune", "tfserving"}
    assert [plugin for plugin in plugins.describe() if plugin.error] == []


def test_the_interface_of_each_kind_carries_options() -> None:
    for kind in Kind:
        assert issubclass(kind.interface.Options, PluginOptions)  # type: ignore[attr-defined]
