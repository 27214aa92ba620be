"""Entry points → usable classes by name, and what is broken and why."""

from __future__ import annotations

import enum
import importlib
import inspect
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import dl_inference_core
from dl_inference_core import hookspecs
from dl_inference_core.choosable import Choosable
from dl_inference_core.config import PluginOptions, resolved, validated
from dl_inference_core.errors import ConfigError, PluginError, text_of


class Kind(enum.Enum):
    """What a plugin can bring. The value is what a person calls one of it."""

    BACKENDS = "backend"
    HANDLERS = "handler"
    BALANCERS = "balancer"
    TRANSPORTS = "transport"
    CODECS = "codec"
    APIS = "API"

    @property
    def hook(self) -> str:
        return f"dl_inference_register_{self.name.lower()}"

    @property
    def interface(self) -> type:
        """The class that each class of this kind derives from; imported on first use: a gateway needs no backends."""
        module, _, name = _INTERFACES[self].rpartition(".")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


_INTERFACES = {
    Kind.BACKENDS: "dl_inference_core.node.backend.Backend",
    Kind.HANDLERS: "dl_inference_core.node.handling.Handler",
    Kind.BALANCERS: "dl_inference_core.gateway.balancing.Balancer",
    Kind.TRANSPORTS: "dl_inference_core.transport.Transport",
    Kind.CODECS: "dl_inference_core.wire.codecs.Codecs",
    Kind.APIS: "dl_inference_core.api.Api",
}

_COMMANDS = "dl_inference_register_commands"

_CORE = "dl-inference-core"
_CORE_MODULE = "dl_inference_core.builtins"

_DISTRIBUTIONS = {
    "torch": "dl-inference-torch-backend",
    "tensorflow": "dl-inference-tf-backend",
    **dict.fromkeys(
        (
            "weighted_round_robin",
            "dynamic_weighted_round_robin",
            "orca_weighted_round_robin",
            "random",
            "least_request",
            "peak_ewma",
            "prequal",
            "rendezvous_hash",
        ),
        "dl-inference-balancers",
    ),
    "bench": "dl-inference-tools",
    "tune": "dl-inference-tools",
    "tfserving": "dl-inference-tfserving",
    "seldon": "dl-inference-seldon",
}
"""Which distribution of ours brings a name, for the hint in an error."""


@dataclass(frozen=True, slots=True)
class Provided:
    """What is said of one class of a plugin.

    Attributes:
        purpose: the first paragraph of its docstring, in a line.
        options: the defaults of its options, as JSON has them; those without one are left out.
    """

    purpose: str
    options: dict[str, Any]

    @classmethod
    def of(cls, provided: type[Any]) -> Provided:
        paragraph, *_ = inspect.cleandoc(provided.__doc__ or "").split("\n\n")
        options: PluginOptions = provided.Options.model_construct()
        return cls(" ".join(paragraph.split()), options.model_dump(mode="json"))


@dataclass(slots=True)
class Plugin:
    """One entry point, as found.

    Attributes:
        name: the entry point's name.
        distribution, version: what it was installed from.
        provides: names by kind.
        commands: the names of the commands that it adds to the program.
        error: why it, or a part of it, cannot be used; "" if it can be used as a whole.
    """

    name: str
    distribution: str
    version: str
    provides: dict[Kind, list[str]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    error: str = ""

    def __str__(self) -> str:
        return f'plugin "{self.name}" of {self.distribution} {self.version}'

    def fail(self, reason: str) -> None:
        """Note one more thing that cannot be used."""
        self.error = f"{self.error}; {reason}" if self.error else reason


class Plugins:
    """Every installed plugin. The core comes first, so that no other plugin can take one of its names.

    A broken plugin is reported in its `Plugin.error`; an exception is raised only where a config names something that
    the plugin would have provided. The hooks of a kind are called when its classes are first wanted, on the thread that
    asks; never on the request path.
    """

    def __init__(self, found: Sequence[EntryPoint] | None = None) -> None:
        """Args:
        found: the entry points; by default the installed ones of the group "dl_inference_core".
        """
        self._manager = pluggy.PluginManager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._classes: dict[Kind, dict[str, type[Any]]] = {}
        self._plugins: dict[str, Plugin] = {}
        entries = found if found is not None else sorted(entry_points(group=hookspecs.GROUP))
        for entry in sorted(entries, key=lambda entry: entry.value != _CORE_MODULE):
            self._register(entry)

    def _register(self, entry: EntryPoint) -> None:
        distribution = entry.dist
        plugin = Plugin(
            name=entry.name,
            distribution=distribution.name if distribution else "an unknown distribution",
            version=distribution.version if distribution else "?",
        )
        if entry.name in self._plugins:
            other = self._plugins[entry.name]
            plugin.error = f"the entry point's name is taken by {other}"
            self._plugins[f"{entry.name} ({plugin.distribution})"] = plugin
            return
        self._plugins[entry.name] = plugin
        with _noting_errors(plugin):
            if distribution is not None:
                _check_requirements(distribution)
            module = entry.load()
            if (name := self._manager.get_name(module)) is not None:
                raise PluginError(f"{entry.value} is registered already, by {self._plugins[name]}")
            self._manager.register(module, name=entry.name)
            try:
                self._manager.check_pending()
                if not self._manager.get_hookcallers(module):
                    raise PluginError(_without_hooks(entry.value, module))
            except (PluginError, pluggy.PluginValidationError):
                self._manager.unregister(name=entry.name)
                raise

    def classes(self, kind: Kind) -> Mapping[str, type[Any]]:
        """The classes of `kind` by name, without those that cannot be used."""
        if kind not in self._classes:
            self._classes[kind] = {}
            for plugin, hook in self._hooks(kind.hook):
                where = f"{kind.hook}: "
                with _noting_errors(plugin, where):
                    for cls in _listed(hook.function()):
                        with _noting_errors(plugin, where):
                            self._add(kind, plugin, cls)
        return self._classes[kind]

    def commands(self, taken: Collection[str] = ()) -> Mapping[str, click.Command]:
        """The commands that plugins add to the program, by name. To be called once: it calls the hooks.

        Args:
            taken: names that no plugin can have: those of the core's own commands.
        """
        owners: dict[str, object] = dict.fromkeys(taken, "the core")
        found: dict[str, click.Command] = {}
        for plugin, hook in self._hooks(_COMMANDS):
            where = f"{_COMMANDS}: "
            with _noting_errors(plugin, where):
                for command in _listed(hook.function(), "commands"):
                    with _noting_errors(plugin, where):
                        name = _command_name(command)
                        if name in owners:
                            raise PluginError(f'the command "{name}" is taken by {owners[name]}')
                        owners[name] = plugin
                        found[name] = command
                        plugin.commands.append(name)
        return found

    def _hooks(self, name: str) -> Iterator[tuple[Plugin, pluggy.HookImpl]]:
        """The hooks of that name in the order of `_plugins`, which pluggy's own order need not be: the core is
        first."""
        hooks = {hook.plugin_name: hook for hook in getattr(self._manager.hook, name).get_hookimpls()}
        for key, plugin in self._plugins.items():
            if key in hooks:
                yield plugin, hooks[key]

    def _add(self, kind: Kind, plugin: Plugin, cls: Any) -> None:
        """Raises:
        PluginError: the class cannot be used; says why.
        """
        interface = kind.interface
        if not (isinstance(cls, type) and issubclass(cls, interface)):
            raise PluginError(f"the hook returned {cls!r}, which is not a subclass of {interface.__name__}")
        what = f"{kind.value} class {cls.__qualname__}"
        name = vars(cls).get("name")
        if not (isinstance(name, str) and name):
            inherited = getattr(cls, "name", None)
            hint = f' (it inherits "{inherited}")' if isinstance(inherited, str) and inherited else ""
            raise PluginError(f"{what} has no `name` of its own{hint}; expected one by which a config can choose it")
        if name in self._classes[kind]:
            raise PluginError(f'{what}: the {kind.value} name "{name}" is taken by {self._owner(kind, name)}')
        for attribute in ("Options", "ModelOptions"):
            options = getattr(cls, attribute, PluginOptions)
            if not (isinstance(options, type) and issubclass(options, PluginOptions)):
                raise PluginError(
                    f"{what}: its {attribute} is {options!r}; expected a subclass of "
                    "dl_inference_core.config.PluginOptions"
                )
        if inspect.isabstract(cls):
            lacks = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise PluginError(f"{what} is abstract: it does not define {lacks}")
        self._classes[kind][name] = cls
        plugin.provides.setdefault(kind, []).append(name)

    def _owner(self, kind: Kind, name: str) -> Plugin:
        return next(plugin for plugin in self._plugins.values() if name in plugin.provides.get(kind, ()))

    def get(self, kind: Kind, name: str, where: str) -> type[Any]:
        """The class of that kind and name.

        Args:
            where: the place in the config that names it, for the error.

        Raises:
            PluginError: there is none; says what is installed, what is broken and why, and what would help.
        """
        classes = self.classes(kind)
        if name in classes:
            return classes[name]
        lines = [f'{where} names the {kind.value} "{name}", which no installed plugin provides']
        lines.append(f"installed: {', '.join(sorted(classes)) or 'none'}")
        raise PluginError("; ".join((*lines, *self.hints(name))))

    @property
    def broken(self) -> list[str]:
        """The plugins that cannot be used, or not as a whole, and why."""
        return [f"{plugin} is broken: {plugin.error}" for plugin in self._plugins.values() if plugin.error]

    def hints(self, name: str) -> list[str]:
        """Why nothing of that name may be there: what is broken and why, and what would help."""
        hints = self.broken
        if name in _DISTRIBUTIONS:
            hints.append(f"try: pip install {_DISTRIBUTIONS[name]}")
        return hints

    def options(
        self, kind: Kind, name: str, options: Mapping[str, Any], where: str, folder: Path | None = None
    ) -> PluginOptions:
        """The strict `Options` of the class of that kind and name; the class itself is not made.

        Args:
            folder: the folder that relative paths in the options are relative to; by default they stay relative.

        Raises:
            PluginError: as `get`.
            ConfigError: the options do not fit.
        """
        cls = self.get(kind, name, where)
        made: PluginOptions = validated(cls.Options, options, f"{where}: options of {kind.value} {name}")
        return made if folder is None else resolved(made, folder)

    def make(self, kind: Kind, name: str, options: Mapping[str, Any], where: str, folder: Path | None = None) -> Any:
        """An object of the class of that kind and name, made with its strict `Options`.

        Args:
            folder: as of `options`.

        Raises:
            PluginError: as `get`; or the class raises.
            ConfigError: the options do not fit.
        """
        values = self.options(kind, name, options, where, folder)
        try:
            return self.get(kind, name, where)(values)
        except (ConfigError, PluginError, KeyboardInterrupt):
            raise
        except BaseException as error:
            owner = self._owner(kind, name)
            raise PluginError(f'{where}: {owner} cannot make the {kind.value} "{name}": {_reason(error)}') from error

    def choose_transport(self, name: str) -> tuple[str, str]:
        """The transport to serve with, and why; as `_choose`."""
        return self._choose(Kind.TRANSPORTS, name)

    def choose_codecs(self, name: str) -> tuple[str, str]:
        """The set of codecs to use, and why; as `_choose`."""
        return self._choose(Kind.CODECS, name)

    def _choose(self, kind: Kind, name: str) -> tuple[str, str]:
        """What of `kind` to use, and why. "auto" is the one with the highest `priority` of those that can run here.

        Raises:
            PluginError: as `get`; or the one that is named cannot run here.
        """
        if name != "auto":
            if missing := _missing(self.get(kind, name, kind.value)):
                raise PluginError(f'the {kind.value} "{name}" cannot run here: {missing}')
            return name, "as configured"
        skipped = self.broken
        ranked: list[tuple[str, type[Choosable]]] = list(self.classes(kind).items())
        for candidate, cls in sorted(ranked, key=lambda item: item[1].priority, reverse=True):
            if missing := _missing(cls):
                skipped.append(f"{candidate} cannot run here: {missing}")
            else:
                return candidate, "; ".join(skipped) or f"the installed {kind.value} with the highest priority"
        raise PluginError(f"no {kind.value} can run here: {'; '.join(skipped)}")

    def provided(self, kind: Kind, name: str) -> Provided:
        """What is said of the class of that kind and name, one of `classes`. Where its options cannot be told, that is
        noted in its plugin's error."""
        cls = self.classes(kind)[name]
        with _noting_errors(self._owner(kind, name), f'{kind.value} "{name}" cannot be described: '):
            return Provided.of(cls)
        return Provided("", {})

    def describe(self) -> list[Plugin]:
        """Every plugin, with all it provides; imports what the kinds need (numpy, for backends and handlers)."""
        for kind in Kind:
            self.classes(kind)
        return list(self._plugins.values())


@contextmanager
def _noting_errors(plugin: Plugin, where: str = "") -> Iterator[None]:
    """Runs code of `plugin`, which may raise anything. An error is noted as the plugin's. The current folder is the
    same afterwards, so that relative paths in a config and on a command line keep their meaning."""
    folder = _current_folder()
    try:
        yield
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:
        plugin.fail(f"{where}{_reason(error)}")
    finally:
        if folder is not None:
            os.chdir(folder)


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was deleted
        return None


def _listed(returned: Any, of: str = "classes") -> Sequence[Any]:
    """What a hook returned.

    Raises:
        PluginError: it is not a list.
    """
    if not isinstance(returned, list | tuple):
        raise PluginError(f"the hook returned {returned!r}; expected a list of {of}")
    return returned


def _command_name(command: Any) -> str:
    """Raises:
    PluginError: it is not a command, or has no name.
    """
    if not isinstance(command, click.Command) or not command.name:
        raise PluginError(f"the hook returned {command!r}, which is not a click.Command with a name")
    return command.name


def _check_requirements(distribution: Distribution) -> None:
    """Raises:
    PluginError: the distribution needs another version of the core than the installed one.
    """
    installed = dl_inference_core.__version__
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # it is not about the core, or the installer would have refused it
            continue
        if canonicalize_name(requirement.name) != _CORE:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            raise PluginError(
                f"it needs {_CORE}{requirement.specifier}, but {_CORE} {installed} is installed; install versions that "
                "fit each other"
            )


def _without_hooks(where: str, module: Any) -> str:
    """Why the entry point `where`, whose `module` has no hooks, is not a plugin."""
    prefix = "dl_inference_register_"
    plain = [name for name in dir(module) if name.startswith(prefix)]
    if plain:
        return f"{where}: {', '.join(plain)} is not decorated with dl_inference_core.hookspecs.hookimpl"
    known = ", ".join((*(kind.hook for kind in Kind), _COMMANDS))
    return f"{where} has no hooks; expected one or more of {known}, decorated with dl_inference_core.hookspecs.hookimpl"


def _missing(cls: type[Choosable]) -> str:
    """As `Choosable.missing`, and it does not raise."""
    try:
        return str(cls.missing())
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:
        return f"it cannot tell what it needs: {_reason(error)}"


def _reason(error: BaseException) -> str:
    said = " ".join(text_of(error).split())
    return said if isinstance(error, PluginError) else f"{type(error).__name__}: {said}"
