//! Routing keys without a transport: for tests and measurements.

use crate::python::routing::{Fields, to_python};
use dl_inference_wire::{KeyFields, find_key};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Reads routing keys of one kind of request. Any thread.
#[pyclass(frozen, module = "dl_inference_native")]
pub struct KeyReader(KeyFields);

#[pymethods]
impl KeyReader {
    #[new]
    fn new(fields: Fields) -> Self {
        KeyReader(fields.into())
    }

    /// Model, version and label of a request; None if only the core's reader can tell them.
    fn find<'py>(&self, py: Python<'py>, body: &[u8]) -> PyResult<Option<Bound<'py, PyTuple>>> {
        find_key(&self.0, body).map(|key| to_python(py, &key)).transpose()
    }
}
