"""Entry points → usable classes by name, and what is broken and why."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from dl_inference_core import hookspecs
from dl_inference_core.config import PluginOptions, validated
from dl_inference_core.errors import ConfigError, PluginError


class Kind(enum.Enum):
    """What a plugin can bring. The value is what a person calls one of it."""

    BACKENDS = "backend"
    HANDLERS = "handler"
    BALANCERS = "balancer"
    TRANSPORTS = "transport"

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
}

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
    "envoy": "dl-inference-envoy-transport",
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
        error: why it, or a part of it, cannot be used; "" if all is well.
    """

    name: str
    distribution: str
    version: str
    provides: dict[Kind, list[str]] = field(default_factory=dict)
    error: str = ""

    def __str__(self) -> str:
        return f'plugin "{self.name}" of {self.distribution} {self.version}'


class Plugins:
    """Every installed plugin. Asks for the classes of a kind when they are first wanted; not on the request path."""

    def __init__(self, found: Sequence[EntryPoint] | None = None) -> None:
        """Args:
        found: the entry points; by default the installed ones of the group "dl_inference_core".
        """
        self._manager = pluggy.PluginManager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._classes: dict[Kind, dict[str, type[Any]]] = {}
        self._plugins: dict[str, Plugin] = {}
        for entry in found if found is not None else sorted(entry_points(group=hookspecs.GROUP)):
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
        try:
            module = entry.load()
            self._manager.register(module, name=entry.name)
            try:
                self._manager.check_pending()
            except pluggy.PluginValidationError:
                self._manager.unregister(name=entry.name)
                raise
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises
            plugin.error = _reason(error)

    def classes(self, kind: Kind) -> Mapping[str, type[Any]]:
        """The classes of `kind` by name, those of broken plugins left out."""
        if kind not in self._classes:
            self._classes[kind] = {}
            for implementation in getattr(self._manager.hook, kind.hook).get_hookimpls():
                plugin = self._plugins[implementation.plugin_name]
                try:
                    self._add(kind, plugin, implementation.function())
                except (Exception, SystemExit) as error:
                    reason = f"{kind.hook}: {_reason(error)}"
                    plugin.error = f"{plugin.error}; {reason}" if plugin.error else reason
        return self._classes[kind]

    def _add(self, kind: Kind, plugin: Plugin, classes: Sequence[type[Any]]) -> None:
        if not isinstance(classes, Sequence):
            raise PluginError(f"it gave {classes!r}, which is no list of classes")
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, kind.interface)):
                raise PluginError(f"it gave {cls!r}, which is not a subclass of {kind.interface.__name__}")
            name = getattr(cls, "name", None)
            if not (isinstance(name, str) and name):
                raise PluginError(f"{kind.value} class {cls.__qualname__} has no `name`")
            if name in self._classes[kind]:
                raise PluginError(f'the {kind.value} name "{name}" is taken by {self._owner(kind, name)}')
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
        lines += [f"broken: {plugin} ({plugin.error})" for plugin in self._plugins.values() if plugin.error]
        if name in _DISTRIBUTIONS:
            lines.append(f"try: pip install {_DISTRIBUTIONS[name]}")
        raise PluginError("; ".join(lines))

    def make(self, kind: Kind, name: str, options: Mapping[str, Any], where: str) -> Any:
        """An object of the class of that kind and name, made with its strict `Options`.

        Raises:
            PluginError: as `get`; or the class raises.
            ConfigError: the options do not fit.
        """
        cls = self.get(kind, name, where)
        values = validated(cls.Options, options, f"{where}: options of {kind.value} {name}")
        try:
            return cls(values)
        except (ConfigError, PluginError):
            raise
        except Exception as error:
            owner = self._owner(kind, name)
            raise PluginError(f'{where}: {owner} cannot make the {kind.value} "{name}": {_reason(error)}') from error

    def choose_transport(self, name: str) -> tuple[str, str]:
        """The transport to serve with, and why. "auto" is "envoy" where that is installed and can run, else "grpcio".

        Raises:
            PluginError: as `get`; or the one that is named cannot run here.
        """
        if name != "auto":
            if missing := self.get(Kind.TRANSPORTS, name, "transport").missing():
                raise PluginError(f'the transport "{name}" cannot run here: {missing}')
            return name, "as configured"
        preferred = self.classes(Kind.TRANSPORTS).get("envoy")
        if preferred is None:
            broken = [f"{plugin} is broken: {plugin.error}" for plugin in self._plugins.values() if plugin.error]
            return "grpcio", broken[0] if broken else "envoy is not installed: pip install dl-inference-envoy-transport"
        if missing := preferred.missing():
            return "grpcio", f"envoy cannot run here: {missing}"
        return "envoy", "it is installed, and can run here"

    def describe(self) -> list[Plugin]:
        """Every plugin, with all it provides; imports what the kinds need (numpy, for backends and handlers)."""
        for kind in Kind:
            self.classes(kind)
        return list(self._plugins.values())


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, PluginError) else f"{type(error).__name__}: {said}"
