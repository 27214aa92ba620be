"""What happens around a model call: preprocess → run_model → postprocess.

`Handler` is both the interface and the default: as it stands it passes a request's tensors to the model and the model's
outputs back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest
from dl_inference_core.node.backend import Model, Signature
from dl_inference_core.tensors import (
    DEFAULT_SIGNATURE,
    Form,
    Method,
    Payload,
    Request,
    Tensor,
    Tensors,
    as_tensor,
    from_json,
)

_EXPECTED = {
    Method.CLASSIFY: ("classification", frozenset({"classes", "scores"})),
    Method.REGRESS: ("regression", frozenset({"outputs"})),
}
"""What TensorFlow Serving calls a signature for each method, and the outputs that one must have."""


class Handler:
    """The business end of a model: subclass it, override what differs, and name it in `model.toml` (`handler = "…"`),
    or define it in a `handler.py` beside the model.

    One object per loaded version, or per copy of its model where it has several. Methods run on the model's own
    threads, one at a time per thread, inside the model's session (for torch: inference mode). Where requests share a
    call of the model, `preprocess` is called for each of them first, and `postprocess` for each of them last. What they
    raise, the client sees as INTERNAL with a request id; raise `BadRequest` to tell the client that its input is wrong.

    A handler in full::

        class Sentiment(Handler):
            name = "sentiment"

            class Options(PluginOptions):
                longest: int = 128

            def preprocess(self, request):
                if request.form is not Form.TEXT:
                    raise BadRequest("sentiment takes strData")
                return {"tokens": tokenise(request.payload)[None, : self.options.longest]}

            def postprocess(self, outputs, request):
                return {"score": outputs["logits"][:, 1]}
    """

    name: ClassVar[str] = "default"
    shares_calls: ClassVar[bool] = False
    """Whether requests may share calls of the model without being told to by `[batching]`, though `preprocess` or
    `postprocess` is not the default's: both are called for all of them then before the next step, so neither may keep
    anything of one request on `self`, nor give away the same array twice."""
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions) -> None:
        self.options = options
        self.signature = Signature()
        """The model's default one."""
        self.signatures: Mapping[str, Signature] = {DEFAULT_SIGNATURE: self.signature}

    def load(self, model: Model, directory: Path) -> None:
        """Called once, after the model is loaded and before the first request, on a thread that runs it and inside its
        session: the place to warm it up.

        Args:
            directory: the version's folder, for what lies beside the model: a vocabulary, labels.
        """
        self.signature = model.signature
        self.signatures = model.signatures

    def preprocess(self, request: Request) -> Any:
        """What `run_model` takes, from a request. By default its tensors, checked against the model's signature.

        Raises:
            BadRequest: the request does not fit the model.
        """
        return bind(self.signature_for(request), request)

    def signature_for(self, request: Request) -> Signature:
        """The signature that a request asks for. One for Predict will do for Classify and Regress too if it has their
        outputs: TensorFlow 2 writes no other.

        Raises:
            BadRequest: the model has none of that name, or it is for another method.
        """
        signature = self._find_signature(request)
        if request.method is Method.PREDICT or request.method.value == signature.method:
            return signature
        noun, outputs = _EXPECTED[request.method]
        if signature.method != Method.PREDICT.value or outputs.isdisjoint(spec.name for spec in signature.outputs):
            raise BadRequest(
                f"Expected {noun} signature method_name to be {request.method.value}. Was: {signature.method}; for "
                f"Predict it would do with an output named {' or '.join(sorted(outputs))}"
            )
        return signature

    def _find_signature(self, request: Request) -> Signature:
        name = request.signature or DEFAULT_SIGNATURE
        signature = self.signatures.get(name)
        if signature is None:
            have = ", ".join(f'"{name}"' for name in sorted(self.signatures)) or "none"
            raise BadRequest(f'Serving signature name: "{name[:100]}" not found in signature def; the model has {have}')
        return signature

    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        """Call `model`, once or several times. By default once, on what `preprocess` returned.

        Raises:
            BadRequest: the model has no signature of the name that the request asks for.
        """
        return self.run_batch(model, inputs, [request])

    def run_batch(self, model: Model, inputs: Any, requests: Sequence[Request]) -> Any:
        """Call `model` on the rows of several requests together: tensors by name, as `preprocess` returned them for
        each, one after the other along the first dimension. All ask for the same signature. Outputs must be tensors by
        name with just as many rows; each request's go to `postprocess`. By default calls it once.

        A handler whose `run_model` is its own takes one request at a time, unless this one is too.
        """
        self._find_signature(requests[0])
        return model(inputs, requests[0].signature or DEFAULT_SIGNATURE)

    @property
    def takes_batches(self) -> bool:
        """Whether requests can share a call of the model."""
        own = next(cls for cls in type(self).__mro__ if not {"run_batch", "run_model"}.isdisjoint(vars(cls)))
        return "run_batch" in vars(own)

    @property
    def takes_batches_untold(self) -> bool:
        """Whether they may without being told to."""
        cls = type(self)
        plain = cls.preprocess is Handler.preprocess and cls.postprocess is Handler.postprocess
        return self.takes_batches and (plain or cls.shares_calls or cls.run_batch is not Handler.run_batch)

    @property
    def takes_what_fits(self) -> bool:
        """Whether `preprocess` is the default's, which looks at nothing but names, dtypes and shapes where it does not
        convert numbers."""
        cls = type(self)
        return cls.preprocess is Handler.preprocess and cls.signature_for is Handler.signature_for

    def postprocess(self, outputs: Any, request: Request) -> Payload:
        """The answer, from what `run_model` returned: named tensors, one tensor, bytes, str, or JSON values."""
        return outputs  # type: ignore[no-any-return]


def bind(signature: Signature, request: Request) -> dict[str, Any]:
    """A request's tensors by input name, checked against `signature`; JSON objects and lists count as tensors.

    Raises:
        BadRequest: bytes or text, which no default can turn into tensors; or tensors that do not fit.
    """
    payload = request.payload
    match request.form:
        case Form.TENSORS | Form.TENSORS_RAW:
            assert isinstance(payload, Mapping)
            return signature.bind(payload)
        case Form.BYTES | Form.TEXT:
            raise BadRequest(
                f"this model takes tensors, not {request.form.value}: only a handler could turn one into the other"
            )
    if request.form is not Form.JSON:
        return signature.bind_one(as_tensor(payload), cast=not request.form.typed)
    if not isinstance(payload, Mapping):
        return signature.bind_one(_from_json(payload, "the only input"), cast=True)
    tensors = {name: _from_json(value, f'input "{name}"') for name, value in payload.items()}
    return signature.bind(tensors, cast=True)


def _from_json(value: Any, what: str) -> Tensor:
    try:
        return from_json(value)
    except TypeError as error:
        raise BadRequest(f"{what}: {error}") from error


def narrow(payload: Payload, request: Request) -> Payload:
    """`payload` with only the outputs that the request asked for.

    Raises:
        BadRequest: an output that is not among them.
    """
    if not request.outputs:
        return payload
    outputs: Tensors = payload if isinstance(payload, Mapping) else {"output": as_tensor(payload)}
    unknown = [name for name in request.outputs if name not in outputs]
    if unknown:
        have = ", ".join(f'"{name}"' for name in outputs)
        raise BadRequest(f'output tensor alias not found in signature: "{unknown[0]}"; the model gives {have}')
    return {name: outputs[name] for name in request.outputs}
