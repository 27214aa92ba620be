//! What Python sees: codecs with the interface of the core's, routing keys, and `well_formed`.
//!
//! Each function tries the plain form of a message, and calls the core's codec where the message is not plain. So all
//! error messages are the core's.

use dl_inference_wire::key::{Model, Tag, Version};
use dl_inference_wire::walk::Plain;
use dl_inference_wire::write::{self, Writer};
use dl_inference_wire::{Dtype, KeyFields, NotPlain, Output, Tensor, VersionPath, openinference, seldon, tfserving};
use numpy::npyffi::{NpyTypes, PY_ARRAY_API, PyArray_CheckExact, PyArrayObject, get_type_object};
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyMemoryView, PyString, PyTuple, PyType};
use pyo3::{ffi, intern};

/// Bytes of a tensor from which on a copy costs more than a view that is not aligned; the core's codec makes such views
/// from this size on, too.
const LARGE: usize = 32_768;

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

/// A codec with the interface of `dl_inference_core.wire.protocol.Codec`. Any thread.
#[pyclass(frozen, module = "dl_inference_native_codecs")]
struct Codec {
    protocol: Protocol,
    core: Core,
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
    ///   at: where in `dl_inference_core.wire` the core's codec is, as of `Protocol.codec_at`.
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
        Ok(Codec {
            protocol,
            core: Core::new(core.py())?,
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
            Protocol::OpenInference { .. } => self.core.openinference(&openinference::decode(body)?, owner),
            Protocol::TfServing => self.core.tfserving(&tfserving::decode(body)?, owner),
            Protocol::Seldon => self.core.seldon(&seldon::decode(body)?, owner),
        }
    }

    fn try_encode<'py>(&self, response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyBytes>> {
        match self.protocol {
            Protocol::OpenInference { as_requested } => self.core.openinference_answer(response, request, as_requested),
            Protocol::TfServing => self.core.tfserving_answer(response, request),
            Protocol::Seldon => self.core.seldon_answer(response, request),
        }
    }
}

/// What is needed of the core and of numpy.
struct Core {
    request: Py<PyType>,
    /// The fields of a `Request` that no protocol sets here, with their defaults.
    defaults: Vec<(Py<PyAny>, Py<PyAny>)>,
    dtypes: [Py<PyArrayDescr>; Dtype::ALL.len()],
    /// Dtypes by numpy's numbers, of which int64 and uint64 have two each.
    numbers: Vec<(i32, Dtype)>,
    tensors: Py<PyAny>,
    raw: Py<PyAny>,
    tensor: Py<PyAny>,
    ndarray: Py<PyAny>,
    tftensor: Py<PyAny>,
    signature: String,
    empty_text: Py<PyString>,
    empty_tuple: Py<PyTuple>,
}

/// The fields of a `Request` that protocols set here.
const SET: [&str; 11] =
    ["payload", "form", "model", "version", "label", "signature", "outputs", "names", "tags", "parameters", "id"];

impl Core {
    fn new(py: Python<'_>) -> PyResult<Self> {
        let core = py.import("dl_inference_core.tensors")?;
        let request = core.getattr("Request")?.cast_into::<PyType>()?;
        let mut defaults = vec![];
        for field in py.import("dataclasses")?.call_method1("fields", (&request,))?.try_iter()? {
            let name = field.as_ref().map_err(|error| error.clone_ref(py))?.getattr("name")?;
            if !SET.contains(&name.extract::<&str>()?) {
                defaults.push((name.unbind(), field?.getattr("default")?.unbind()));
            }
        }
        let form = core.getattr("Form")?;
        let form = |name: &str| form.getattr(name).map(Bound::unbind);
        let bfloat16 = py.import("ml_dtypes")?.getattr("bfloat16")?;
        let dtype = |dtype: Dtype| match dtype {
            Dtype::Bf16 => PyArrayDescr::new(py, &bfloat16).map(Bound::unbind),
            _ => PyArrayDescr::new(py, dtype.name()).map(Bound::unbind),
        };
        let dtypes = Dtype::ALL.into_iter().map(dtype).collect::<PyResult<Vec<_>>>()?;
        let mut numbers: Vec<_> = dtypes.iter().map(|dtype| dtype.bind(py).num()).zip(Dtype::ALL).collect();
        for (name, same) in [("longlong", Dtype::I64), ("ulonglong", Dtype::U64)] {
            numbers.push((PyArrayDescr::new(py, name)?.num(), same));
        }
        Ok(Core {
            request: request.unbind(),
            defaults,
            numbers,
            dtypes: dtypes.try_into().map_err(|_| PyValueError::new_err("a dtype is missing"))?,
            tensors: form("TENSORS")?,
            raw: form("TENSORS_RAW")?,
            tensor: form("TENSOR")?,
            ndarray: form("NDARRAY")?,
            tftensor: form("TFTENSOR")?,
            signature: core.getattr("DEFAULT_SIGNATURE")?.extract()?,
            empty_text: PyString::new(py, "").unbind(),
            empty_tuple: PyTuple::empty(py).unbind(),
        })
    }

    // Requests

    fn openinference<'py>(
        &self,
        found: &openinference::Request<'_>,
        owner: &Bound<'py, PyAny>,
    ) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        let payload = self.payload(&found.inputs, owner)?;
        let request = self.new_request(py)?;
        request.setattr(intern!(py, "payload"), payload)?;
        request.setattr(intern!(py, "form"), if found.raw { &self.raw } else { &self.tensors })?;
        request.setattr(intern!(py, "model"), found.model)?;
        request.setattr(intern!(py, "version"), found.version)?;
        request.setattr(intern!(py, "label"), &self.empty_text)?;
        request.setattr(intern!(py, "signature"), &self.empty_text)?;
        request.setattr(intern!(py, "outputs"), self.texts(py, &found.outputs)?)?;
        request.setattr(intern!(py, "names"), &self.empty_tuple)?;
        request.setattr(intern!(py, "tags"), PyDict::new(py))?;
        request.setattr(intern!(py, "parameters"), PyDict::new(py))?;
        request.setattr(intern!(py, "id"), found.id)?;
        Ok(request)
    }

    fn tfserving<'py>(&self, found: &tfserving::Request<'_>, owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        if found.outputs.len() > 1 {
            return Err(Stop::NotPlain); // two may be the same
        }
        let payload = self.payload(&found.inputs, owner)?;
        let request = self.new_request(py)?;
        request.setattr(intern!(py, "payload"), payload)?;
        request.setattr(intern!(py, "form"), &self.tensors)?;
        request.setattr(intern!(py, "model"), found.model)?;
        request.setattr(intern!(py, "version"), found.version)?;
        request.setattr(intern!(py, "label"), found.label)?;
        request.setattr(intern!(py, "signature"), found.signature)?;
        request.setattr(intern!(py, "outputs"), self.texts(py, &found.outputs)?)?;
        request.setattr(intern!(py, "names"), &self.empty_tuple)?;
        request.setattr(intern!(py, "tags"), PyDict::new(py))?;
        request.setattr(intern!(py, "parameters"), PyDict::new(py))?;
        request.setattr(intern!(py, "id"), &self.empty_text)?;
        Ok(request)
    }

    fn seldon<'py>(&self, found: &seldon::Request<'_>, owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        let py = owner.py();
        let tags = PyDict::new(py);
        for (name, tag) in &found.tags {
            match *tag {
                Tag::Null => tags.set_item(name, py.None())?,
                Tag::Number(number) => tags.set_item(name, number)?,
                Tag::Text(text) => tags.set_item(name, text)?,
                Tag::Bool(value) => tags.set_item(name, value)?,
            }
        }
        let payload = self.array(&found.tensor, owner)?;
        let request = self.new_request(py)?;
        request.setattr(intern!(py, "payload"), payload)?;
        request.setattr(intern!(py, "form"), &self.tensor)?;
        match found.model {
            None => request.setattr(intern!(py, "model"), &self.empty_text)?,
            Some(Model::Name(name)) => request.setattr(intern!(py, "model"), name)?,
            Some(Model::TaskId(id)) => request.setattr(intern!(py, "model"), id)?,
        }
        request.setattr(intern!(py, "version"), py.None())?;
        request.setattr(intern!(py, "label"), &self.empty_text)?;
        request.setattr(intern!(py, "signature"), &self.empty_text)?;
        request.setattr(intern!(py, "outputs"), &self.empty_tuple)?;
        request.setattr(intern!(py, "names"), self.texts(py, &found.names)?)?;
        request.setattr(intern!(py, "tags"), tags)?;
        request.setattr(intern!(py, "parameters"), PyDict::new(py))?;
        request.setattr(intern!(py, "id"), found.puid)?;
        Ok(request)
    }

    /// A `Request` of which the fields in `SET` are still to be set: `Request.__init__` would take three times as long.
    fn new_request<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let class = self.request.bind(py).as_type_ptr();
        // Safety: what `object.__new__` does for a class with slots.
        let request = unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyType_GenericAlloc(class, 0))? };
        for (name, value) in &self.defaults {
            request.setattr(name.bind(py).cast::<PyString>()?, value)?;
        }
        Ok(request)
    }

    fn texts<'py>(&self, py: Python<'py>, texts: &[&str]) -> PyResult<Bound<'py, PyTuple>> {
        if texts.is_empty() { Ok(self.empty_tuple.bind(py).clone()) } else { PyTuple::new(py, texts) }
    }

    fn payload<'py>(&self, tensors: &[Tensor<'_>], owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyDict>> {
        let payload = PyDict::new(owner.py());
        for tensor in tensors {
            payload.set_item(tensor.name, self.array(tensor, owner)?)?;
        }
        // Of two of the same name the core's codecs refuse the request, or take the last one.
        if payload.len() == tensors.len() { Ok(payload) } else { Err(Stop::NotPlain) }
    }

    /// The tensor as a read-only view of its bytes, which are there as long as `owner` is; or as a copy.
    fn array<'py>(&self, tensor: &Tensor<'_>, owner: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyAny>> {
        let size = tensor.size();
        if let Some(bytes) = tensor.in_place() {
            let aligned = bytes.as_ptr().addr() % tensor.dtype.size().min(8) == 0;
            if size > 0 && (aligned || size >= LARGE) {
                let array = self.new_array(owner.py(), tensor, bytes.as_ptr().cast_mut())?;
                let array_ptr = array.as_ptr().cast::<PyArrayObject>();
                // Safety: it is an array, and takes over one reference to its base.
                let set =
                    unsafe { PY_ARRAY_API.PyArray_SetBaseObject(owner.py(), array_ptr, owner.clone().into_ptr()) };
                return if set < 0 { Err(PyErr::fetch(owner.py()).into()) } else { Ok(array) };
            }
        }
        let array = self.new_array(owner.py(), tensor, std::ptr::null_mut())?;
        // Safety: the array is new, contiguous, of that size, and nobody else has it.
        let out = unsafe {
            let data = (*array.as_ptr().cast::<PyArrayObject>()).fields.data;
            std::slice::from_raw_parts_mut(data.cast::<u8>(), size)
        };
        if size >= LARGE {
            owner.py().detach(|| tensor.copy_to(out))?; // 2 ms for 100,000 varints
        } else {
            tensor.copy_to(out)?;
        }
        Ok(array)
    }

    /// A read-only array of the bytes at `data`; or, where that is null, a new one whose bytes are not set.
    fn new_array<'py>(&self, py: Python<'py>, tensor: &Tensor<'_>, data: *mut u8) -> PyResult<Bound<'py, PyAny>> {
        let dtype = self.dtypes[tensor.dtype as usize].bind(py).clone().into_dtype_ptr();
        let sizes = tensor.shape.sizes();
        // Safety: `dtype` is a new reference, which numpy takes over; the sizes are of numpy's own type, and only read.
        unsafe {
            Bound::from_owned_ptr_or_err(
                py,
                PY_ARRAY_API.PyArray_NewFromDescr(
                    py,
                    get_type_object(py, NpyTypes::PyArray_Type),
                    dtype,
                    sizes.len() as i32,
                    sizes.as_ptr().cast_mut(),
                    std::ptr::null_mut(),
                    data.cast(),
                    0,
                    std::ptr::null_mut(),
                ),
            )
        }
    }

    // Answers

    fn openinference_answer<'py>(
        &self,
        response: &Bound<'py, PyAny>,
        request: &Bound<'py, PyAny>,
        as_requested: bool,
    ) -> Tried<Bound<'py, PyBytes>> {
        let py = response.py();
        let model = model_of(response, request)?;
        let version = version_of(response)?.map_or(String::new(), |version| version.to_string());
        let id = id_of(response, request)?;
        let raw = !as_requested || !request.getattr(intern!(py, "form"))?.is(&self.tensors);
        let arrays = arrays_of(&response.getattr(intern!(py, "payload"))?)?;
        let answer = openinference::Response {
            model: text_of(&model)?,
            version: &version,
            id: text_of(&id)?,
            raw,
            outputs: &self.outputs(&arrays)?,
        };
        answer.check()?;
        Ok(written(py, |out| answer.write(out))?)
    }

    fn tfserving_answer<'py>(
        &self,
        response: &Bound<'py, PyAny>,
        request: &Bound<'py, PyAny>,
    ) -> Tried<Bound<'py, PyBytes>> {
        let py = response.py();
        let model = model_of(response, request)?;
        let signature = request.getattr(intern!(py, "signature"))?;
        let signature = text_of(signature.cast_exact::<PyString>().map_err(|_| NotPlain)?)?;
        let arrays = arrays_of(&response.getattr(intern!(py, "payload"))?)?;
        let answer = tfserving::Response {
            model: text_of(&model)?,
            version: version_of(response)?,
            signature: if signature.is_empty() { &self.signature } else { signature },
            outputs: &self.outputs(&arrays)?,
        };
        answer.check()?;
        Ok(written(py, |out| answer.write(out))?)
    }

    fn seldon_answer<'py>(
        &self,
        response: &Bound<'py, PyAny>,
        request: &Bound<'py, PyAny>,
    ) -> Tried<Bound<'py, PyBytes>> {
        let py = response.py();
        let form = request.getattr(intern!(py, "form"))?;
        if form.is(&self.ndarray) || form.is(&self.tftensor) {
            return Err(Stop::NotPlain);
        }
        let tags = tags_of(response, request)?;
        let tags = tags.iter().map(|(name, tag)| Ok((text_of(name)?, tag.borrowed()?))).collect::<Plain<Vec<_>>>()?;
        let names = response.getattr(intern!(py, "names"))?;
        let names = names.cast_exact::<PyTuple>().map_err(|_| NotPlain)?;
        let names = names.iter().map(|name| name.cast_into_exact::<PyString>().map_err(|_| NotPlain));
        let names = names.collect::<Plain<Vec<_>>>()?;
        let puid = id_of(response, request)?;
        let arrays = arrays_of(&response.getattr(intern!(py, "payload"))?)?;
        let [tensor] = self.outputs(&arrays)?[..] else { return Err(Stop::NotPlain) };
        let answer = seldon::Response {
            tags: &tags,
            puid: text_of(&puid)?,
            names: &names.iter().map(text_of).collect::<Plain<Vec<_>>>()?,
            tensor,
        };
        answer.check()?;
        Ok(written(py, |out| answer.write(out))?)
    }

    fn outputs<'a>(&self, arrays: &'a [Named<'_>]) -> Plain<Vec<Output<'a>>> {
        arrays.iter().map(|(name, array)| self.output(text_of(name)?, array)).collect()
    }

    /// An array's bytes; the array is contiguous and of a dtype that is known here.
    fn output<'a>(&self, name: &'a str, array: &'a Bound<'_, PyUntypedArray>) -> Plain<Output<'a>> {
        let descr = array.dtype();
        let number = descr.num();
        let (_, dtype) = *self.numbers.iter().find(|(known, _)| *known == number).ok_or(NotPlain)?;
        if !array.is_c_contiguous() || descr.is_native_byteorder() == Some(false) {
            return Err(NotPlain);
        }
        let bytes = match array.len() * dtype.size() {
            0 => &[],
            // Safety: the array is contiguous, and there as long as `array` is.
            size => unsafe { std::slice::from_raw_parts((*array.as_array_ptr()).fields.data.cast::<u8>(), size) },
        };
        Ok(Output { name, dtype, shape: array.shape(), bytes })
    }
}

type Named<'py> = (Bound<'py, PyString>, Bound<'py, PyUntypedArray>);

/// A payload of arrays, by name: a dict, or one array, which the core calls "output".
fn arrays_of<'py>(payload: &Bound<'py, PyAny>) -> Plain<Vec<Named<'py>>> {
    let py = payload.py();
    if let Ok(named) = payload.cast_exact::<PyDict>() {
        return named
            .iter()
            .map(|(name, value)| Ok((name.cast_into_exact::<PyString>().map_err(|_| NotPlain)?, array_of(value)?)))
            .collect();
    }
    Ok(vec![(intern!(py, "output").clone(), array_of(payload.clone())?)])
}

/// `value`, if it is an array of numpy's own class.
fn array_of(value: Bound<'_, PyAny>) -> Plain<Bound<'_, PyUntypedArray>> {
    // Safety: numpy looks at its class alone.
    let exact = unsafe { PyArray_CheckExact(value.py(), value.as_ptr()) } != 0;
    // Safety: it is an array.
    if exact { Ok(unsafe { value.cast_into_unchecked() }) } else { Err(NotPlain) }
}

fn text_of<'a>(text: &'a Bound<'_, PyString>) -> Plain<&'a str> {
    text.to_str().map_err(|_| NotPlain) // lone surrogates
}

/// The attribute `name`, a str; that of `request` where `response` has an empty one.
fn either<'py>(
    name: &Bound<'py, PyString>,
    response: &Bound<'py, PyAny>,
    request: &Bound<'py, PyAny>,
) -> Tried<Bound<'py, PyString>> {
    for object in [response, request] {
        let value = object.getattr(name)?.cast_into_exact::<PyString>().map_err(|_| NotPlain)?;
        if !value.is_empty()? {
            return Ok(value);
        }
    }
    Ok(PyString::new(name.py(), ""))
}

fn model_of<'py>(response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyString>> {
    either(intern!(response.py(), "model"), response, request)
}

fn id_of<'py>(response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyString>> {
    either(intern!(response.py(), "id"), response, request)
}

fn version_of(response: &Bound<'_, PyAny>) -> Tried<Option<i64>> {
    let version = response.getattr(intern!(response.py(), "version"))?;
    if version.is_none() {
        return Ok(None);
    }
    let version = version.cast_exact::<PyInt>().map_err(|_| NotPlain)?;
    Ok(Some(version.extract().map_err(|_| NotPlain)?))
}

/// A tag of an answer.
enum AnswerTag<'py> {
    Text(Bound<'py, PyString>),
    Other(Tag<'static>),
}

impl AnswerTag<'_> {
    fn borrowed(&self) -> Plain<Tag<'_>> {
        match self {
            AnswerTag::Text(text) => Ok(Tag::Text(text_of(text)?)),
            AnswerTag::Other(tag) => Ok(*tag),
        }
    }
}

/// A double holds every integer up to this magnitude.
const EXACT: u64 = 1 << 53;

type Tags<'py> = Vec<(Bound<'py, PyString>, AnswerTag<'py>)>;

/// The request's tags and the response's, which win.
fn tags_of<'py>(response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Tags<'py>> {
    let py = response.py();
    let of = |object: &Bound<'py, PyAny>| -> Tried<Bound<'py, PyDict>> {
        Ok(object.getattr(intern!(py, "tags"))?.cast_into_exact::<PyDict>().map_err(|_| NotPlain)?)
    };
    let (asked, answered) = (of(request)?, of(response)?);
    let mut tags = vec![];
    for (tags_, own) in [(&asked, false), (&answered, true)] {
        for (name, value) in tags_.iter() {
            if own || answered.is_empty() || !answered.contains(&name)? {
                tags.push((name.cast_into_exact::<PyString>().map_err(|_| NotPlain)?, answer_tag(value)?));
            }
        }
    }
    Ok(tags)
}

fn answer_tag(value: Bound<'_, PyAny>) -> Plain<AnswerTag<'_>> {
    if let Ok(value) = value.cast_exact::<PyFloat>() {
        return Ok(AnswerTag::Other(Tag::Number(value.value())));
    }
    if let Ok(value) = value.cast_exact::<PyBool>() {
        return Ok(AnswerTag::Other(Tag::Bool(value.is_true())));
    }
    if let Ok(value) = value.cast_exact::<PyInt>() {
        let number = value.extract::<i64>().map_err(|_| NotPlain)?;
        let exact = number.unsigned_abs() <= EXACT;
        return if exact { Ok(AnswerTag::Other(Tag::Number(number as f64))) } else { Err(NotPlain) };
    }
    if value.is_none() {
        return Ok(AnswerTag::Other(Tag::Null));
    }
    value.cast_into_exact::<PyString>().map(AnswerTag::Text).map_err(|_| NotPlain)
}

fn written<'py>(py: Python<'py>, write: impl Fn(&mut Writer<'_>)) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, write::size(&write), |out| {
        write::fill(out, &write);
        Ok(())
    })
}

// Routing keys

/// `dl_inference_core.wire.protocol.KeyFields`.
#[derive(FromPyObject)]
struct Paths {
    model: Vec<u32>,
    version: Vec<u32>,
    version_is_text: bool,
    label: Vec<u32>,
    map_key: String,
}

impl From<Paths> for KeyFields {
    fn from(paths: Paths) -> Self {
        let version = if paths.version_is_text { VersionPath::Text } else { VersionPath::Int64Value };
        KeyFields {
            model: paths.model,
            version: (!paths.version.is_empty()).then(|| version(paths.version)),
            label: (!paths.label.is_empty()).then_some(paths.label),
            map_key: (!paths.map_key.is_empty()).then_some(paths.map_key),
        }
    }
}

/// Reads routing keys of one kind of request. Any thread.
#[pyclass(frozen, module = "dl_inference_native_codecs")]
struct KeyReader(KeyFields);

#[pymethods]
impl KeyReader {
    #[new]
    fn new(fields: Paths) -> Self {
        KeyReader(fields.into())
    }

    /// Model, version and label of a request; None if only the core's reader can tell them.
    fn find<'py>(&self, py: Python<'py>, body: &[u8]) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let Some(key) = dl_inference_wire::find_key(&self.0, body) else { return Ok(None) };
        let model = match key.model {
            Model::Name(name) => PyString::new(py, name).into_any(),
            Model::TaskId(id) => PyInt::new(py, id).into_any(),
        };
        let version = match key.version {
            None => py.None().into_bound(py),
            Some(Version::Number(number)) => PyInt::new(py, number).into_any(),
            Some(Version::Text(text)) => PyString::new(py, text).into_any(),
        };
        PyTuple::new(py, [model, version, PyString::new(py, key.label).into_any()]).map(Some)
    }
}

/// As `dl_inference_core.wire.protocol.well_formed`.
#[pyfunction]
fn well_formed(body: &[u8]) -> bool {
    dl_inference_wire::well_formed(body)
}

/// Adds everything of this file to `module`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Codec>()?;
    module.add_class::<KeyReader>()?;
    module.add_function(wrap_pyfunction!(well_formed, module)?)
}
