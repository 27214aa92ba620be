"""What happens around a model call: preprocess → run_model → postprocess.

`Handler` is both the interface and the default: as it stands it passes a request's tensors to the model and the model's
outputs back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, FailedPrecondition, InferenceError, ModelError
from dl_inference_core.node.backend import Model, Signature
from dl_inference_core.node.rest_inputs import bind_rest
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

_RESULTS = {
    Method.CLASSIFY: ("classification", ("classes", "scores")),
    Method.REGRESS: ("regression", ("outputs",)),
}
"""For each method TensorFlow Serving's noun for it, and the outputs of which its signature must have one or more; it
has no more outputs than these."""
_EXAMPLES = "inputs"
"""TensorFlow Serving's name for the input that takes the examples of Classify and Regress."""


class Handler:
    """The business end of a model: subclass it, override what differs, and name it in `model.toml` (`handler = "…"`),
    or define it in a `handler.py` beside the model.

    One object per loaded version, or per copy of its model where it has several. Methods are plain functions, not
    `async`: they run on the model's own threads, one at a time per thread, inside the model's session (for torch:
    inference mode). Where requests share a call of the model, `preprocess` is called for each of them first, and
    `postprocess` for each of them last. What they raise, the client sees as INTERNAL with a request id; raise
    `BadRequest` to tell the client that its input is wrong. If the model refuses what a `preprocess` of one's own
    returned, the client sees INTERNAL, too.

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

    @classmethod
    def described(cls) -> str:
        """The handler as messages name it. A class in a `handler.py` need not have a name of its own."""
        return f'handler "{cls.name}"' if "name" in vars(cls) else f"handler class {cls.__qualname__}"

    def __init__(self, options: PluginOptions) -> None:
        self.options = options
        self.signature = Signature()
        """The model's default one."""
        self.signatures: Mapping[str, Signature] = {DEFAULT_SIGNATURE: self.signature}

    def prepare(self, model: Model, directory: Path) -> None:
        """Take the model's signatures, then `load`. The service calls it, so that a handler whose `load` is its own has
        the signatures without `super()`. Not to be overridden by handlers.

        Raises:
            ModelError: `load` is asynchronous.
        """
        self.signature = model.signature
        self.signatures = model.signatures
        load: Callable[[Model, Path], Any] = self.load
        if is_awaitable(load(model, directory)):
            raise ModelError(
                f"{self.described()}: its load returned a coroutine; it must be a plain function, not async"
            )

    def load(self, model: Model, directory: Path) -> None:
        """Called once, after the model is loaded and before the first request, on a thread that runs it and inside its
        session: the place to read a vocabulary, and to warm the model up. `self.signature` and `self.signatures` are
        the model's by then. By default does nothing.

        Args:
            directory: the version's folder, for what lies beside the model: a vocabulary, labels.
        """

    def preprocess(self, request: Request) -> Any:
        """What `run_model` takes, from a request: by default its tensors, checked against the model's signature.

        The default `run_model` takes a dict, by input name, of the framework's tensors or of what numpy reads: arrays,
        numbers, text, lists, images, tables; or one of these alone, where the model has one input. What numpy reads
        gets the dtype that the model states for the input. The client's own tensors, returned as they are, are checked
        as by the default.

        Raises:
            BadRequest: the request does not fit the model.
        """
        return bind(self.signature_for(request), request)

    def signature_for(self, request: Request) -> Signature:
        """The signature that a request asks for. Classify and Regress take any signature with the inputs and outputs
        that they need, whatever its own method is, as TensorFlow Serving does by default.

        Raises:
            BadRequest, FailedPrecondition: the model has no signature of that name, in the words and with the code
                that TensorFlow Serving has for each method.
            BadRequest: the signature does not have the inputs and outputs that the method needs.
        """
        signature = self._find_signature(request)
        if request.method is not Method.PREDICT:
            _check_results(signature, request.method)
        return signature

    def _find_signature(self, request: Request) -> Signature:
        name = request.signature or DEFAULT_SIGNATURE
        signature = self.signatures.get(name)
        if signature is None:
            raise _unknown_signature(name[:100], request, self.signatures)
        return signature

    def run_model(self, model: Model, inputs: Any, request: Request) -> Any:
        """Call `model`, once or several times. By default once, on what `preprocess` returned.

        Raises:
            BadRequest, FailedPrecondition: the model has no signature of the name that the request asks for.
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
    def calls_signatures(self) -> bool:
        """Whether the model is called by its signatures, so that a model without any cannot answer."""
        cls = type(self)
        return cls.run_model is Handler.run_model and cls.run_batch is Handler.run_batch

    @property
    def makes_inputs(self) -> bool:
        """Whether `preprocess` is the handler's own: if the model refuses what it returned, that is not the client's
        fault."""
        return type(self).preprocess is not Handler.preprocess

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
        """The answer, from what `run_model` returned: named tensors, one tensor, bytes, str, or JSON values.

        REST and Seldon's jsonData send lists as they are. The typed protocols make tensors of them, and fail where a
        tensor could hold a list only by changing it (`[True, 3]`); an empty list has no dtype of its own. Answer with
        arrays where clients need one dtype.
        """
        return outputs  # type: ignore[no-any-return]


def _unknown_signature(name: str, request: Request, signatures: Mapping[str, Signature]) -> InferenceError:
    """TensorFlow Serving's words and code: REST looks the signature up before it reads the inputs, gRPC's Predict when
    it runs the model."""
    have = ", ".join(f'"{each}"' for each in sorted(signatures)) or "none"
    if request.method is not Method.PREDICT:
        return BadRequest(f"No signature was found with the name: {name}; the model has {have}")
    if request.layout is not None:
        return BadRequest(f'Serving signature name: "{name}" not found in signature def; the model has {have}')
    return FailedPrecondition(f'Serving signature key "{name}" not found. The model has {have}')


def _check_results(signature: Signature, method: Method) -> None:
    """Raises:
    BadRequest: examples cannot be the input of `signature`, or its outputs are not results of `method`.
    """
    noun, names = _RESULTS[method]
    inputs = [spec.name for spec in signature.inputs]
    outputs = [spec.name for spec in signature.outputs]
    if len(inputs) != 1:
        raise BadRequest(f"Expected one input Tensor. The signature has {', '.join(inputs) or 'none'}")
    if not 1 <= len(outputs) <= len(names):
        count = "one" if len(names) == 1 else "one or two"
        plural = "" if len(names) == 1 else "s"
        raise BadRequest(
            f"Expected {count} output Tensor{plural}, found {len(outputs)}. The signature has "
            f"{', '.join(outputs) or 'none'}"
        )
    if inputs != [_EXAMPLES]:
        raise BadRequest(
            f"No {noun} inputs found in SignatureDef: its input is {inputs[0]}; expected {_EXAMPLES}, which takes "
            "examples"
        )
    if set(outputs).isdisjoint(names):
        expected = " or ".join(f'"{name}"' for name in names)
        words = f"Expected {noun} signature outputs to contain at least one of {expected}."
        if method is Method.REGRESS:
            words = f"No {noun} outputs found in SignatureDef: expected {expected}."
        raise BadRequest(f"{words} The signature has {', '.join(outputs)}")


def is_awaitable(returned: Any) -> bool:
    """Whether a method returned something to be awaited. A coroutine is closed, or Python warns that nobody did."""
    if inspect.iscoroutine(returned):
        returned.close()
    return inspect.isawaitable(returned)


def check_function(where: str, function: Any, *arguments: str, **keywords: Any) -> None:
    """Check what a handler or a `processor.py` has under the name of a function that the service calls.

    Args:
        where: names it in the error.
        arguments: the names of those that the service gives it by position; `keywords`, those by name.

    Raises:
        ModelError: it is not a plain function, or does not take these arguments.
    """
    if not callable(function):
        raise ModelError(f"{where} is {function!r}; expected a function")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ModelError(f"{where} is async; expected a plain function: a model has threads of its own")
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except ValueError:  # it has no signature, as some functions that are written in C
        pass
    except TypeError:
        expected = ", ".join((*arguments, *(("**kwargs",) if keywords else ())))
        raise ModelError(f"{where} does not take its arguments, {expected}") from None


def bind(signature: Signature, request: Request) -> dict[str, Any]:
    """A request's tensors by input name, checked against `signature`; JSON objects and lists count as tensors.

    Raises:
        BadRequest: bytes or text, which no default can turn into tensors; or tensors that do not fit.
    """
    payload = request.payload
    if request.layout is not None:
        return bind_rest(signature, payload, request.layout)
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
        BadRequest: an output that is not among them; in TensorFlow Serving's words.
    """
    if not request.outputs:
        return payload
    outputs: Tensors = payload if isinstance(payload, Mapping) else {"output": as_tensor(payload)}
    for name in request.outputs:
        if name not in outputs:
            raise BadRequest(
                f"output tensor alias not found in signature: {name[:100]} Outputs expected to be in the set "
                f"{{{','.join(sorted(outputs))}}}."
            )
    return {name: outputs[name] for name in request.outputs}
