"""R1: of the files that a process may have open, some are never clients' connections."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
from dl_inference_core.transport import room_for
soft, hard, asked = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(json.dumps([room_for(asked), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "room", "raised"),
    [
        (128, 128, 10_000, 64, 128),
        (1024, 1024, 10_000, 768, 1024),
        (1024, 1024, 0, 768, 1024),
        (1024, 1024, 100, 100, 1024),
        (256, 4096, 2000, 2000, 2667),
        (256, 1024, 2000, 768, 1024),
        (256, 4096, 0, 192, 256),
        (64, 64, 10_000, 1, 64),
    ],
)
def test_as_many_connections_as_there_are_files_for(soft: int, hard: int, asked: int, room: int, raised: int) -> None:
    command = [sys.executable, "-c", CODE, str(soft), str(hard), str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [room, raised]
