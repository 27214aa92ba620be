"""pytest inside Envoy: `python -m dl_inference_envoy_transport.testing PYTEST_ARGUMENTS`.

Tests run on a thread of their own; those that are coroutines go to Envoy's event loop, through the pytest plugin that
is registered as RUNNER.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

from dl_inference_envoy_transport.host import Host
from dl_inference_envoy_transport.transport import EnvoyTransport

RUNNER = "event-loop-runner"
_ENTRY = f"{__package__}.testing:run_pytest"


class Runner:
    """Runs coroutines on Envoy's event loop, while a request of Envoy's is open. From any other thread."""

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        host = Host.of_this_process()
        assert host is not None
        host.run(coroutine)


async def run_pytest(arguments: list[str]) -> int:
    """Run pytest with `arguments` in this process, which Envoy hosts; returns its exit status."""
    import pytest

    class Registered:
        """Has the runner known before the first conftest asks."""

        @pytest.hookimpl(tryfirst=True)
        def pytest_load_initial_conftests(self, early_config: pytest.Config) -> None:
            early_config.pluginmanager.register(Runner(), RUNNER)

    return int(await asyncio.to_thread(pytest.main, arguments, [Registered()]))


def main() -> None:
    transport = EnvoyTransport(EnvoyTransport.Options())
    with transport.program(sys.argv[1:], entry=_ENTRY) as program:
        # Python 3.11 takes harm if two threads parse at once: pytest does for a report, and a traceback for its carets.
        environment = {**os.environ, **program.environment, "PYTHONNODEBUGRANGES": "1"}
        done = subprocess.run(program.command, env=environment, stdin=subprocess.DEVNULL, check=False)  # noqa: S603 - ours
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
