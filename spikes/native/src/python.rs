//! What Python sees. Every method may be called on any thread; none waits for an I/O thread.

use crate::client::{Ask, Cancel, Target};
use crate::grpc::{self, Failure};
use crate::io::{self, Answer, Command, Extras, Forward, Helpers, Outbox, Timed, here_or_first};
use crate::server::{Call, Service, Shared};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PyString, PyTuple};
use std::collections::{HashMap, HashSet};
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// From this size on, a message is a view of what was received; a smaller one is copied, which costs less.
const VIEWED: usize = 4096;

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Only for exchanging what is in it: nobody attaches, waits or runs Python while he holds it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An I/O thread that has ended takes nothing; what it is asked for has no effect then.
fn send(outbox: &Outbox, command: Command) {
    let _ = outbox.send(command);
}

// Messages

/// Bytes that Rust received, for a memoryview.
#[pyclass(frozen)]
struct Received(Bytes);

#[pymethods]
impl Received {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut pyo3::ffi::Py_buffer, flags: i32) -> PyResult<()> {
        let bytes = &slf.get().0;
        let (data, size) = (bytes.as_ptr() as *mut std::ffi::c_void, bytes.len() as isize);
        // Safety: the view keeps this object, whose bytes neither move nor change.
        match unsafe { pyo3::ffi::PyBuffer_FillInfo(view, slf.as_ptr(), data, size, 1, flags) } {
            0 => Ok(()),
            _ => Err(PyErr::take(slf.py()).unwrap_or_else(|| PyBufferError::new_err("no view"))),
        }
    }
}

/// The message of a frame.
pub fn message(py: Python<'_>, frame: &Bytes) -> PyResult<Py<PyAny>> {
    if frame.len() < VIEWED {
        return Ok(PyBytes::new(py, &frame[grpc::PREFIX..]).into_any().unbind());
    }
    let received = Bound::new(py, Received(frame.slice(grpc::PREFIX..)))?;
    Ok(PyMemoryView::from(&received)?.into_any().unbind())
}

/// A frame of the message that Python gave.
pub fn frame_of(message: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    if let Ok(bytes) = message.cast::<PyBytes>() {
        return Ok(grpc::frame(bytes.as_bytes()));
    }
    Ok(grpc::frame(&PyBuffer::<u8>::get(message)?.to_vec(message.py())?))
}

// Metadata

/// Metadata as Python has it: in order, without what is the protocol's own.
pub fn metadata(py: Python<'_>, headers: &HeaderMap) -> PyResult<Py<PyTuple>> {
    let mut pairs = Vec::with_capacity(headers.len());
    for (name, value) in headers {
        let name = name.as_str();
        if grpc::is_reserved(name) {
            continue;
        }
        if !name.ends_with("-bin") {
            // Latin-1 passes bytes beyond ASCII on unchanged.
            let text: String = value.as_bytes().iter().map(|byte| char::from(*byte)).collect();
            pairs.push((name, PyString::new(py, &text).into_any()));
            continue;
        }
        for part in value.as_bytes().split(|byte| *byte == b',') {
            let end = part.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
            let value = STANDARD_NO_PAD.decode(part[..end].trim_ascii()).unwrap_or_default();
            pairs.push((name, PyBytes::new(py, &value).into_any()));
        }
    }
    Ok(PyTuple::new(py, pairs)?.unbind())
}

/// Raises ValueError where HTTP/2 has no such header.
fn headers_of(metadata: Option<&Bound<'_, PyAny>>) -> PyResult<HeaderMap> {
    let mut headers = HeaderMap::new();
    let Some(metadata) = metadata else { return Ok(headers) };
    for pair in metadata.try_iter()? {
        let (name, value): (Bound<'_, PyString>, Bound<'_, PyAny>) = pair?.extract()?;
        let name = HeaderName::from_bytes(name.to_str()?.as_bytes()).map_err(no_header)?;
        let value = if name.as_str().ends_with("-bin") {
            let bytes = value.cast::<PyBytes>()?;
            HeaderValue::from_bytes(STANDARD.encode(bytes.as_bytes()).as_bytes())
        } else {
            let text = value.cast::<PyString>()?.to_str()?;
            let bytes: Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
            HeaderValue::from_bytes(&bytes.map_err(no_header)?)
        };
        headers.append(name, value.map_err(no_header)?);
    }
    Ok(headers)
}

fn no_header(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("{error}"))
}

pub fn error(py: Python<'_>, helpers: &Helpers, failure: &Failure) -> PyResult<Py<PyAny>> {
    helpers.error_of.call1(py, (failure.code, &failure.message, metadata(py, &failure.trailers)?))
}

// Exchanges

/// One call of a client's.
#[pyclass(frozen)]
pub struct Exchange {
    shared: Arc<Shared>,
    outbox: Outbox,
    helpers: Arc<Helpers>,
    method: Py<PyString>,
    deadline: Option<f64>,
    message: Mutex<Option<Py<PyAny>>>,
    metadata: Mutex<Option<Py<PyAny>>>,
    state: Mutex<Option<Py<PyAny>>>,
}

impl Exchange {
    /// The exchange of a call that has come to this I/O thread.
    pub fn new(py: Python<'_>, call: &Call, outbox: &Outbox, helpers: &Arc<Helpers>) -> PyResult<Py<Exchange>> {
        let method = &call.server.service.methods[&call.shared.path];
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        let exchange = Exchange {
            shared: call.shared.clone(),
            outbox: outbox.clone(),
            helpers: helpers.clone(),
            method: method.clone_ref(py),
            deadline: match call.deadline {
                // Python's own clock, whose zero Rust's hides.
                Some(deadline) => Some(helpers.now.call0(py)?.extract::<f64>(py)? + left(deadline)),
                None => None,
            },
            message: Mutex::default(),
            metadata: Mutex::default(),
            state: Mutex::default(),
        };
        Py::new(py, exchange)
    }
}

/// Returns the object kept in `place`; calls `make` and keeps its object where `place` is empty.
fn kept(
    py: Python<'_>,
    place: &Mutex<Option<Py<PyAny>>>,
    make: impl FnOnce() -> PyResult<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    if let Some(value) = &*locked(place) {
        return Ok(value.clone_ref(py));
    }
    let value = make()?;
    let before = locked(place).replace(value.clone_ref(py));
    drop(before); // another thread was quicker
    Ok(value)
}

fn replaced(place: &Mutex<Option<Py<PyAny>>>, value: Option<Py<PyAny>>) {
    let before = std::mem::replace(&mut *locked(place), value);
    drop(before); // may run Python, so not under the lock
}

#[pymethods]
impl Exchange {
    /// Answers `(exchange, message, trailers)`s: one command for each I/O thread.
    #[staticmethod]
    fn reply_all(replies: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut by_thread: Vec<(Outbox, Vec<(u64, Answer)>)> = vec![];
        for reply in replies.try_iter()? {
            let reply = reply?;
            let reply = reply.cast::<PyTuple>()?;
            let exchange = reply.get_borrowed_item(0)?;
            let exchange = exchange.cast::<Exchange>()?.get();
            let trailers = reply.get_borrowed_item(2)?;
            let answer = Answer::Ok { frame: frame_of(&reply.get_item(1)?)?, trailers: headers_of(Some(&*trailers))? };
            let answer = (exchange.shared.id, answer);
            match by_thread.iter_mut().find(|(outbox, _)| outbox.same_channel(&exchange.outbox)) {
                Some((_, answers)) => answers.push(answer),
                None => by_thread.push((exchange.outbox.clone(), vec![answer])),
            }
        }
        for (outbox, answers) in by_thread {
            send(&outbox, Command::Answers(answers));
        }
        Ok(())
    }

    #[getter]
    fn method(&self) -> &Py<PyString> {
        &self.method
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.deadline
    }

    /// Becomes an object of Python when it is asked for; a message that is only forwarded never does.
    #[getter]
    fn message(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        kept(py, &self.message, || message(py, &self.shared.frame))
    }

    #[getter]
    fn metadata(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        kept(py, &self.metadata, || Ok(metadata(py, &self.shared.headers)?.into_any()))
    }

    #[setter]
    fn set_metadata(&self, value: Py<PyAny>) {
        replaced(&self.metadata, Some(value));
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        locked(&self.state).as_ref().map(|state| state.clone_ref(py))
    }

    #[setter]
    fn set_state(&self, value: Option<Py<PyAny>>) {
        replaced(&self.state, value);
    }

    /// What the service keeps may lead back here.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.state.try_lock() {
            Ok(state) => visit.call(&*state),
            Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        replaced(&self.state, None);
    }

    #[pyo3(signature = (message, trailers=None))]
    fn reply(&self, message: &Bound<'_, PyAny>, trailers: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let answer = Answer::Ok { frame: frame_of(message)?, trailers: headers_of(trailers)? };
        send(&self.outbox, Command::Answer(self.shared.id, answer));
        Ok(())
    }

    fn fail(&self, py: Python<'_>, error: Py<PyAny>) -> PyResult<()> {
        let (code, message, trailers): (u16, String, Py<PyAny>) =
            self.helpers.status_of.call1(py, (error,))?.extract(py)?;
        let failure = Failure { code, message, trailers: headers_of(Some(trailers.bind(py)))? };
        send(&self.outbox, Command::Answer(self.shared.id, Answer::Failed(failure)));
        Ok(())
    }

    fn on_cancel(&self, callback: Py<PyAny>) {
        send(&self.outbox, Command::OnCancel(self.shared.clone(), callback));
    }

    #[pyo3(signature = (connection, method, done, *, timeout_s=None, metadata=None, extras=None))]
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        connection: &Bound<'_, Node>,
        method: &str,
        done: Py<PyAny>,
        timeout_s: Option<f64>,
        metadata: Option<&Bound<'_, PyAny>>,
        extras: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Attempt> {
        let ask = connection.get().ask(method, self.shared.frame.clone(), metadata, timeout_s)?;
        let attempt = Attempt(ask.cancel.clone());
        let extras = extras.map(|extras| extras_of(py, extras)).transpose()?.map(Box::new);
        let forward = Forward { exchange: self.shared.clone(), ask, done, extras };
        send(&self.outbox, Command::Forward(Box::new(forward)));
        Ok(attempt)
    }

    fn on_message(&self, _callback: Py<PyAny>) -> PyResult<()> {
        no_streams()
    }

    fn send(&self, _message: Py<PyAny>) -> PyResult<bool> {
        no_streams()
    }

    fn on_writable(&self, _callback: Py<PyAny>) -> PyResult<()> {
        no_streams()
    }

    #[pyo3(signature = (_trailers=None))]
    fn finish(&self, _trailers: Option<Py<PyAny>>) -> PyResult<()> {
        no_streams()
    }
}

fn no_streams<T>() -> PyResult<T> {
    Err(PyNotImplementedError::new_err("this spike has no streams"))
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
struct Attempt(Cancel);

#[pymethods]
impl Attempt {
    fn cancel(&self) {
        self.0.cancel();
    }
}

/// A function that is to be called later.
#[pyclass(frozen)]
struct Timer(Timed);

#[pymethods]
impl Timer {
    fn cancel(&self) {
        replaced(&self.0, None);
    }
}

// The threads, servers and nodes

/// The I/O threads of one transport.
#[pyclass(frozen, weakref)]
struct Threads {
    outboxes: Vec<Outbox>,
    running: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

#[pymethods]
impl Threads {
    #[new]
    fn new(
        count: usize,
        error_of: Py<PyAny>,
        status_of: Py<PyAny>,
        raised: Py<PyAny>,
        codes: Vec<Py<PyAny>>,
        now: Py<PyAny>,
    ) -> PyResult<Self> {
        let helpers = Arc::new(Helpers { error_of, status_of, raised, codes, now });
        let (mut outboxes, mut running) = (vec![], vec![]);
        for index in 0..count {
            let (outbox, thread) = io::start(index, helpers.clone())?;
            outboxes.push(outbox);
            running.push(thread);
        }
        Ok(Threads { outboxes, running: Mutex::new(running) })
    }

    /// Each listening socket that it is given is this server's from now on. Every I/O thread takes connections of it.
    #[allow(clippy::too_many_arguments)]
    fn serve(
        &self,
        py: Python<'_>,
        service: &Bound<'_, PyAny>,
        sockets: Vec<RawFd>,
        message_bytes: usize,
        connections: usize,
        streams: u32,
    ) -> PyResult<u64> {
        // Safety: Python has detached them from its own objects.
        let listeners: Vec<_> =
            sockets.into_iter().map(|fd| unsafe { std::net::TcpListener::from_raw_fd(fd) }).collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (mut methods, mut streaming) = (HashMap::new(), HashSet::new());
        for item in service.getattr("methods")?.call_method0("items")?.try_iter()? {
            let (path, method): (String, Bound<'_, PyAny>) = item?.extract()?;
            if method.getattr("streaming")?.is_truthy()? {
                streaming.insert(path);
            } else {
                let interned = PyString::intern(py, &path).unbind();
                methods.insert(path, interned);
            }
        }
        let private_trailers = service
            .getattr("private_trailers")?
            .try_iter()?
            .map(|name| name?.extract())
            .collect::<PyResult<HashSet<String>>>()?;
        let service = Arc::new(Service {
            begin_all: service.getattr("begin_all")?.unbind(),
            ended: service.getattr("ended")?.unbind(),
            methods,
            streaming,
            private_trailers,
            message_bytes,
            connections,
            streams,
            connected: AtomicUsize::new(0),
        });
        for listener in &listeners {
            for outbox in &self.outboxes {
                let listener = listener.try_clone()?;
                send(outbox, Command::Serve { id, service: service.clone(), listener });
            }
        }
        Ok(id)
    }

    /// Drains a server; each I/O thread calls `done` when it has ended its part. Returns how many there are.
    fn drain(&self, py: Python<'_>, id: u64, grace_s: f64, done: &Bound<'_, PyAny>) -> usize {
        let grace = Duration::try_from_secs_f64(grace_s).unwrap_or(Duration::MAX).min(Duration::from_secs(86_400));
        for outbox in &self.outboxes {
            send(outbox, Command::Drain { id, grace, done: done.clone().unbind().clone_ref(py) });
        }
        self.outboxes.len()
    }

    fn call_later(&self, seconds: f64, function: Py<PyAny>) -> Timer {
        let timed: Timed = Arc::new(Mutex::new(Some(function)));
        let after = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::from_secs(86_400));
        send(&here_or_first(&self.outboxes), Command::Timer(Instant::now() + after, timed.clone()));
        Timer(timed)
    }

    /// Ends the threads; with `wait`, once this returns they have ended. The interpreter is free meanwhile.
    fn stop(&self, py: Python<'_>, wait: bool) {
        for outbox in &self.outboxes {
            send(outbox, Command::Stop);
        }
        let running = std::mem::take(&mut *locked(&self.running));
        if wait {
            py.detach(|| running.into_iter().for_each(|thread| drop(thread.join())));
        }
    }
}

/// A way to one node: of each I/O thread a connection of its own.
#[pyclass(frozen, subclass)]
struct Node {
    target: Arc<Target>,
    outboxes: Vec<Outbox>,
}

impl Node {
    fn ask(
        &self,
        path: &str,
        frame: Bytes,
        metadata: Option<&Bound<'_, PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<Ask> {
        Ok(Ask {
            target: self.target.clone(),
            path: PathAndQuery::try_from(path).map_err(no_header)?,
            metadata: headers_of(metadata)?,
            frame,
            timeout,
            cancel: Cancel::default(),
        })
    }
}

#[pymethods]
impl Node {
    #[new]
    fn new(threads: &Threads, address: &str, message_bytes: usize) -> PyResult<Self> {
        let target = Target {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: address.to_owned(),
            authority: Authority::try_from(address).map_err(no_header)?,
            message_bytes,
            closed: AtomicBool::new(false),
        };
        Ok(Node { target: Arc::new(target), outboxes: threads.outboxes.clone() })
    }

    /// `done(error, message, trailers)` is called on an I/O thread.
    #[pyo3(signature = (method, message, metadata, timeout_s, done))]
    fn begin_call(
        &self,
        method: &str,
        message: &Bound<'_, PyAny>,
        metadata: &Bound<'_, PyAny>,
        timeout_s: Option<f64>,
        done: Py<PyAny>,
    ) -> PyResult<Attempt> {
        let ask = self.ask(method, frame_of(message)?, Some(metadata), timeout_s)?;
        let attempt = Attempt(ask.cancel.clone());
        if self.outboxes[0].send(Command::Call { ask: Box::new(ask), done }).is_err() {
            return Err(PyRuntimeError::new_err("the I/O threads have ended"));
        }
        Ok(attempt)
    }

    /// `done()` is called by each I/O thread once its connection is closed. Returns how many there are.
    fn begin_close(&self, py: Python<'_>, done: &Bound<'_, PyAny>) -> usize {
        self.target.closed.store(true, Ordering::Release);
        for outbox in &self.outboxes {
            let done = done.clone().unbind().clone_ref(py);
            send(outbox, Command::Close { target: self.target.clone(), done });
        }
        self.outboxes.len()
    }
}

/// For a test that it judges as `wire.protocol.well_formed` does.
#[pyfunction]
fn well_formed(message: &[u8]) -> bool {
    grpc::well_formed(message)
}

#[pymodule]
pub mod _native {
    #[pymodule_export]
    use super::{Attempt, Exchange, Node, Threads, Timer, well_formed};
}
