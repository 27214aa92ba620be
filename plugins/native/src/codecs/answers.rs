//! `Response` objects as messages.

use super::Tried;
use dl_inference_wire::key::Tag;
use dl_inference_wire::walk::Plain;
use dl_inference_wire::write::{self, Writer};
use dl_inference_wire::{Dtype, NotPlain, Output, openinference, seldon, tfserving};
use numpy::npyffi::PyArray_CheckExact;
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyString, PyTuple};

/// Reads `Response` objects.
pub struct Answers {
    /// Dtypes by numpy's numbers, of which int64 and uint64 have two each.
    numbers: Vec<(i32, Dtype)>,
    tensors: Py<PyAny>,
    ndarray: Py<PyAny>,
    tftensor: Py<PyAny>,
    default_signature: String,
}

impl Answers {
    pub fn new(core: &Bound<'_, PyModule>, dtypes: &[Py<PyArrayDescr>]) -> PyResult<Self> {
        let py = core.py();
        let mut numbers: Vec<_> = dtypes.iter().map(|dtype| dtype.bind(py).num()).zip(Dtype::ALL).collect();
        for (name, same) in [("longlong", Dtype::I64), ("ulonglong", Dtype::U64)] {
            numbers.push((PyArrayDescr::new(py, name)?.num(), same));
        }
        let form = core.getattr("Form")?;
        Ok(Answers {
            numbers,
            tensors: form.getattr("TENSORS")?.unbind(),
            ndarray: form.getattr("NDARRAY")?.unbind(),
            tftensor: form.getattr("TFTENSOR")?.unbind(),
            default_signature: core.getattr("DEFAULT_SIGNATURE")?.extract()?,
        })
    }

    pub fn openinference<'py>(
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

    pub fn tfserving<'py>(
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
            signature: if signature.is_empty() { &self.default_signature } else { signature },
            outputs: &self.outputs(&arrays)?,
        };
        answer.check()?;
        Ok(written(py, |out| answer.write(out))?)
    }

    pub fn seldon<'py>(&self, response: &Bound<'py, PyAny>, request: &Bound<'py, PyAny>) -> Tried<Bound<'py, PyBytes>> {
        let py = response.py();
        let form = request.getattr(intern!(py, "form"))?;
        if form.is(&self.ndarray) || form.is(&self.tftensor) {
            return Err(NotPlain.into());
        }
        let tags = tags_of(response, request)?;
        let tags = tags.iter().map(|(name, tag)| Ok((text_of(name)?, tag.borrowed()?))).collect::<Plain<Vec<_>>>()?;
        let names = response.getattr(intern!(py, "names"))?;
        let names = names.cast_exact::<PyTuple>().map_err(|_| NotPlain)?;
        let names = names.iter().map(|name| name.cast_into_exact::<PyString>().map_err(|_| NotPlain));
        let names = names.collect::<Plain<Vec<_>>>()?;
        let puid = id_of(response, request)?;
        let arrays = arrays_of(&response.getattr(intern!(py, "payload"))?)?;
        let [tensor] = self.outputs(&arrays)?[..] else { return Err(NotPlain.into()) };
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
