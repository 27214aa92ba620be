"""The files that `bench` and `bench.model_servers` both write: each replaces its own part and leaves the other's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCH_JSON = Path(__file__).parent / "out" / "bench.json"
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
MODEL_SERVERS = "model_servers"
"""In bench.json, what `bench.model_servers` has beside the rows of its models."""
NODE = "node"
"""In bench.json, those rows."""
_MARK = "<!-- What follows is written by `make bench-peers`, what stands above by `make bench`. -->\n"


def put_figures(values: Mapping[str, Any], *, of_model_servers: bool, file: Path = BENCH_JSON) -> None:
    """Write `values` in place of what the same benchmark wrote before."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    others = {key: value for key, value in before.items() if (key in (NODE, MODEL_SERVERS)) is not of_model_servers}
    after = {**others, **values}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")


def put_page(part: str, *, of_model_servers: bool, file: Path = PAGE) -> None:
    """Write `part` in place of what the same benchmark wrote before."""
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    above, mark, below = before.partition(_MARK)
    if of_model_servers:
        above, mark, below = above.rstrip("\n") + "\n\n", _MARK, f"\n{part}"
    else:
        above = f"{part}\n" if mark else part
    file.write_text(above + mark + below, encoding="utf-8")
