"""Our own servers: `dl-inference-core serve` with a config, on any transport."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.certificate import Certificate
from bench.contract import MESSAGE_BYTES
from bench.processes import Server, announcing

ConfigOf = Callable[[Sequence[str]], str]
"""What a config says beside `serving`'s own lines, of the addresses of nodes or the folders of models."""

NO_PROBES = "[gateway.health]\ninterval_ms = 3600000\n"
"""For gateways that wait for their turn: each would probe its idle nodes. Nodes that answer requests are not probed."""
BARE = 'balancer = "round_robin"\nattempts = 1\nretry_budget = 0\nretry_reserve = 0\n'
BARE_HEALTH = "[gateway.health]\ninterval_ms = 0\nfailures = 100000\n"
CARE = 'balancer = "round_robin"\nnode_in_flight = 1000\nqueue = 1000\n'


@contextmanager
def serving(transport: str, config: str) -> Iterator[Server]:
    """`dl-inference-core serve` on `transport`, with what else its config says, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "server.toml"
        file.write_text(
            f'port = 0\ntransport = "{transport}"\nmessage_bytes = {MESSAGE_BYTES}\n{config}', encoding="utf-8"
        )
        with announcing(sys.executable, "-m", "dl_inference_core.cli", "serve", "--config", str(file)) as server:
            yield server


def gateway(nodes: Sequence[str], more: str = "") -> str:
    """One route to `nodes`, and what else it says."""
    return _route("echo", nodes) + more


def tasks(count: int) -> ConfigOf:
    """A gateway with so many routes; the one that is asked stands in their middle."""

    def config(nodes: Sequence[str]) -> str:
        names = [f"task-{number}" for number in range(1, count)]
        names.insert(count // 2, "echo")
        return "".join(_route(name, nodes) for name in names)

    return config


def among(strategy: str, count: int) -> ConfigOf:
    """A gateway that chooses among the first `count` nodes by `strategy`."""
    return lambda nodes: gateway(nodes[:count], f'balancer = "{strategy}"\n{NO_PROBES}')


def tls(certificate: Certificate) -> str:
    return f"[tls]\ncertificate = {str(certificate.chain)!r}\nkey = {str(certificate.key)!r}\n"


def _route(name: str, nodes: Sequence[str]) -> str:
    return f'[[routes]]\nname = "{name}"\ntimeout_ms = 60000\nnodes = {list(nodes)}\n'
