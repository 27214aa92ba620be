//! Messages, metadata and errors, from Rust to Python and back.

use crate::events::Helpers;
use bytes::Bytes;
use dl_inference_grpc::{Charge, Failure, Frame, decode_binary, encode_binary, is_reserved};
use http::{HeaderMap, HeaderName, HeaderValue};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PyString, PyTuple};
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// From this size on, a message is a view of what was received; a smaller one is copied, which costs less.
const VIEWED: usize = 4096;

/// Bytes that were received, for a memoryview.
#[pyclass(frozen)]
struct Received(Bytes);

#[pymethods]
impl Received {
    /// SAFETY: the interpreter calls it with a view that it owns.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut pyo3::ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let bytes = &slf.get().0;
        let size = isize::try_from(bytes.len()).map_err(|_| PyBufferError::new_err("too large"))?;
        let data = bytes.as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: the view is read-only and keeps this object, whose bytes neither move nor change.
        match unsafe { pyo3::ffi::PyBuffer_FillInfo(view, slf.as_ptr(), data, size, 1, flags) } {
            0 => Ok(()),
            _ => Err(PyErr::take(slf.py()).unwrap_or_else(|| PyBufferError::new_err("there is no view"))),
        }
    }
}

pub fn message(py: Python<'_>, bytes: Bytes) -> PyResult<Py<PyAny>> {
    if bytes.len() < VIEWED {
        return Ok(PyBytes::new(py, &bytes).into_any().unbind());
    }
    let received = Bound::new(py, Received(bytes))?;
    Ok(PyMemoryView::from(&received)?.into_any().unbind())
}

/// A frame of the message that Python gave.
pub fn frame_of<E: From<Failure> + From<PyErr>>(message: &Bound<'_, PyAny>, charge: Charge) -> Result<Frame, E> {
    if let Ok(bytes) = message.cast::<PyBytes>() {
        let bytes = bytes.as_bytes();
        return Frame::build(bytes.len(), charge, |place| {
            place.copy_from_slice(bytes);
            Ok(())
        });
    }
    let buffer = PyBuffer::<u8>::get(message)?;
    Frame::build(buffer.item_count(), charge, |place| Ok(buffer.copy_to_slice(message.py(), place)?))
}

/// Metadata as Python has it: in order, without what is the protocol's own.
pub fn metadata(py: Python<'_>, headers: &HeaderMap, are_trailers: bool) -> PyResult<Py<PyTuple>> {
    let mut pairs = vec![];
    for (name, value) in headers {
        let name = name.as_str();
        if is_reserved(name, are_trailers) {
            continue;
        }
        if name.ends_with("-bin") {
            for value in decode_binary(value.as_bytes()) {
                pairs.push((name, PyBytes::new(py, &value).into_any()));
            }
        } else {
            pairs.push((name, text(py, value).into_any()));
        }
    }
    Ok(PyTuple::new(py, pairs)?.unbind())
}

/// The first value under `key`, as in `metadata`.
pub fn first_value(py: Python<'_>, headers: &HeaderMap, key: &str) -> PyResult<Option<Py<PyAny>>> {
    let Some(value) = headers.get(key).filter(|_| !is_reserved(key, false)) else { return Ok(None) };
    if key.ends_with("-bin") {
        let value = decode_binary(value.as_bytes()).next();
        return Ok(value.map(|value| PyBytes::new(py, &value).into_any().unbind()));
    }
    Ok(Some(text(py, value).into_any().unbind()))
}

fn text<'py>(py: Python<'py>, value: &HeaderValue) -> Bound<'py, PyString> {
    latin1(py, value.as_bytes())
}

/// Latin-1 passes bytes beyond ASCII on unchanged.
pub fn latin1<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyString> {
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    PyString::new(py, &text)
}

/// The bytes of such text; ValueError where it is more than Latin-1.
pub fn header_value(value: &Bound<'_, PyString>) -> PyResult<HeaderValue> {
    let bytes: Result<Vec<u8>, _> = value.to_str()?.chars().map(u8::try_from).collect();
    HeaderValue::from_bytes(&bytes.map_err(value_error)?).map_err(value_error)
}

thread_local! {
    /// Metadata of this thread's last attempt, and its headers.
    static LAST: RefCell<Option<(Py<PyTuple>, Arc<HeaderMap>)>> = const { RefCell::new(None) };
}

/// As `headers_of`. A gateway often gives the very same object for request after request.
pub fn headers_of_attempt(metadata: Option<&Bound<'_, PyAny>>) -> PyResult<Arc<HeaderMap>> {
    let Some(tuple) = metadata.and_then(|metadata| metadata.cast_exact::<PyTuple>().ok()) else {
        return headers_of(metadata).map(Arc::new);
    };
    let last = LAST.with_borrow(|last| match last {
        Some((known, headers)) if known.is(tuple) => Some(headers.clone()),
        _ => None,
    });
    if let Some(headers) = last {
        return Ok(headers);
    }
    let headers = Arc::new(headers_of(metadata)?);
    if never_changes(tuple) {
        drop(LAST.replace(Some((tuple.clone().unbind(), headers.clone()))));
    }
    Ok(headers)
}

/// Whether all of its items are tuples too. Of strings and bytes they are, or `headers_of` would have refused them.
fn never_changes(tuple: &Bound<'_, PyTuple>) -> bool {
    tuple.iter_borrowed().all(|pair| pair.is_exact_instance_of::<PyTuple>())
}

/// Raises ValueError where HTTP/2 has no such header.
pub fn headers_of(metadata: Option<&Bound<'_, PyAny>>) -> PyResult<HeaderMap> {
    let mut headers = HeaderMap::new();
    let Some(metadata) = metadata else { return Ok(headers) };
    for pair in metadata.try_iter()? {
        let (name, value): (Bound<'_, PyString>, Bound<'_, PyAny>) = pair?.extract()?;
        let name = HeaderName::from_bytes(name.to_str()?.as_bytes()).map_err(value_error)?;
        let value = if name.as_str().ends_with("-bin") {
            encode_binary(value.cast::<PyBytes>()?.as_bytes())
        } else {
            header_value(value.cast::<PyString>()?)?
        };
        headers.try_append(name, value).map_err(value_error)?;
    }
    Ok(headers)
}

pub fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

pub fn error(py: Python<'_>, helpers: &Helpers, failure: &Failure) -> PyResult<Py<PyAny>> {
    let trailers = metadata(py, &failure.trailers, true)?;
    helpers.error_of.call1(py, (failure.code.0, &failure.message, trailers))
}
