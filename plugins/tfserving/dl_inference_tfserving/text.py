"""protobuf's text form, in which TensorFlow Serving's files are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from dl_inference_core.errors import ConfigError
from dl_inference_core.files import decode
from dl_inference_core.wire import messages

_PLACE = re.compile(r"^\d+:\d+ : ")
_UNKNOWN = re.compile(r'Message type "(?P<type>[\w.]+)" has no field named')


def read(file: Path, message: Any) -> Any:
    """What `file` says, as a message of the class `message`.

    Raises:
        ConfigError: it cannot be read, or as `parse`.
    """
    try:
        return parse(file.read_bytes(), message, file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error


def parse(content: bytes, message: Any, file: Path) -> Any:
    """`content`, which came from `file`, as a message of the class `message`.

    Raises:
        ConfigError: it is not; one line in the words that protobuf logs, which are known from TensorFlow Serving's log:
            the file, the message's type, line and column, and what was expected.
    """
    where = f"{file}: Error parsing text-format {message.DESCRIPTOR.full_name}"
    try:
        return text_format.Parse(decode(content), message(), descriptor_pool=messages.pool)
    except ValueError as error:  # of `decode`
        raise ConfigError(f"{where}: {error}") from error
    except text_format.ParseError as error:
        said = _PLACE.sub("", " ".join(str(error).split()))
        line, column = error.GetLine(), error.GetColumn()
        place = f"{line}:{column}: " if line is not None else ""
        raise ConfigError(f"{where}: {place}{said}{_known(said)}") from error


def _known(said: str) -> str:
    """The fields that there are, where one was named that is not."""
    found = _UNKNOWN.search(said)
    if found is None:
        return ""
    fields = messages.pool.FindMessageTypeByName(found["type"]).fields
    return f" It has: {', '.join(field.name for field in fields)}"
