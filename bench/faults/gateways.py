"""What stands the faults: our gateway in each of its ways, and its baselines, each by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from bench import peers
from bench.faults.client import NAME, TASK
from bench.processes import Server, announcing, free_address
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.transport import Transport

TIMEOUT_MS = 500
"""Of one attempt."""
DEFAULT_STRATEGY = "dynamic_weighted_round_robin"
NODEFILE = "nodefile.txt"

# What Envoy's documentation offers against failing nodes, as close to our gateway's own settings as it comes.
_ENVOY_ROUTE = {
    "timeout": "2s",
    "retry_policy": {
        "retry_on": "connect-failure,refused-stream,reset,unavailable,internal,deadline-exceeded,resource-exhausted",
        "num_retries": 1,
        "per_try_timeout": f"{TIMEOUT_MS / 1000}s",
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
        "host_selection_retry_max_attempts": 5,
    },
}
_ENVOY_CLUSTER = {
    "connect_timeout": "1s",
    "outlier_detection": {
        "consecutive_5xx": 5,
        "interval": "1s",
        "base_ejection_time": "1s",
        "max_ejection_percent": 50,
    },
    "health_checks": [
        {
            "timeout": "0.5s",
            "interval": "1s",
            "no_traffic_interval": "1s",
            "unhealthy_threshold": 2,
            "healthy_threshold": 1,
            "grpc_health_check": {},
        }
    ],
    "circuit_breakers": {
        "thresholds": [{"retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 20}}]
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A gateway, and how it is set up.

    Attributes:
        name: "ours", or what a baseline is called.
        transport, strategy: of ours; "" else.
        route, gateway, server: keys of our config beside the usual: of the route, of `[gateway]`, and of the top.
        nodefile: whether its routes stand in a node file, `NODEFILE`.
        note: what is special about it.
    """

    name: str = "ours"
    transport: str = ""
    strategy: str = ""
    workers: int = 1
    route: Mapping[str, Any] = field(default_factory=dict)
    gateway: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    nodefile: bool = False
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.name == "ours"

    @property
    def title(self) -> str:
        """ "ours-grpcio peak_ewma"; or a baseline's name."""
        several = f" x{self.workers}" if self.workers > 1 else ""
        note = f" {self.note}" if self.note else ""
        return f"ours-{self.transport} {self.strategy}{several}{note}" if self.ours else self.name

    def having(self, **changes: Any) -> System:
        """The same with other attributes."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One that runs.

    Attributes:
        http_address: where ours answers metrics; "" else.
        log: what ours complains of.
    """

    server: Server
    http_address: str = ""
    log: Path | None = None


Start = Callable[[Sequence[str]], AbstractContextManager[Server]]

BASELINES: Mapping[str, Start] = {
    "envoy": peers.envoy,
    "envoy-tuned": lambda nodes: peers.envoy(nodes, route=_ENVOY_ROUTE, cluster=_ENVOY_CLUSTER),
    "original": lambda nodes: _original(0, nodes),
    "original-W100": lambda nodes: _original(100, nodes),
}
"""Envoy without and with its retries, outlier detection and health checks; the original as published, and as meant."""


@contextmanager
def running(system: System, nodes: Sequence[str], folder: Path, log: IO[str]) -> Iterator[Gateway]:
    """`system` in front of `nodes`, with its files in `folder`, until the block ends.

    Raises:
        RuntimeError: it does not start.
    """
    if not system.ours:
        with BASELINES[system.name](nodes) as server:
            yield Gateway(server=server)
        return
    http = "" if _transports()[system.transport].http_on_same_port else free_address()
    config = folder / "server.toml"
    if system.nodefile:
        (folder / NODEFILE).write_text(lines_of(nodes), encoding="utf-8")
        system = system.having(gateway={**system.gateway, "nodefile": NODEFILE})
    config.write_text(config_of(system, () if system.nodefile else nodes, http), encoding="utf-8")
    command = (sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(config))
    with ExitStack() as stack:
        try:
            server = stack.enter_context(announcing(*command, log=log))
        except RuntimeError as error:
            said = Path(log.name).read_text(encoding="utf-8").strip().splitlines()
            raise RuntimeError(f"{error}: {' / '.join(said[-3:]) or 'it said nothing'}") from None
        yield Gateway(server=server, http_address=http or server.address, log=Path(log.name))


def config_of(system: System, nodes: Sequence[str], http_address: str = "") -> str:
    """The TOML that has our gateway forward to `nodes`."""
    top = {"port": 0, "transport": system.transport, "workers": system.workers, **system.server}
    if http_address:
        top["http_port"] = int(http_address.rpartition(":")[2])
    lines = _toml(top)
    if system.gateway:
        plain = {key: value for key, value in system.gateway.items() if not isinstance(value, Mapping)}
        lines += ["[gateway]", *_toml(plain)]
        for key, value in system.gateway.items():
            if isinstance(value, Mapping):
                lines += [f"[gateway.{key}]", *_toml(value)]
    if nodes:
        route = {
            "name": NAME,
            "task_id": TASK,
            "timeout_ms": TIMEOUT_MS,
            "nodes": list(nodes),
            "balancer": system.strategy,
            **system.route,
        }
        lines += ["[[routes]]", *_toml(route)]
    return "\n".join(lines) + "\n"


def lines_of(nodes: Sequence[str], names: Sequence[str | int] = (NAME, TASK)) -> str:
    """The lines of a node file in which each of these tasks is forwarded to `nodes`."""
    return "".join(f"{name}={TIMEOUT_MS},{','.join(nodes)}\n" for name in names)


def _toml(values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers, booleans and lists are TOML's too.
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def _original(weight: int, nodes: Sequence[str]) -> AbstractContextManager[Server]:
    return announcing(sys.executable, "-m", "bench.faults.original", str(weight), str(TIMEOUT_MS), *nodes)


def transports() -> tuple[str, ...]:
    """Those that are installed and can run, the one with the highest priority first."""
    usable = {name: kind for name, kind in _transports().items() if not kind.missing()}
    return tuple(sorted(usable, key=lambda name: (-usable[name].priority, name)))


def _transports() -> Mapping[str, type[Transport]]:
    return Plugins().classes(Kind.TRANSPORTS)


def strategies() -> tuple[str, ...]:
    """Every strategy that is installed, the default one first."""
    names = sorted(Plugins().classes(Kind.BALANCERS))
    return tuple(sorted(names, key=lambda name: name != DEFAULT_STRATEGY))
