from __future__ import annotations

import pytest

from dl_inference_core.node.model_files import HEAD_BYTES, describe_foreign, is_ignored


@pytest.mark.parametrize("name", [".DS_Store", "._model.pt", ".git", ".ipynb_checkpoints", "__pycache__"])
def test_hidden_names_and_caches_are_ignored(name):
    assert is_ignored(name)


@pytest.mark.parametrize("name", ["1", "model.pt", "_model.pt", "a.b", "__init__.py"])
def test_other_names_are_not_ignored(name):
    assert not is_ignored(name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\r\n  <!doctype HTML>\n<html>", "a web page (HTML)"),
        (b"<HTML>", "a web page (HTML)"),
        (b"\n404: Not Found\nmore", 'text that begins with "404: Not Found":'),
        ("é".encode() * HEAD_BYTES, 'text that begins with "éé'),
        (b"a" + "€".encode() * HEAD_BYTES, 'text that begins with "a€'),
        (b"\x1f\x8b\x08\x00", "gzip data"),
        (b"\x89HDF\r\n\x1a\n\x00", "an HDF5 file"),
        (b"\x93NUMPY\x01", "a NumPy array"),
    ],
)
def test_content_that_is_not_a_models_is_described(content, words):
    described = describe_foreign(content)
    assert described is not None
    assert described.startswith(words)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04rest",
        b"\x80\x02}q\x00.",
        b"\x08\x01\x12\x04text",
        "é".encode()[:1],
        b"text" + "é".encode()[:1],
        b"text\x00",
        b"x" * 400 + b"\xff" + b"x" * 400,
    ],
)
def test_content_that_may_be_a_models_is_not_described(content):
    assert describe_foreign(content) is None
