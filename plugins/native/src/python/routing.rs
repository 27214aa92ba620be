//! Routing keys, as Python has them.

use dl_inference_wire::{Key, KeyFields, Model, Version, find_key};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString, PyTuple};
use std::collections::HashMap;

/// Keys that are kept at one time. With one route for each of 10,000 tasks, and versions, more would be forgotten.
const MOST: usize = 16_384;

/// `dl_inference_core.wire.routing_keys.KeyFields`.
#[derive(FromPyObject)]
pub struct Fields {
    model: Vec<u32>,
    version: Vec<u32>,
    label: Vec<u32>,
    tags: Vec<u32>,
    task: String,
    queueing: u32,
}

impl From<Fields> for KeyFields {
    fn from(Fields { model, version, label, tags, task, queueing }: Fields) -> KeyFields {
        KeyFields { model, version, label, tags, task, queueing }
    }
}

/// Model, version, label, and whether the request may ask for a place in a queue.
pub fn to_python<'py>(py: Python<'py>, key: &Key<'_>) -> PyResult<Bound<'py, PyTuple>> {
    let model = match key.model {
        Model::Name(name) => PyString::new(py, name).into_any(),
        Model::TaskId(id) => PyInt::new(py, id).into_any(),
    };
    let version = match key.version {
        None => py.None().into_bound(py),
        Some(Version::Number(number)) => PyInt::new(py, number).into_any(),
        Some(Version::Text(text)) => PyString::new(py, text).into_any(),
    };
    let queueing = PyBool::new(py, key.queueing).to_owned().into_any();
    PyTuple::new(py, [model, version, PyString::new(py, key.label).into_any(), queueing])
}

/// The keys of one I/O thread: requests for one model share an object of Python.
#[derive(Default)]
pub struct Keys {
    made: HashMap<Vec<u8>, Py<PyAny>>,
    /// The bytes by which a key is looked up.
    bytes: Vec<u8>,
    /// The key of the last message: the next one is often for the same model.
    last: (Vec<u8>, Option<Py<PyAny>>),
}

impl Keys {
    /// The key of a message, made by `key_of(model, version, label, queueing)` where it is new; None where only the
    /// core can read it.
    pub fn find(
        &mut self,
        py: Python<'_>,
        fields: &KeyFields,
        message: &[u8],
        key_of: &Py<PyAny>,
    ) -> PyResult<Option<Py<PyAny>>> {
        let Some(key) = find_key(fields, message) else { return Ok(None) };
        write(&mut self.bytes, &key);
        if let (bytes, Some(made)) = &self.last
            && *bytes == self.bytes
        {
            return Ok(Some(made.clone_ref(py)));
        }
        let made = match self.made.get(&self.bytes) {
            Some(made) => made.clone_ref(py),
            None => self.make(py, &key, key_of)?,
        };
        self.last.0.clone_from(&self.bytes);
        self.last.1 = Some(made.clone_ref(py));
        Ok(Some(made))
    }

    fn make(&mut self, py: Python<'_>, key: &Key<'_>, key_of: &Py<PyAny>) -> PyResult<Py<PyAny>> {
        let made = key_of.call1(py, to_python(py, key)?)?;
        if self.made.len() >= MOST {
            self.made.clear();
        }
        self.made.insert(self.bytes.clone(), made.clone_ref(py));
        Ok(made)
    }
}

/// Different bytes for different keys.
fn write(bytes: &mut Vec<u8>, key: &Key<'_>) {
    bytes.clear();
    let mut part = |kind: u8, value: &[u8]| {
        bytes.push(kind);
        bytes.extend_from_slice(&value.len().to_le_bytes());
        bytes.extend_from_slice(value);
    };
    match key.model {
        Model::Name(name) => part(0, name.as_bytes()),
        Model::TaskId(id) => part(1, &id.to_le_bytes()),
    }
    match key.version {
        None => part(2, &[]),
        Some(Version::Number(number)) => part(3, &number.to_le_bytes()),
        Some(Version::Text(text)) => part(4, text.as_bytes()),
    }
    part(5, key.label.as_bytes());
    bytes.push(key.queueing.into());
}
