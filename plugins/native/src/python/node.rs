//! Nodes.

use super::convert::{frame_of, headers_of, value_error};
use super::exchange::Attempt;
use super::threads::{ClientTls, Threads};
use crate::attempt::{Ask, Cancel, Metadata};
use crate::events::Raised;
use crate::io::{Command, Common};
use crate::node::{NodeTls, Target};
use crate::tls;
use bytes::Bytes;
use dl_inference_grpc::{Charge, Frame};
use http::uri::{Authority, PathAndQuery};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A way to one node: of each I/O thread a connection of its own.
#[pyclass(frozen, subclass)]
pub struct Node {
    target: Arc<Target>,
    common: Arc<Common>,
}

impl Node {
    pub fn ask(&self, path: PathAndQuery, frame: Bytes, metadata: Metadata, timeout: Option<f64>) -> Ask {
        Ask { target: self.target.clone(), path, metadata, frame, timeout, cancel: Cancel::default() }
    }
}

#[pymethods]
impl Node {
    /// `tls` and the name that the node's certificate must have come together.
    #[new]
    #[pyo3(signature = (threads, address, message_bytes, tls))]
    fn new(
        threads: &Threads,
        address: &str,
        message_bytes: usize,
        tls: Option<(Bound<'_, ClientTls>, String)>,
    ) -> PyResult<Self> {
        let authority = if address.starts_with("unix:") { "localhost" } else { address };
        let with_name = |(tls, name): (Bound<'_, ClientTls>, String)| {
            let name = tls::server_name(&name).map_err(value_error)?;
            PyResult::Ok(NodeTls { config: tls.get().0.clone(), name })
        };
        let target = Target {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: address.to_owned(),
            authority: Authority::try_from(authority).map_err(value_error)?,
            message_bytes,
            tls: tls.map(with_name).transpose()?,
            closed: AtomicBool::new(false),
        };
        Ok(Node { target: Arc::new(target), common: threads.common().clone() })
    }

    /// `done(error, message, trailers)` is called on an I/O thread.
    #[pyo3(signature = (method, message, metadata, timeout_s, done))]
    fn begin_call(
        &self,
        py: Python<'_>,
        method: &str,
        message: &Bound<'_, PyAny>,
        metadata: &Bound<'_, PyAny>,
        timeout_s: Option<f64>,
        done: Py<PyAny>,
    ) -> PyResult<Attempt> {
        let frame: Frame = match frame_of(message, Charge::new(&self.common.budget)) {
            Ok(frame) => frame,
            Err(Raised::ByPython(error)) => return Err(error),
            Err(Raised::Failure(failure)) => {
                let error = super::convert::error(py, &self.common.helpers, &failure)?;
                return Err(PyErr::from_value(error.into_bound(py)));
            }
        };
        let path = PathAndQuery::try_from(method).map_err(value_error)?;
        let metadata = Metadata { of: None, own: Arc::new(headers_of(Some(metadata))?) };
        let ask = self.ask(path, frame.bytes().clone(), metadata, timeout_s);
        let attempt = Attempt(ask.cancel.clone());
        let sent =
            self.common.outboxes.first().is_some_and(|first| first.send(Command::Call { ask: Box::new(ask), done }));
        if sent { Ok(attempt) } else { Err(PyRuntimeError::new_err("the I/O threads have ended")) }
    }

    /// `done()` is called by each I/O thread once its connection is closed. Returns how many will.
    fn begin_close(&self, py: Python<'_>, done: &Bound<'_, PyAny>) -> usize {
        self.target.closed.store(true, Ordering::Release);
        let close = || Command::Close { target: self.target.clone(), done: done.clone().unbind().clone_ref(py) };
        self.common.outboxes.iter().filter(|outbox| outbox.send(close())).count()
    }
}
