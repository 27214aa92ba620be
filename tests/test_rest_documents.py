"""JSON that would take too much memory or time is refused before it is parsed; honest JSON is not."""

from __future__ import annotations

from typing import Any

import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.rest.documents import parsed

SIZE = 9_000_000


@pytest.mark.parametrize(
    "value", ["[]", "{}", '""', '"ab"', "[0]", "[[[[[[]]]]]]", '{"a":1}', '{"b64":"YQ=="}', "null", "true", "false"]
)
def test_absurdly_many_values_are_refused(value: str) -> None:
    body = f"[{','.join([value] * (SIZE // (len(value) + 1)))}]".encode()
    with pytest.raises(BadRequest, match=r"more than 100000 lists, objects and pairs of strings in its first [0-9]+"):
        parsed(body)


@pytest.mark.parametrize(
    ("value", "decoded"),
    [
        ("0", 0),
        ("255", 255),
        ("0.125", 0.125),
        (str(2**70), 2**70),
        ("[1,2,3]", [1, 2, 3]),
        ("[true,false,null,1.5]", [True, False, None, 1.5]),
        ('"a label"', "a label"),
        ('{"x":1,"y":[2.5]}', {"x": 1, "y": [2.5]}),
    ],
)
def test_honest_documents_are_read(value: str, decoded: Any) -> None:
    count = 30_000 if value[0] in '[{"' else SIZE // (len(value) + 1)
    assert parsed(f"[{','.join([value] * count)}]".encode()) == [decoded] * count


def test_a_document_of_one_long_string_is_read() -> None:
    assert parsed(b'"' + b"x" * SIZE + b'"') == "x" * SIZE
