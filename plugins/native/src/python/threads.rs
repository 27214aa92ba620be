//! The I/O threads of a transport, its servers and timers, and certificates.

use super::convert::value_error;
use super::exchange::replace;
use super::routing::Fields;
use crate::events::Helpers;
use crate::fork::Ours;
use crate::http::HttpService;
use crate::io::{self, Command, Common, Timed, here_or_first};
use crate::server::{ServedMethod, Service};
use crate::settings::Settings;
use crate::socket::{Moving, MovingListener};
use crate::tls::{self, Newest, Shown};
use dl_inference_wire::KeyFields;
use http::uri::PathAndQuery;
use pyo3::prelude::*;
use pyo3::types::PyString;
use rustls::{ClientConfig, ServerConfig};
use std::collections::{HashMap, HashSet};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// A timer or a drain is not longer than this: it is a day, longer than any process waits.
const LONGEST: Duration = Duration::from_secs(86_400);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The I/O threads of one transport. They end with this object.
#[pyclass(frozen)]
pub struct Threads(Arc<Common>);

impl Threads {
    pub fn common(&self) -> &Arc<Common> {
        &self.0
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        io::stop(&self.0);
    }
}

fn seconds(given: f64) -> Duration {
    Duration::try_from_secs_f64(given.max(0.0)).unwrap_or(LONGEST).min(LONGEST)
}

/// What is read of a `Service` of Python's, but for the limits.
struct Methods {
    methods: HashMap<String, Arc<ServedMethod>>,
    private_trailers: HashSet<String>,
}

fn methods_of(service: &Bound<'_, PyAny>) -> PyResult<Methods> {
    let mut methods = HashMap::new();
    for item in service.getattr("methods")?.call_method0("items")?.try_iter()? {
        let (path, method): (String, Bound<'_, PyAny>) = item?.extract()?;
        let interned = PyString::intern(service.py(), &path).unbind();
        let streams = method.getattr("streaming")?.is_truthy()?;
        let key: Option<Fields> = method.getattr("key")?.extract()?;
        let sent = PathAndQuery::try_from(path.as_str()).map_err(value_error)?;
        let method = ServedMethod { path: interned, streams, sent, key: key.map(KeyFields::from) };
        methods.insert(path, Arc::new(method));
    }
    let names = service.getattr("private_trailers")?;
    let private_trailers = names.try_iter()?.map(|name| name?.extract()).collect::<PyResult<_>>()?;
    Ok(Methods { methods, private_trailers })
}

fn listener_of((fd, is_unix): (RawFd, bool)) -> MovingListener {
    // SAFETY: Python has detached the descriptor from its own object, so that it is open, and ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let ours = Ours::new(&socket);
    if is_unix { Moving::Unix(ours, socket.into()) } else { Moving::Tcp(ours, socket.into()) }
}

#[pymethods]
impl Threads {
    #[new]
    fn new(helpers: Helpers, settings: Settings) -> PyResult<Self> {
        Ok(Threads(io::start(helpers, settings)?))
    }

    #[allow(clippy::too_many_arguments)] // those of a server
    /// Has `service` answer on listening sockets, given as `(descriptor, whether it is a Unix-domain socket)`, which
    /// are this server's from now on. Returns a number for `drain`.
    fn serve(
        &self,
        service: &Bound<'_, PyAny>,
        sockets: Vec<(RawFd, bool)>,
        message_bytes: usize,
        connections: usize,
        streams: u32,
        tls: Option<Bound<'_, ServerTls>>,
        http: Option<HttpService>,
    ) -> PyResult<u64> {
        let listeners = sockets.into_iter().map(listener_of);
        let mut by_thread: Vec<Vec<_>> = self.0.outboxes.iter().map(|_| vec![]).collect();
        let threads = by_thread.len();
        for (number, listener) in listeners.enumerate() {
            if let Some(listeners) = by_thread.get_mut(number % threads) {
                listeners.push(listener);
            }
        }
        let Methods { methods, private_trailers } = methods_of(service)?;
        let service = Arc::new(Service {
            begin_all: service.getattr("begin_all")?.unbind(),
            ended_all: service.getattr("ended_all")?.unbind(),
            methods,
            private_trailers,
            message_bytes,
            connections,
            streams,
            tls: tls.map(|tls| tls.get().0.clone()),
            http: http.map(Arc::new),
            connected: AtomicUsize::new(0),
            by_thread: self.0.outboxes.iter().map(|_| AtomicUsize::new(0)).collect(),
        });
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        for outbox in &self.0.outboxes {
            outbox.send(Command::Serve { id, service: service.clone() });
        }
        // Only now: a thread that accepts gives connections to all others.
        for (outbox, listeners) in self.0.outboxes.iter().zip(by_thread) {
            outbox.send(Command::Listen { id, listeners });
        }
        Ok(id)
    }

    /// Drains a server; each I/O thread calls `done` when it has ended its part. Returns how many will.
    fn drain(&self, py: Python<'_>, number: u64, grace_s: f64, done: &Bound<'_, PyAny>) -> usize {
        let grace = seconds(grace_s);
        let drain = || Command::Drain { id: number, grace, done: done.clone().unbind().clone_ref(py) };
        self.0.outboxes.iter().filter(|outbox| outbox.send(drain())).count()
    }

    fn call_later(&self, after_s: f64, function: Py<PyAny>) -> Timer {
        let timed: Timed = Arc::new(Mutex::new(Some(function)));
        if let Some(outbox) = here_or_first(&self.0.outboxes) {
            outbox.send(Command::Timer(Instant::now() + seconds(after_s), timed.clone()));
        }
        Timer(timed)
    }

    /// How often clients were refused, by the names of `refusals.rs`.
    fn refusals(&self) -> HashMap<&'static str, u64> {
        self.0.refusals.read().collect()
    }

    /// Bytes of messages that the transport holds.
    fn buffered_bytes(&self) -> usize {
        self.0.budget.used()
    }
}

/// A function that is to be called later.
#[pyclass(frozen)]
pub struct Timer(Timed);

#[pymethods]
impl Timer {
    fn cancel(&self) {
        replace(&self.0, None);
    }
}

/// What servers show, and whom they trust; in PEM.
#[pyclass(frozen)]
pub struct ServerTls(pub Arc<Newest<ServerConfig>>);

#[pymethods]
impl ServerTls {
    /// Raises ValueError where it cannot be used.
    #[new]
    #[pyo3(signature = (certificate, key, authorities))]
    fn new(certificate: &[u8], key: &[u8], authorities: Option<&[u8]>) -> PyResult<Self> {
        let config = tls::server(&Shown { certificate, key }, authorities).map_err(value_error)?;
        Ok(ServerTls(Arc::new(Newest::new(config))))
    }

    /// Holds for connections that are made from now on. Raises ValueError where it cannot be used; nothing changes then.
    #[pyo3(signature = (certificate, key, authorities))]
    fn replace(&self, certificate: &[u8], key: &[u8], authorities: Option<&[u8]>) -> PyResult<()> {
        self.0.replace(tls::server(&Shown { certificate, key }, authorities).map_err(value_error)?);
        Ok(())
    }
}

/// What connections to nodes show, and whom they trust; in PEM.
#[pyclass(frozen)]
pub struct ClientTls(pub Arc<Newest<ClientConfig>>);

fn client_config(certificate: Option<&[u8]>, key: Option<&[u8]>, authorities: &[u8]) -> PyResult<Arc<ClientConfig>> {
    let shown = certificate.zip(key).map(|(certificate, key)| Shown { certificate, key });
    tls::client(authorities, shown.as_ref()).map_err(value_error)
}

#[pymethods]
impl ClientTls {
    /// Raises ValueError where it cannot be used.
    #[new]
    #[pyo3(signature = (certificate, key, authorities))]
    fn new(certificate: Option<&[u8]>, key: Option<&[u8]>, authorities: &[u8]) -> PyResult<Self> {
        Ok(ClientTls(Arc::new(Newest::new(client_config(certificate, key, authorities)?))))
    }

    /// Holds for connections that are made from now on. Raises ValueError where it cannot be used; nothing changes then.
    #[pyo3(signature = (certificate, key, authorities))]
    fn replace(&self, certificate: Option<&[u8]>, key: Option<&[u8]>, authorities: &[u8]) -> PyResult<()> {
        self.0.replace(client_config(certificate, key, authorities)?);
        Ok(())
    }
}

/// Ends all I/O threads of this process and waits for them, for `patience_s` at most. False if one has not ended.
#[pyfunction]
pub fn stop_all(py: Python<'_>, patience_s: f64) -> bool {
    io::stop_all(py, seconds(patience_s))
}
