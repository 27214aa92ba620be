"""Imports point one way, and a gateway stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dl_inference_core"

# Whoever stands on a line may import what stands on the lines above, and its own package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("", "errors", "cpus"),
    ("files", "http_exchange"),
    ("tensors", "config"),
    ("choosable", "nodefile", "hookspecs", "metrics", "certificates", "sockets", "children"),
    ("wire",),
    ("transport",),
    ("failures", "grpcio_connections", "plugins", "routing", "http_server"),
    ("coroutines", "grpcio_exchanges", "api"),
    ("grpcio_transport", "asgi"),
    ("gateway", "node", "introspection", "joining"),
    ("dispatcher", "client", "builtins", "admin"),
    ("rest",),
    ("app", "supervisor", "cli_options"),
    ("checking", "serving"),
    ("cli", "testing"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# A class is handed out by name, when it is asked for: inside a function, or for types alone.
HEAVY = ("numpy", "torch", "tensorflow", "ml_dtypes", "dl_inference_core.node", "dl_inference_core.tensors")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    """ "dl_inference_core.gateway.pool" → "gateway"."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """The modules of ours that `path` imports when it is imported itself."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name.partition(".")[0] == "dl_inference_core"}


def test_every_module_has_its_layer() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert names == set(LEVEL) - {""}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")
    for name in imports(path):
        there = layer(name) if layer(name) in LEVEL else ""  # `from dl_inference_core import config`
        assert there == here or LEVEL[there] < LEVEL[here], f"{path.name} imports {name}"


def test_gateway_and_node_never_import_each_other() -> None:
    for one, other in (("gateway", "node"), ("node", "gateway")):
        for path in (PACKAGE / one).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):  # inside functions as well
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.startswith(f"dl_inference_core.{other}") for name in names), path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = f"print([name for name in {HEAVY!r} if name in sys.modules])"


def test_importing_the_gateway_takes_neither_numpy_nor_a_framework() -> None:
    names = ["app", "cli", "grpcio_transport", "dispatcher", "introspection", "supervisor", "hookspecs", "builtins"]
    names += (f"gateway.{path.stem}" for path in (PACKAGE / "gateway").glob("[a-z]*.py"))
    lines = "\n".join(f"import dl_inference_core.{name}" for name in names)
    assert run(f"import sys\n{lines}\n{LOADED}") == "[]"


FORWARD = """
import asyncio, sys
from pathlib import Path
from dl_inference_core.app import App
from dl_inference_core.config import Config, RouteConfig
from dl_inference_core.plugins import Plugins
from dl_inference_core.transport import Limits, Method
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import METHODS, PROTOCOLS
from dl_inference_tfserving.api import TfServingApi

ANSWER = messages.PredictResponse(model_spec={"name": "m"}).SerializeToString()
ASK = messages.PredictRequest(model_spec={"name": "m"}).SerializeToString()

class Node:
    methods = {PROTOCOLS["tfserving"].node_method: Method(), **{path: Method() for path in TfServingApi.protocols}}
    private_trailers = frozenset()

    def begin_all(self, exchanges):
        for exchange in exchanges:
            exchange.reply(ANSWER)

    def ended_all(self, ended):
        pass

async def main():
    plugins = Plugins()
    app = None
    from dl_inference_core.plugins import Kind
    transport = plugins.make(Kind.TRANSPORTS, "grpcio", {}, "test")
    node = await transport.serve(Node(), ("127.0.0.1:0",), Limits())
    nodefile = Path(sys.argv[1]) / "nodefile.txt"
    nodefile.write_text(f"m=1000,127.0.0.1:{node.ports[0]}\\n")
    config = Config(gateway={"nodefile": nodefile})
    app = App(config, plugins)
    (port,) = await app.serve("127.0.0.1:0")
    connection = transport.connect(f"127.0.0.1:{port}", Limits())
    for method in METHODS:
        if METHODS[method] is PROTOCOLS["tfserving"]:
            assert (await connection.call(method, ASK)).message == ANSWER
    for method, protocol in TfServingApi.protocols.items():
        ask = messages.MultiInferenceRequest(tasks=[{"model_spec": {"name": "m"}}]).SerializeToString()
        assert (await connection.call(method, ask if protocol.several else ASK)).message == ANSWER
    await connection.close()
    await app.close()
    await node.drain(0)

asyncio.run(main())
"""


def test_a_gateway_that_has_forwarded_has_imported_neither_numpy_nor_a_framework(tmp_path: Path) -> None:
    done = run(f"import sys\nsys.argv = ['', {str(tmp_path)!r}]\n{FORWARD}\n{LOADED}")
    assert done == "[]"
