"""What the documents name must be there, and what they show must run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/*/*.md"),
        *ROOT.glob("examples/*/*.md"),
    )
)
PATH = re.compile(r"`((?:dl_inference_core|plugins|protos|tests|examples|bench|docs)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_link_in_a_document_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not missing


def test_the_architecture_names_every_module_of_the_core() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dl_inference_core").rglob("*.py")
        if path.name != "__init__.py" and "testing" not in path.parts
    }
    assert modules <= set(PATH.findall(text))


def test_every_make_target_that_a_document_names_exists() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^make (\w+)", listed, re.MULTILINE))
    named = {target for path in DOCUMENTS for target in re.findall(r"`?make (\w+)`?", path.read_text(encoding="utf-8"))}
    assert {"setup", "demo", "test", "check", "bench", "protos"} <= targets
    assert named & {"setup", "demo", "test", "check", "bench", "protos", "faults"} <= targets


@pytest.mark.parametrize("command", ["serve", "plugins", "check", "predict", "bench", "tune"])
def test_the_readme_shows_only_options_that_exist(command: str) -> None:
    from click.testing import CliRunner

    from dl_inference_core.cli import main

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {
        option
        for line in re.findall(rf"dl-inference-core {command}([^\n#]*)", text)
        for option in re.findall(r"--[\w-]+", line)
    }
    assert shown <= set(re.findall(r"--[\w-]+", CliRunner().invoke(main, [command, "--help"]).output))
