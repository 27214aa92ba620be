//! Routing keys.

use dl_inference_wire::{Key, KeyFields, Model, Version, VersionPath, find_key};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyString, PyTuple};

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
pub struct KeyReader(KeyFields);

#[pymethods]
impl KeyReader {
    #[new]
    fn new(fields: Paths) -> Self {
        KeyReader(fields.into())
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
