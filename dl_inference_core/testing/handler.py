"""The suite for handlers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handler_inputs import inputs_of
from dl_inference_core.node.handling import Handler
from dl_inference_core.tensors import Payload, Request, as_json, as_tensors
from dl_inference_core.testing.fakes import FakeModel
from dl_inference_core.testing.plugin import PluginConformance, assert_equal


class HandlerConformance(PluginConformance):
    """What every handler must keep. The subclass gives requests, and what comes of them with its model::

    class TestSentiment(HandlerConformance):
        handler_class = Sentiment
        samples = [
            (Request(payload="good", form=Form.TEXT), {"score": np.array([0.9], np.float32)}),
            (Request(payload="bad", form=Form.TEXT), {"score": np.array([0.1], np.float32)}),
        ]
        rejected = [Request(payload=b"\\x00", form=Form.BYTES)]

        @pytest.fixture
        def model(self):
            return FakeModel(2)
    """

    handler_class: ClassVar[type[Handler]]
    samples: ClassVar[Sequence[tuple[Request, Payload]]]
    """Requests, and the payload that answers each."""
    rejected: ClassVar[Sequence[Request]] = ()
    """Requests that are the client's mistake: BadRequest, from any of the three steps."""
    tolerance: ClassVar[float] = 1e-5
    """How far a floating-point value may be off, relative and absolute."""

    @pytest.fixture
    def model(self) -> Model:
        return FakeModel()

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """The version's folder, for a handler that reads what lies beside the model."""
        return tmp_path

    @pytest.fixture
    def handler(self, model: Model, directory: Path) -> Handler:
        handler = self.handler_class(self.handler_class.Options(**self.options))
        with model.session():
            handler.prepare(model, directory)
        return handler

    def _answer(self, handler: Handler, model: Model, request: Request) -> Payload:
        with model.session():
            inputs = inputs_of(handler, request)
            outputs = handler.run_model(model, inputs, request)
            return handler.postprocess(outputs, request)

    def test_is_a_handler_with_a_name_and_plain_methods(self) -> None:
        self._check_class(self.handler_class, Handler, ["load", "preprocess", "run_model", "run_batch", "postprocess"])

    def test_options_are_strict(self) -> None:
        self._check_options(self.handler_class.Options, self.options)

    def test_answers_its_samples_each_time_alike(self, handler: Handler, model: Model) -> None:
        assert self.samples, "a handler without samples proves nothing"
        for request, expected in [*self.samples, *self.samples]:
            assert_equal(self._answer(handler, model, request), expected, self.tolerance)

    def test_answers_with_what_a_wire_can_carry(self, handler: Handler, model: Model) -> None:
        for request, _ in self.samples:
            payload = self._answer(handler, model, request)
            try:
                as_tensors(payload)
            except TypeError:
                json.dumps(as_json(payload), allow_nan=True)

    def test_keeps_requests_apart_that_are_under_way_together(self, handler: Handler, model: Model) -> None:
        """Several threads may be between two steps of different requests, so nothing of one may be kept on `self`."""
        with model.session():
            inputs = [inputs_of(handler, request) for request, _ in self.samples]
            outputs = [
                handler.run_model(model, given, request)
                for given, (request, _) in zip(inputs, self.samples, strict=True)
            ]
            for given, (request, expected) in reversed(list(zip(outputs, self.samples, strict=True))):
                assert_equal(handler.postprocess(given, request), expected, self.tolerance)

    def test_leaves_requests_as_they_were(self, handler: Handler, model: Model) -> None:
        for request, _ in self.samples:
            before = copy.deepcopy(request)
            self._answer(handler, model, request)
            assert_equal(request.payload, before.payload, 0.0)
            assert (request.tags, request.parameters) == (before.tags, before.parameters)

    def test_tells_the_client_of_its_mistakes_and_goes_on(self, handler: Handler, model: Model) -> None:
        for request in self.rejected:
            with pytest.raises(BadRequest) as error:
                self._answer(handler, model, request)
            assert str(error.value), "the client is not told what is wrong"
        request, expected = self.samples[0]
        assert_equal(self._answer(handler, model, request), expected, self.tolerance)
