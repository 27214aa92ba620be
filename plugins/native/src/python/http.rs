//! Exchanges of HTTP.

use super::convert::{frame_of, header_value, latin1, value_error};
use super::exchange::{Place, kept};
use crate::events::Raised;
use crate::http::HttpShared;
use crate::http_body::Body;
use crate::io::{Command, Common, Io, Outbox};
use dl_inference_grpc::Charge;
use http::header::HOST;
use http::{HeaderMap, HeaderName, Response, StatusCode, Version};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use std::sync::{Arc, Mutex};

/// One request of a client's.
#[pyclass(frozen)]
pub struct HttpExchange {
    shared: Arc<HttpShared>,
    outbox: Outbox,
    common: Arc<Common>,
    body: Py<PyBytes>,
    /// Of the body.
    _charge: Charge,
    deadline: Option<f64>,
    headers: Place,
}

impl HttpExchange {
    /// Of a request that has come to this I/O thread; without a body where it has not come whole.
    pub fn new(py: Python<'_>, io: &Io, shared: Arc<HttpShared>, body: Option<Body>, deadline: Option<f64>) -> Self {
        let Body { bytes, charge } = body.unwrap_or_else(|| Body { bytes: bytes::Bytes::new(), charge: io.charge() });
        HttpExchange {
            shared,
            outbox: io.outbox.clone(),
            common: io.common.clone(),
            body: PyBytes::new(py, &bytes).unbind(),
            _charge: charge,
            deadline,
            headers: Mutex::default(),
        }
    }

    /// The headers in order. HTTP/2 and requests to proxies have the host in the target.
    fn fields(&self) -> impl Iterator<Item = (&HeaderName, &[u8])> {
        let host = self.shared.head.uri.authority().map(|authority| (&HOST, authority.as_str().as_bytes()));
        let others = self.shared.head.headers.iter().map(|(name, value)| (name, value.as_bytes()));
        let has_host = host.is_some();
        host.into_iter().chain(others.filter(move |(name, _)| !has_host || **name != HOST))
    }
}

#[pymethods]
impl HttpExchange {
    #[getter]
    fn verb(&self) -> &str {
        self.shared.head.method.as_str()
    }

    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        latin1(py, self.shared.head.uri.path().as_bytes())
    }

    #[getter]
    fn query<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        latin1(py, self.shared.head.uri.query().unwrap_or_default().as_bytes())
    }

    /// "1.0", "1.1" or "2".
    #[getter]
    fn version(&self) -> &'static str {
        match self.shared.head.version {
            Version::HTTP_2 => "2",
            Version::HTTP_10 => "1.0",
            _ => "1.1",
        }
    }

    #[getter]
    fn body(&self) -> &Py<PyBytes> {
        &self.body
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.deadline
    }

    /// Of each name the first value.
    #[getter]
    fn headers(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        kept(py, &self.headers, || {
            let headers = PyDict::new(py);
            for (name, value) in self.fields() {
                if !headers.contains(name.as_str())? {
                    headers.set_item(name.as_str(), latin1(py, value))?;
                }
            }
            Ok(headers.into_any().unbind())
        })
    }

    /// All headers, as ASGI has them.
    #[getter]
    fn raw_headers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let bytes = |text| PyBytes::new(py, text);
        PyList::new(
            py,
            self.fields().map(|(name, value)| (bytes(name.as_str().as_bytes()), bytes(value))).collect::<Vec<_>>(),
        )
    }

    /// Raises ValueError where HTTP has no such status or header.
    fn reply(&self, status: u16, headers: &Bound<'_, PyAny>, body: &Bound<'_, PyAny>) -> PyResult<()> {
        let status = StatusCode::from_u16(status).map_err(value_error)?;
        let mut all = HeaderMap::new();
        for pair in headers.call_method0("items")?.try_iter()? {
            let (name, value): (Bound<'_, PyString>, Bound<'_, PyString>) = pair?.extract()?;
            let name = HeaderName::from_bytes(name.to_str()?.as_bytes()).map_err(value_error)?;
            all.try_append(name, header_value(&value)?).map_err(value_error)?;
        }
        let frame = match frame_of(body, Charge::new(&self.common.budget)) {
            Ok(frame) => frame,
            Err(Raised::Failure(failure)) => return Err(value_error(failure.message)),
            Err(Raised::ByPython(error)) => return Err(error),
        };
        let mut answer = Response::new(Some(frame));
        *answer.status_mut() = status;
        *answer.headers_mut() = all;
        self.outbox.send(Command::EndHttp(self.shared.id, Box::new(answer)));
        Ok(())
    }

    fn on_cancel(&self, callback: Py<PyAny>) {
        self.outbox.send(Command::OnHttpCancel(self.shared.clone(), callback));
    }
}
