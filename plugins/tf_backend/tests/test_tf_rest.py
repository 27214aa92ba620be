"""SavedModels over TensorFlow Serving's REST API, by the examples of its documentation."""

from __future__ import annotations

import base64
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl_inference_core.config import Config

Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def models(make_saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_saved.half_plus_two(root / "half_plus_three" / "123", plus=3.0)
    make_saved.half_plus_two(root / "half_plus_three" / "124", plus=30.0)
    (root / "half_plus_three" / "model.toml").write_text("version_labels = { stable = 123 }\n")
    for kind in ("text", "several", "counter", "picky", "broken", "defaults"):
        (root / kind).mkdir()
        getattr(make_saved, kind)(root / kind / "1")
    make_saved.dtypes(root / "dtypes" / "1", DTYPES)
    shutil.copytree(root / "text", root / "handled")
    (root / "handled" / "handler.py").write_text(HANDLER)
    return root


DTYPES = ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "bool"]

HANDLER = """
from dl_inference_core.node.handling import Handler


class Reverses(Handler):
    \"\"\"Turns each word round before the model sees it.\"\"\"

    def preprocess(self, request):
        words = super().preprocess(request)["words"]
        words[:] = [word[::-1] for word in words]
        return {"words": words}
"""


@pytest.fixture(scope="module")
def ask(models: Path, serve_node: Any) -> Iterator[Ask]:
    """(path, document): the status and the JSON of a node's answer."""
    with serve_node(Config(port=0, http_port=0, transport="grpcio", models={"directory": models})) as node:
        yield node.ask


def test_predict_as_documented(ask: Ask) -> None:
    where = "half_plus_three/versions/123:predict"
    assert ask(where, {"instances": [[1.0], [2.0], [5.0]]}) == (200, {"predictions": [[3.5], [4.0], [5.5]]})
    assert ask(where, {"inputs": [[1.0], [2.0], [5.0]]}) == (200, {"outputs": [[3.5], [4.0], [5.5]]})
    assert ask(where, {"instances": [{"x": [1.0]}]}) == (200, {"predictions": [[3.5]]})
    assert ask(where, {"signature_name": "serving_default", "inputs": {"x": [[1]]}}) == (200, {"outputs": [[3.5]]})


def test_versions_and_labels(ask: Ask) -> None:
    document = {"instances": [[1.0]]}
    assert ask("half_plus_three:predict", document) == (200, {"predictions": [[30.5]]})
    assert ask("half_plus_three/labels/stable:predict", document) == (200, {"predictions": [[3.5]]})
    status, answer = ask("half_plus_three/versions/9:predict", document)
    assert (status, "Specific(half_plus_three, 9)" in answer["error"]) == (404, True)
    status, answer = ask("half_plus_three/labels/canary:predict", document)
    assert (status, "Unrecognized servable version label: canary" in answer["error"]) == (400, True)


def test_regress_as_documented(ask: Ask) -> None:
    document = {"signature_name": "regress", "examples": [{"x": 1.0}, {"x": 2.0}]}
    assert ask("half_plus_three/versions/123:regress", document) == (200, {"results": [3.5, 4.0]})
    document = {"signature_name": "regress", "context": {"x": 1.0}, "examples": [{}, {"x": 2.0}]}
    assert ask("half_plus_three/versions/123:regress", document) == (200, {"results": [3.5, 4.0]})


def test_classify(ask: Ask) -> None:
    where = "half_plus_three/versions/123:classify"
    answers = {
        "classify": [[["low", 6.5], ["high", 3.5]]],
        "scores_only": [[["", 6.5], ["", 3.5]]],
        "classes_only": [[["low", 0.0], ["high", 0.0]]],
    }
    for name, results in answers.items():
        assert ask(where, {"signature_name": name, "examples": [{"x": 1.0}]}) == (200, {"results": results})


def test_a_signature_is_for_one_method(ask: Ask) -> None:
    status, answer = ask("half_plus_three:regress", {"signature_name": "classify", "examples": [{"x": 1.0}]})
    assert (status, "Expected one output Tensor, found 2" in answer["error"]) == (400, True)
    status, answer = ask("half_plus_three:regress", {"examples": [{"x": 1.0}]})
    assert (status, "No regression inputs found in SignatureDef" in answer["error"]) == (400, True)
    status, answer = ask("half_plus_three:predict", {"signature_name": "nope", "instances": [[1.0]]})
    assert (status, 'Serving signature name: "nope" not found' in answer["error"]) == (400, True)


def test_an_example_may_be_given_to_predict_in_base64(ask: Ask) -> None:
    import tensorflow as tf

    feature = tf.train.Feature(float_list=tf.train.FloatList(value=[1.0]))
    example = tf.train.Example(features=tf.train.Features(feature={"x": feature})).SerializeToString()
    document = {"signature_name": "regress", "instances": [{"b64": base64.b64encode(example).decode()}]}
    assert ask("half_plus_three/versions/123:predict", document) == (200, {"predictions": [[3.5]]})


def test_strings(ask: Ask) -> None:
    rows = [
        {"capitals": "DOG", "lengths": 3, "number": 1},
        {"capitals": "LöWE", "lengths": 5, "number": 2},
        {"capitals": "", "lengths": 0, "number": 2},
    ]
    assert ask("text:predict", {"instances": ["dog", "Löwe", ""]}) == (200, {"predictions": rows})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert ask("text:predict", {"inputs": {"words": ["dog", "Löwe", ""]}}) == (200, {"outputs": columns})
    status, answer = ask("text:predict", {"inputs": []})
    assert (status, answer) == (200, {"outputs": {"capitals": [], "lengths": [], "number": []}})
    zeros = {"b64": base64.b64encode(b"cat\0\0").decode()}
    assert ask("text:predict", {"instances": [zeros]})[1]["predictions"][0]["lengths"] == 5
    assert ask("handled:predict", {"instances": ["god"]})[1]["predictions"][0]["capitals"] == "DOG"


def test_several_inputs_and_outputs(ask: Ask) -> None:
    rows = {"signature_name": "add", "instances": [{"a": 1, "b": 2}, {"a": 0.1, "b": 0.2}]}
    status, answer = ask("several:predict", rows)
    assert status == 200
    assert [sorted(row) for row in answer["predictions"]] == [["difference", "sum"]] * 2
    np.testing.assert_allclose([row["sum"] for row in answer["predictions"]], [3, 0.3], rtol=1e-6)
    status, answer = ask("several:predict", {"signature_name": "add", "inputs": {"a": [1], "b": [2]}})
    assert (status, answer) == (200, {"outputs": {"sum": [3.0], "difference": [-1.0]}})
    # An output without a first axis has no rows.
    assert ask("several:predict", {"signature_name": "norm", "inputs": [[3, 4]]}) == (200, {"outputs": 5.0})
    status, answer = ask("several:predict", {"signature_name": "norm", "instances": [[3, 4]]})
    assert (status, "Tensor name: norm has no shape information" in answer["error"]) == (400, True)
    assert ask("several:predict", {"inputs": [1]})[0] == 400
    assert ask("several:predict", {"signature_name": "add", "instances": [1]})[0] == 400
    assert ask("several:predict", {"signature_name": "add", "instances": [{"a": 1}]})[0] == 400


def test_scalars(ask: Ask) -> None:
    assert [ask("counter:predict", {"inputs": by})[1]["outputs"] for by in (1, 2**60, -1)] == [1, 2**60 + 1, 2**60]


def test_every_dtype(ask: Ask) -> None:
    sent: dict[str, Any] = {name: [[0, 1], [1, 0]] for name in DTYPES}
    sent |= {
        "int64": [[2**63 - 1, -(2**63)], [2**53 + 1, 0]],
        "uint64": [[2**64 - 1, 0], [1, 2]],
        "float32": [[0.1, 1e-30], [16777216, -1.5]],
        "float64": [[0.1, 1e300], [1 / 3, -0.5]],
        "bool": [[True, False], [False, True]],
    }
    assert ask("dtypes:predict", {"inputs": sent}) == (200, {"outputs": sent})
    rows = [{name: value[n] for name, value in sent.items()} for n in range(2)]
    assert ask("dtypes:predict", {"instances": rows}) == (200, {"predictions": rows})


def test_numbers_are_rounded_to_the_inputs_dtype_and_more_names_are_ignored_in_columns(ask: Ask) -> None:
    rounded, exact = ([ask("half_plus_three:predict", {"instances": [[number]]})] for number in (2**24 + 1, 2**24))
    assert rounded == exact
    assert rounded[0][0] == 200
    status, answer = ask("half_plus_three:predict", {"inputs": {"x": [[1e39]], "more": "ignored"}})
    assert (status, answer["outputs"]) == (200, [[math.inf]])


def test_what_is_wrong(ask: Ask) -> None:
    for path, document, status, said in (
        ("half:predict", {"instances": [1.0, 5.0]}, 404, "Servable not found for request: Latest(half)"),
        ("half_plus_three:predict", {"instances": [["x"]]}, 400, "is not of expected type: float"),
        ("half_plus_three:predict", {"instances": [[True]]}, 400, "is not of expected type: float"),
        ("half_plus_three:predict", {"instances": [[1.0, 2.0]]}, 400, "does not take shape"),
        ("half_plus_three:predict", {"instances": [{"z": [1.0]}]}, 400, "does not have named input: z"),
        ("half_plus_three:predict", "nope", 400, "JSON Parse error"),
        ("picky:predict", {"inputs": [-1.0]}, 400, "x is negative"),
        ("broken:predict", {"inputs": [[1.0]]}, 503, "not ready"),
    ):
        got, answer = ask(path, document)
        assert (got, said in answer["error"]) == (status, True), (path, got, answer)


def test_status(ask: Ask) -> None:
    ok = {"error_code": "OK", "error_message": ""}
    assert ask("half_plus_three/versions/123") == (
        200,
        {"model_version_status": [{"version": "123", "state": "AVAILABLE", "status": ok}]},
    )
    status, answer = ask("half_plus_three")
    assert [each["version"] for each in answer["model_version_status"]] == ["124", "123"]
    status, answer = ask("broken")
    (version,) = answer["model_version_status"]
    assert (status, version["state"], version["status"]["error_code"]) == (200, "END", "UNKNOWN")
    assert version["status"]["error_message"]


def test_metadata(ask: Ask) -> None:
    status, answer = ask("half_plus_three/labels/stable/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "half_plus_three", "version": "123", "signature_name": ""}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert signatures["regress"]["method_name"] == "tensorflow/serving/regress"
    assert signatures["serving_default"]["inputs"]["x"] == {
        "name": "fed:0",
        "dtype": "DT_FLOAT",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "1", "name": ""}], "unknown_rank": False},
    }


def test_inputs_with_defaults_may_be_left_out_and_metadata_tells_them(ask: Ask) -> None:
    row = {"predictions": [[11.0, 12.0, 13.0]]}
    for instances in ([[1, 2, 3]], [{"x": [1, 2, 3]}], [{"x": [1, 2, 3], "shift": [10]}]):
        assert ask("defaults:predict", {"instances": instances}) == (200, row)
    given = {"inputs": {"x": [[1, 2, 3]], "shift": [[1]]}}
    assert ask("defaults:predict", given) == (200, {"outputs": [[2.0, 3.0, 4.0]]})
    greeting = {"signature_name": "greeting", "inputs": {"word": ["hello"]}}
    assert ask("defaults:predict", greeting) == (200, {"outputs": ["hello!"]})
    # Another name beside all inputs is ignored; beside fewer it may be an optional input's, misspelt.
    assert ask("defaults:predict", {"inputs": {**given["inputs"], "more": 1}}) == (200, {"outputs": [[2.0, 3.0, 4.0]]})
    status, answer = ask("defaults:predict", {"inputs": {"x": [[1, 2, 3]], "shfit": [[1]]}})
    assert (status, "does not have named input: shfit" in answer["error"]) == (400, True)
    status, answer = ask("defaults/metadata")
    assert status == 200
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    shift = signatures["serving_default"]["defaults"]["shift"]
    assert (shift["dtype"], shift["float_val"]) == ("DT_FLOAT", [10.0])
    assert [dim["size"] for dim in shift["tensor_shape"]["dim"]] == ["1", "1"]
    end = signatures["greeting"]["defaults"]["end"]
    assert (end["dtype"], base64.b64decode(end["string_val"][0])) == ("DT_STRING", b"!")
    status, answer = ask("several/metadata")
    assert answer["metadata"]["signature_def"]["signature_def"]["add"]["defaults"] == {}
