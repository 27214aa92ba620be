//! Routing keys.

use dl_inference_wire::{Key, KeyFields, Model, Version, find_key};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyString, PyTuple};

/// `dl_inference_core.wire.routing_keys.KeyFields`.
#[derive(FromPyObject)]
struct Fields {
    model: Vec<u32>,
    version: Vec<u32>,
    label: Vec<u32>,
    tags: Vec<u32>,
    task: String,
}

/// Reads routing keys of one kind of request. Any thread.
#[pyclass(frozen, module = "dl_inference_native_codecs")]
pub struct KeyReader(KeyFields);

#[pymethods]
impl KeyReader {
    #[new]
    fn new(fields: Fields) -> Self {
        let Fields { model, version, label, tags, task } = fields;
        KeyReader(KeyFields { model, version, label, tags, task })
    }

    /// Model, version and label of a request; None if only the core's reader can tell them.
    fn find<'py>(&self, py: Python<'py>, body: &[u8]) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let Some(Key { model, version, label }) = find_key(&self.0, body) else { return Ok(None) };
        let model = match model {
            Model::Name(name) => PyString::new(py, name).into_any(),
            Model::TaskId(id) => PyInt::new(py, id).into_any(),
        };
        let version = match version {
            None => py.None().into_bound(py),
            Some(Version::Number(number)) => PyInt::new(py, number).into_any(),
            Some(Version::Text(text)) => PyString::new(py, text).into_any(),
        };
        PyTuple::new(py, [model, version, PyString::new(py, label).into_any()]).map(Some)
    }
}
