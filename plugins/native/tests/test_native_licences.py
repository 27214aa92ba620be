"""The licences of the crates in the wheel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FREE = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
}
"""Licences that ask for no more than their text beside a copy."""


def is_free(licence: str) -> bool:
    """Whether an SPDX expression of AND, OR, "/" (an old OR) and parentheses leads to FREE alone."""
    alternatives = re.split(r" OR |/", licence) if "(" not in licence else [licence]
    return any(all(part.strip(" ()") in FREE for part in _parts(each)) for each in alternatives)


def _parts(licence: str) -> list[str]:
    """What holds at the same time; of alternatives in parentheses, the first."""
    return [part.strip(" ()").split(" OR ")[0] for part in licence.split(" AND ")]


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("MIT", True),
        ("GPL-3.0 OR MIT", True),
        ("MIT/Apache-2.0", True),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("MIT AND GPL-3.0", False),
        ("AGPL-3.0", False),
        ("", False),
    ],
)
def test_expressions_are_read(licence: str, free: bool) -> None:
    assert is_free(licence) is free


@pytest.mark.skipif(shutil.which("cargo") is None, reason="needs cargo")
def test_every_crate_has_a_free_licence() -> None:
    manifest = Path(__file__).parent.parent / "Cargo.toml"
    command = ["cargo", "metadata", "--offline", "--locked", "--format-version", "1", "--manifest-path", str(manifest)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    packages = json.loads(told)["packages"]
    assert len(packages) > 50
    assert {each["name"]: each["license"] for each in packages if not is_free(each["license"] or "")} == {}
