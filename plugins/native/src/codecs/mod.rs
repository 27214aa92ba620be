//! What Python sees, by `register`: codecs with the interface of the core's, routing keys, and `well_formed`.
//!
//! Each function tries the plain form of a message, and calls the core's codec where the message is not plain. So all
//! error messages are the core's.

mod answers;
mod keys;
mod requests;

use answers::Answers;
use dl_inference_wire::{NotPlain, openinference, seldon, tfserving};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use requests::Requests;

/// Why a message is left to the core's codec, or not at all.
enum Stop {
    NotPlain,
    Raised(PyErr),
}

impl From<NotPlain> for Stop {
    fn from(_: NotPlain) -> Self {
        Stop::NotPlain
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        Stop::Raised(error)
    }
}

type Tried<T> = Result<T, Stop>;

#[derive(Clone, Copy)]
enum Protocol {
    OpenInference { as_requested: bool },
    TfServing,
    Seldon,
}

/// A codec with the interface of `dl_inference_core.wire.codecs.Codec`. Any thread.
#[pyclass(frozen, module = "dl_inference_native")]
struct Codec {
    protocol: Protocol,
    requests: Requests,
    answers: Answers,
    #[pyo3(get)]
    encode_request: Py<PyAny>,
    #[pyo3(get)]
    decode_response: Py<PyAny>,
    decode: Py<PyAny>,
    encode: Py<PyAny>,
}

#[pymethods]
impl Codec {
    /// Args:
    ///   at: where the core's codec is, as of `Protocol.codec_at`.
    ///   core: that codec.
    ///
    /// Raises:
    ///   ValueError: this package has no codec for that protocol.
    #[new]
    fn new(at: &str, core: &Bound<'_, PyAny>) -> PyResult<Self> {
        let protocol = match at {
            "openinference" => Protocol::OpenInference { as_requested: false },
            "openinference:AS_REQUESTED" => Protocol::OpenInference { as_requested: true },
            "tfserving" => Protocol::TfServing,
            "seldon" => Protocol::Seldon,
            _ => return Err(PyValueError::new_err(format!("no native codec for {at}"))),
        };
        let method = |name: &str| core.getattr(name).map(Bound::unbind);
        let tensors = core.py().import("dl_inference_core.tensors")?;
        let requests = Requests::new(&tensors)?;
        Ok(Codec {
            protocol,
            answers: Answers::new(&tensors, &requests.dtypes)?,
            requests,
            encode_request: method("encode_request")?,
            decode_response: method("decode_response")?,
            decode: method("decode_request")?,
            encode: method("encode_response")?,
        })
    }

    fn decode_request<'py>(&self, body: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match self.try_decode(body) {
            Ok(request) => Ok(request),
            Err(Stop::NotPlain) => self.decode.bind(body.py()).call1((body,)),
            Err(Stop::Raised(error)) => Err(error),
        }
    }

    fn encode_response<'py>(
        &self,
        response: &Bound<'py, PyAny>,
        request: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        match self.try_encode(response, request) {
            Ok(answer) => Ok(answer.into_any()),
            Err(Stop::NotPlain) => self.encode.bind(response.py()).call1((response, request)),
            Err(Stop::Raised(error)) => Err(error),
        }
    }

    /// The request in `body` if that is plain, else None: for tests.
    fn decode_plain<'py>(&self, body: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        optional(self.try_decode(body))
    }

    /// The answer if it is plain, else None: for tests.
    fn encode_plain<'py>(
        &self,
        response: &Bound<'py, PyAny>,
        request: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        optional(self.try_encode(response, request))
    }
}

fn optional<T>(tried: Tried<T>) -> PyResult<Option<T>> {
    match tried {
        Ok(value) => Ok(Some(value)),
        Err(Stop::NotPlain) => Ok(None),
        Err(Stop::Raised(error)) => Err(error),
    }
}

impl Codec {
    fn try_decode<'py>(&self, body: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        if let Ok(bytes) = body.cast_exact::<PyBytes>() {
            return self.decode_bytes(bytes.as_bytes(), body);
        }
        let owner = PyMemoryView::from(body)?;
        let buffer = PyBuffer::<u8>::get(&owner).map_err(|_| NotPlain)?;
        if !buffer.is_c_contiguous() || buffer.item_count() == 0 {
            return Err(Stop::NotPlain);
        }
        // Safety: the bytes are there as long as `buffer` is, and stay as long as `owner` does. A transport does not
        // change a message that it has handed over.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
        self.decode_bytes(bytes, &owner)
    }

    /// Decodes `body`, which is there as long as `owner` is.
    fn decode_bytes<'py>(&self, body: &[u8], owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        match self.protocol {
            Protocol::OpenInference { .. } => self.requests.openinference(&openinference::decode(body)?, owner),
            Protocol::TfServing => self.requests.tfserving(&tfserving::decode(body)?, owner),
            Protocol::Seldon => self.requests.seldon(&seldon::decode(body)?, owner),
        }
    }

    fn try_encode<'py>(&self, response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyBytes>> {
        match self.protocol {
            Protocol::OpenInference { as_requested } => self.answers.openinference(response, request, as_requested),
            Protocol::TfServing => self.answers.tfserving(response, request),
            Protocol::Seldon => self.answers.seldon(response, request),
        }
    }
}

/// As `dl_inference_core.wire.protocol.well_formed`.
#[pyfunction]
fn well_formed(body: &[u8]) -> bool {
    dl_inference_wire::well_formed(body)
}

/// Adds all classes and functions of this module to Python's `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Codec>()?;
    module.add_class::<keys::KeyReader>()?;
    module.add_function(wrap_pyfunction!(well_formed, module)?)
}
