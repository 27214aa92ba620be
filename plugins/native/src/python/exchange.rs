//! Exchanges and attempts.

use super::convert::{first_value, frame_of, headers_of, headers_of_attempt, message, metadata, value_error};
use super::{Node, locked};
use crate::attempt::{Cancel, Extras, Forward, Metadata};
use crate::call::{Call, End, Shared};
use crate::events::Raised;
use crate::io::{Command, Common, Io, Outbox};
use crate::stream::MOST_UNSENT;
use blake2::digest::consts::U16;
use blake2::{Blake2b, Digest};
use dl_inference_grpc::{Charge, Code, Failure, Frame};
use http::uri::PathAndQuery;
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

pub type Place = Mutex<Option<Py<PyAny>>>;

/// One call of a client's.
#[pyclass(frozen)]
pub struct Exchange {
    shared: Arc<Shared>,
    outbox: Outbox,
    common: Arc<Common>,
    // Members are read without a call of Rust, which takes 50 ns.
    #[pyo3(get)]
    method: Py<PyString>,
    /// A float or None.
    #[pyo3(get)]
    deadline: Py<PyAny>,
    /// A `RoutingKey` or None.
    #[pyo3(get)]
    key: Py<PyAny>,
    message: Place,
    metadata: Place,
    /// Whether the service has replaced the metadata.
    has_new_metadata: AtomicBool,
    state: Place,
}

impl Exchange {
    /// The exchange of a call that has come to this I/O thread.
    pub fn new(py: Python<'_>, call: &Call, io: &Io, deadline: Option<f64>) -> PyResult<Exchange> {
        let method = &call.shared.method;
        let find = |fields| {
            let key_of = &io.common.helpers.key_of;
            io.keys.borrow_mut().find(py, fields, &call.shared.frame.message(), key_of)
        };
        let key = method.key.as_ref().map(find).transpose()?.flatten();
        Ok(Exchange {
            key: key.unwrap_or_else(|| py.None()),
            shared: call.shared.clone(),
            outbox: io.outbox.clone(),
            common: io.common.clone(),
            method: method.path.clone_ref(py),
            deadline: deadline.into_pyobject(py)?.unbind(),
            message: Mutex::default(),
            metadata: Mutex::default(),
            has_new_metadata: AtomicBool::new(false),
            state: Mutex::default(),
        })
    }

    fn charge(&self) -> Charge {
        Charge::new(&self.common.budget)
    }

    /// The end that an answer is; what is too large for a frame is a failure.
    fn end_of(&self, message: &Bound<'_, PyAny>, trailers: Option<&Bound<'_, PyAny>>) -> PyResult<End> {
        Ok(match frame_of(message, self.charge()) {
            Ok(frame) => End::Ok { frame: Some(frame), trailers: headers_of(trailers)? },
            Err(Raised::Failure(failure)) => End::Failed(failure),
            Err(Raised::ByPython(error)) => return Err(error),
        })
    }

    fn send_command(&self, command: Command) {
        // False: the thread has ended, and the exchange with it.
        let _ = match self.shared.method.streams {
            true => self.outbox.send_in_order(command), // another thread's message comes before this one's end
            false => self.outbox.send(command),
        };
    }

    /// The metadata for a node: the client's, with `added` in the place of entries with the same keys.
    fn metadata_with(&self, py: Python<'_>, added: Option<&Bound<'_, PyAny>>) -> PyResult<Metadata> {
        let added = headers_of_attempt(added)?;
        if !self.has_new_metadata.load(Ordering::Acquire) {
            return Ok(Metadata { of: Some(self.shared.clone()), own: added });
        }
        let mut headers = headers_of(Some(self.metadata(py)?.bind(py)))?;
        for name in added.keys() {
            headers.remove(name);
        }
        headers.extend(added.as_ref().clone());
        Ok(Metadata { of: None, own: Arc::new(headers) })
    }

    fn must_stream(&self, py: Python<'_>, instead: &str) -> PyResult<()> {
        if self.shared.method.streams {
            return Ok(());
        }
        Err(PyTypeError::new_err(format!("{} is unary: {instead}", self.method.bind(py))))
    }
}

/// Returns the object kept in `place`; calls `make` and keeps its object where `place` is empty.
pub fn kept(py: Python<'_>, place: &Place, make: impl FnOnce() -> PyResult<Py<PyAny>>) -> PyResult<Py<PyAny>> {
    if let Some(value) = &*locked(place) {
        return Ok(value.clone_ref(py));
    }
    let value = make()?;
    replace(place, Some(value.clone_ref(py)));
    Ok(value)
}

pub fn replace(place: &Place, value: Option<Py<PyAny>>) {
    let before = std::mem::replace(&mut *locked(place), value);
    drop(before); // may run Python, so not under the lock
}

#[pymethods]
impl Exchange {
    /// Answers `(exchange, message, trailers)`s: one command for each I/O thread.
    #[staticmethod]
    fn reply_all(replies: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut by_thread: Vec<(Outbox, Vec<(u64, End)>)> = vec![];
        for reply in replies.try_iter()? {
            let reply = reply?;
            let reply = reply.cast::<PyTuple>()?;
            let exchange = reply.get_borrowed_item(0)?;
            let exchange = exchange.cast::<Exchange>()?.get();
            let trailers = reply.get_borrowed_item(2)?;
            let end = (exchange.shared.id, exchange.end_of(&*reply.get_borrowed_item(1)?, Some(&*trailers))?);
            match by_thread.iter_mut().find(|(outbox, _)| outbox.is(&exchange.outbox)) {
                Some((_, ends)) => ends.push(end),
                None => by_thread.push((exchange.outbox.clone(), vec![end])),
            }
        }
        for (outbox, ends) in by_thread {
            outbox.send(Command::EndAll(ends));
        }
        Ok(())
    }

    /// Becomes an object of Python when it is asked for; a message that is only forwarded never does.
    #[getter]
    fn message(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        kept(py, &self.message, || message(py, self.shared.frame.message()))
    }

    #[getter]
    fn metadata(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        kept(py, &self.metadata, || Ok(metadata(py, &self.shared.headers, false)?.into_any()))
    }

    #[setter]
    fn set_metadata(&self, value: Py<PyAny>) {
        replace(&self.metadata, Some(value));
        self.has_new_metadata.store(true, Ordering::Release);
    }

    fn find_metadata(&self, py: Python<'_>, key: &str) -> PyResult<Option<Py<PyAny>>> {
        if !self.has_new_metadata.load(Ordering::Acquire) {
            let headers = self.shared.has_metadata.then_some(&self.shared.headers);
            return headers.map_or(Ok(None), |headers| first_value(py, headers, key));
        }
        for pair in self.metadata(py)?.bind(py).try_iter()? {
            let (name, value): (Bound<'_, PyString>, Bound<'_, PyAny>) = pair?.extract()?;
            if name.to_str()? == key {
                return Ok(Some(value.unbind()));
            }
        }
        Ok(None)
    }

    /// Without the interpreter.
    fn hash_message<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let message = self.shared.frame.message();
        let digest = py.detach(|| Blake2b::<U16>::digest(&message));
        PyBytes::new(py, &digest)
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        locked(&self.state).as_ref().map(|state| state.clone_ref(py))
    }

    #[setter]
    fn set_state(&self, value: Option<Py<PyAny>>) {
        replace(&self.state, value);
    }

    /// What the service keeps may lead back here.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.state.try_lock() {
            Ok(state) => visit.call(&*state),
            Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        replace(&self.state, None);
    }

    #[pyo3(signature = (message, trailers=None))]
    fn reply(&self, message: &Bound<'_, PyAny>, trailers: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.send_command(Command::End(self.shared.id, self.end_of(message, trailers)?));
        Ok(())
    }

    fn fail(&self, py: Python<'_>, error: Py<PyAny>) -> PyResult<()> {
        let (code, message, trailers): (u16, String, Py<PyAny>) =
            self.common.helpers.status_of.call1(py, (error,))?.extract(py)?;
        let trailers = headers_of(Some(trailers.bind(py)))?;
        let failure = Failure { trailers, ..Failure::new(Code(code), message) };
        self.send_command(Command::End(self.shared.id, End::Failed(failure)));
        Ok(())
    }

    fn on_cancel(&self, callback: Py<PyAny>) {
        self.send_command(Command::OnCancel(self.shared.clone(), callback));
    }

    #[pyo3(signature = (connection, method, done, context=None, *, timeout_s=None, metadata=None, allow_empty=false, extras=None))]
    #[allow(clippy::too_many_arguments)] // the seam's
    fn forward(
        &self,
        py: Python<'_>,
        connection: &Bound<'_, Node>,
        method: &str,
        done: Py<PyAny>,
        context: Option<Py<PyAny>>,
        timeout_s: Option<f64>,
        metadata: Option<&Bound<'_, PyAny>>,
        allow_empty: bool,
        extras: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Attempt> {
        if self.shared.method.streams {
            let said = format!("{method}: only unary exchanges of a transport's server are forwarded");
            return Err(PyTypeError::new_err(said));
        }
        let metadata = self.metadata_with(py, metadata)?;
        let path = self
            .shared
            .method
            .path_if(method)
            .map_or_else(|| PathAndQuery::try_from(method).map_err(value_error), Ok)?;
        let ask = connection.get().ask(path, self.shared.frame.bytes().clone(), metadata, timeout_s);
        let attempt = Attempt(ask.cancel.clone());
        let context = context.unwrap_or_else(|| py.None());
        let extras = extras.map(|extras| extras_of(py, extras)).transpose()?.map(Arc::new);
        let forward = Forward { exchange: self.shared.clone(), ask, done, context, allow_empty, extras };
        self.send_command(Command::Forward(Box::new(forward)));
        Ok(attempt)
    }

    fn on_message(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.must_stream(py, "its only message is `message`")?;
        self.send_command(Command::OnMessage(self.shared.id, callback));
        Ok(())
    }

    fn send(&self, message: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.must_stream(message.py(), "`reply` gives its only answer")?;
        let frame: Frame = match frame_of(message, self.charge()) {
            Ok(frame) => frame,
            Err(Raised::Failure(failure)) => {
                self.send_command(Command::End(self.shared.id, End::Failed(failure)));
                return Ok(true);
            }
            Err(Raised::ByPython(error)) => return Err(error),
        };
        let size = frame.size();
        let unsent = self.shared.unsent.fetch_add(size, Ordering::AcqRel) + size;
        self.send_command(Command::Send(self.shared.id, frame));
        Ok(unsent < MOST_UNSENT)
    }

    fn on_writable(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.must_stream(py, "`reply` gives its only answer")?;
        self.send_command(Command::OnWritable(self.shared.id, callback));
        Ok(())
    }

    #[pyo3(signature = (trailers=None))]
    fn finish(&self, py: Python<'_>, trailers: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.must_stream(py, "`reply` gives its only answer")?;
        let end = End::Ok { frame: None, trailers: headers_of(trailers)? };
        self.send_command(Command::End(self.shared.id, end));
        Ok(())
    }
}

fn extras_of(py: Python<'_>, extras: &Bound<'_, PyAny>) -> PyResult<Extras> {
    let given = |name: &str| -> PyResult<Option<Py<PyAny>>> {
        let value = extras.getattr(name)?;
        Ok((!value.is_none()).then(|| value.unbind()))
    };
    let offer = given("sink")?.map(|sink| sink.getattr(py, "offer")).transpose()?;
    Ok(Extras { change_request: given("change_request")?, change_answer: given("change_answer")?, offer })
}

/// One message on its way to one node.
#[pyclass(frozen)]
pub struct Attempt(pub Cancel);

#[pymethods]
impl Attempt {
    fn cancel(&self) {
        self.0.cancel();
    }
}
