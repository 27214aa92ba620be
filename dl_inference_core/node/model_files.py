"""What lies in a model's folder: names that never belong to a model, and content that is not a model's."""

from __future__ import annotations

HEAD_BYTES = 512
"""Enough to tell text from a binary format; a Git LFS pointer is shorter."""
_FORMATS = (
    (b"\x1f\x8b", "gzip data", "unpack it first"),
    (b"BZh", "bzip2 data", "unpack it first"),
    (b"\xfd7zXZ\x00", "xz data", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", "export the model"),
    (b"\x93NUMPY", "a NumPy array", "save the model itself"),
)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is never part of a model: a hidden one, as editors and operating systems
    leave (`.DS_Store`, `._model.pt`), or Python's cache."""
    return name.startswith(".") or name == "__pycache__"


def describe_foreign(content: bytes) -> str | None:
    """Say what `content` is if it is something that often lies in a model's place by mistake.

    Args:
        content: a file's bytes, from its beginning; the first `HEAD_BYTES` are enough.

    Returns:
        Words that follow "it is", with what to do; None if it may be a model.
    """
    head = content[:HEAD_BYTES]
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, which stands for the model: run `git lfs pull`, and copy the file again"
    for magic, format_, advice in _FORMATS:
        if head.startswith(magic):
            return f"{format_}: {advice}"
    text = _text(head)
    if text is None:
        return None
    first_line = text.lstrip().partition("\n")[0].strip()[:60]
    if first_line.lower().startswith(("<!doctype html", "<html")):
        return "a web page (HTML), such as a failed download leaves: download the model again"
    return f'text that begins with "{first_line}": copy or download the model again'


def _text(head: bytes) -> str | None:
    """`head` as text, if that is what it is: UTF-8 without control characters; its last character may be cut."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if len(head) < HEAD_BYTES or error.start < len(head) - 3:
            return None
        text = head[: error.start].decode()
    return text if all(character.isprintable() or character in "\t\r\n" for character in text) else None
