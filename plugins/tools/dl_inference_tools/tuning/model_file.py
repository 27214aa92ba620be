"""The model that is tuned: what its `model.toml` says, what can be tried with it, and how the best gets in there."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from dl_inference_core.config import Config, validated
from dl_inference_core.cpus import cores
from dl_inference_core.errors import ConfigError, ModelError
from dl_inference_core.files import decode
from dl_inference_core.node.loading import CONFIG_FILE, ModelConfig, read_config
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_tools.tuning.search import DELAYS_US, ROWS, Settings, Space, placements

_THREADS = "intra_op_threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedModel:
    """One version of a model.

    Attributes:
        folder: the model's own.
        version: its number; 1 where the model's folder itself is the version.
        file: the `model.toml` that is written; it may be missing.
        config: what holds at present.
        backend: the backend's name.
        threads: whether that lets one say how many threads an operator may use; None is its default.
        server: the config that it is served by.
    """

    folder: Path
    version: int
    file: Path
    config: ModelConfig
    backend: str
    threads: bool
    server: Config

    @classmethod
    def find(cls, path: Path, server: Config) -> TunedModel:
        """The version in the folder `path`, or the newest that is served of the model in it.

        Raises:
            ConfigError: there is no model; its files say what no `model.toml` says.
        """
        path = path.resolve()
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; expected a model's, or that of a version of one")
        number = _number(path) if not _versions(path) else None
        folder = path if number is None else path.parent
        defaults = server.models.defaults
        try:
            if number is None:
                listed = read_config(folder, settings={}, defaults=defaults).versions
                there = _versions(folder)
                number = max((each for each in there if isinstance(listed, str) or each in listed), default=1)
                held = there.get(number, folder)
            else:
                held = path
            config = read_config(*dict.fromkeys((folder, held)), settings={}, defaults=defaults)
            own = held == path or not {"batching", "instances"}.isdisjoint(_values(held / CONFIG_FILE))
        except ModelError as error:
            raise ConfigError(str(error)) from error
        backend, threads = _backend(config, held)
        return cls(
            folder=folder,
            version=number,
            file=(held if own else folder) / CONFIG_FILE,
            config=config,
            backend=backend,
            threads=threads and all(device == "cpu" for device in config.devices or (config.device,)),
            server=server,
        )

    @property
    def name(self) -> str:
        return self.folder.name

    def before(self) -> Settings:
        """What holds at present."""
        batching = self.config.batching
        return Settings(
            max_rows=batching.max_rows,
            max_delay_us=batching.max_delay_us,
            instances=self.config.instances,
            intra_op_threads=self.server.backends.get(self.backend, {}).get(_THREADS),
        )

    def space(self, p99_ms: float) -> Space:
        """What may be tried: of the sizes those that go with `preferred_rows` and `allowed_rows`, of the delays those
        below `p99_ms`, and nothing of either where there is to be no batching."""
        batching, before = self.config.batching, self.before()
        rows = [size for size in ROWS if size >= max(batching.preferred_rows, default=1)]
        delays = [delay for delay in DELAYS_US if delay < p99_ms * 1000]
        if batching.enabled is False or batching.allowed_rows:
            rows = []
        if batching.enabled is False:
            delays = []
        each = self.config.threads * max(1, len(self.config.devices))
        return Space(
            max_rows=tuple(rows or [before.max_rows]),
            max_delay_us=tuple(delays or [before.max_delay_us]),
            placements=placements(cores(), each, () if self.threads else (before.intra_op_threads,)),
        )

    def served(self, settings: Settings) -> dict[str, Any]:
        """A server's config for the model with these settings, at any free port of this machine."""
        backends = {name: dict(options) for name, options in self.server.backends.items()}
        if settings.intra_op_threads is not None:
            backends.setdefault(self.backend, {})[_THREADS] = settings.intra_op_threads
        own = {
            "versions": [self.version],
            "instances": settings.instances,
            "batching": {**self._batching(), "max_rows": settings.max_rows, "max_delay_us": settings.max_delay_us},
        }
        return {
            "port": 0,
            "transport": self.server.transport,
            "transport_options": self.server.transport_options,
            "message_bytes": self.server.message_bytes,
            "drain_s": 0.0,
            "backends": backends,
            "models": {
                "poll_interval_ms": 0,
                "defaults": self.server.models.defaults,
                "named": {self.name: {"path": str(self.folder), "settings": own}},
            },
        }

    def write(self, settings: Settings) -> None:
        """Put what differs from `before` into `file`, and leave everything else in it as it is.

        Raises:
            ConfigError: it cannot be read or written.
        """
        file = self.file.resolve()
        try:
            text = decode(file.read_bytes()) if file.exists() else ""
            text = self._with(text, settings)
            validated(ModelConfig, tomllib.loads(text), str(self.file))
            part = file.with_name(f"{file.name}.part")
            part.write_bytes(text.encode())
            if file.exists():
                part.chmod(file.stat().st_mode)
            part.replace(file)
        except OSError as error:
            raise ConfigError(f"{self.file}: {error.strerror or error}") from error
        except (ValueError, TOMLKitError) as error:
            raise ConfigError(f"{self.file}: {error}") from error

    def keys(self, settings: Settings) -> dict[str, int]:
        """What `write` changes, by its place in `model.toml`."""
        before = self.before()
        return {
            key: getattr(settings, name)
            for key, name in (
                ("instances", "instances"),
                ("batching.max_rows", "max_rows"),
                ("batching.max_delay_us", "max_delay_us"),
            )
            if getattr(settings, name) != getattr(before, name)
        }

    def server_line(self, settings: Settings) -> str:
        """What to put into the server's config; "" is nothing."""
        if settings.intra_op_threads == self.before().intra_op_threads:
            return ""
        return f"[backends.{self.backend}] {_THREADS} = {settings.intra_op_threads}"

    def _with(self, text: str, settings: Settings) -> str:
        document = tomlkit.parse(text)
        for key, value in self.keys(settings).items():
            table, _, name = key.rpartition(".")
            if table and table not in document:
                # It takes the place of the other file's whole table, and of "auto", which holds where there is none.
                document[table] = self._batching()
            (document[table] if table else document)[name] = value
        return tomlkit.dumps(document)

    def _batching(self) -> dict[str, Any]:
        """The table as it stands; the one that says what holds where there is none."""
        if "batching" not in self.config.model_fields_set:
            return {"enabled": "auto"}
        return self.config.batching.model_dump(mode="json", exclude_unset=True)


def _number(folder: Path) -> int | None:
    """Of a version."""
    return int(folder.name) if folder.name.isascii() and folder.name.isdigit() else None


def _versions(folder: Path) -> dict[int, Path]:
    """Of folders with one number the one whose name is shortest, as it is served."""
    found = [path for path in folder.iterdir() if _number(path) is not None and path.is_dir()]
    return {int(path.name): path for path in sorted(found, key=lambda path: -len(path.name))}


def _values(file: Path) -> Mapping[str, Any]:
    return tomllib.loads(decode(file.read_bytes())) if file.is_file() else {}


def _backend(config: ModelConfig, folder: Path) -> tuple[str, bool]:
    """The backend's name, and whether it has the option. Where that is not clear, the server says why."""
    classes = Plugins().classes(Kind.BACKENDS)
    name = config.backend or next((name for name, cls in classes.items() if cls.recognises(folder)), "")
    return name, name in classes and _THREADS in classes[name].Options.model_fields
