//! Connections of clients, and their calls.

use crate::client::Cancel;
use crate::coalesce::Coalesce;
use crate::grpc::{self, Failure};
use crate::io::{Answer, Event, Io};
use crate::python::Exchange;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use pyo3::prelude::*;
use pyo3::types::PyString;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep_until, timeout};

/// What a `Service` of Python is here: read once, when it is served.
pub struct Service {
    pub begin_all: Py<PyAny>,
    pub ended: Py<PyAny>,
    /// The unary ones.
    pub methods: HashMap<String, Py<PyString>>,
    pub streaming: HashSet<String>,
    pub private_trailers: HashSet<String>,
    pub message_bytes: usize,
    pub connections: usize,
    pub streams: u32,
    /// On all I/O threads together.
    pub connected: AtomicUsize,
}

/// What every thread may read of an exchange.
pub struct Shared {
    pub id: u64,
    pub path: String,
    pub headers: HeaderMap,
    /// The whole frame of the request, its prefix too.
    pub frame: Bytes,
    /// Written by the I/O thread alone.
    left: AtomicBool,
}

impl Shared {
    /// Whether it has ended by the client's leaving, or by the deadline.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }
}

#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Stage {
    Serving,
    Draining,
    Closed,
}

/// The part of a server that one I/O thread has.
pub struct ServerHere {
    id: u64,
    pub service: Arc<Service>,
    stage: watch::Sender<Stage>,
    connections: Cell<usize>,
    none_left: Notify,
}

impl ServerHere {
    pub fn start(io: &Rc<Io>, id: u64, service: Arc<Service>, listener: std::net::TcpListener) {
        let server = Rc::new(ServerHere {
            id,
            service,
            stage: watch::Sender::new(Stage::Serving),
            connections: Cell::new(0),
            none_left: Notify::new(),
        });
        io.servers.borrow_mut().entry(id).or_insert_with(|| server.clone());
        let server = io.servers.borrow()[&id].clone(); // one server may have several listeners
        match TcpListener::from_std(listener) {
            Ok(listener) => drop(spawn_local(accept(io.clone(), server, listener))),
            Err(error) => eprintln!("cannot listen: {error}"),
        }
    }

    /// Takes nothing new, waits for what is in flight, cancels the rest.
    pub async fn drain(&self, io: &Io, grace: Duration) {
        self.stage.send_replace(Stage::Draining);
        if timeout(grace, self.until_none()).await.is_err() {
            let calls: Vec<_> = io.calls.borrow().values().filter(|call| call.server.id == self.id).cloned().collect();
            for call in calls {
                call.leave(io, Some(Failure::new(grpc::CANCELLED, "the server is shutting down")));
            }
            let _ = timeout(Duration::from_millis(100), self.until_none()).await; // the answers may go out
        }
        self.stage.send_replace(Stage::Closed);
        self.until_none().await;
    }

    async fn until_none(&self) {
        while self.connections.get() > 0 {
            self.none_left.notified().await;
        }
    }
}

async fn reached(stage: &mut watch::Receiver<Stage>, wanted: Stage) {
    if stage.wait_for(|stage| *stage >= wanted).await.is_err() {
        pending::<()>().await;
    }
}

async fn accept(io: Rc<Io>, server: Rc<ServerHere>, listener: TcpListener) {
    let mut stage = server.stage.subscribe();
    loop {
        let accepted = tokio::select! {
            _ = reached(&mut stage, Stage::Draining) => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(10)).await; // out of files, perhaps
            continue;
        };
        let service = &server.service;
        if service.connected.fetch_add(1, Ordering::Relaxed) >= service.connections {
            service.connected.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        server.connections.set(server.connections.get() + 1);
        let (io, server) = (io.clone(), server.clone());
        spawn_local(async move {
            connection(io, &server, stream).await;
            server.service.connected.fetch_sub(1, Ordering::Relaxed);
            server.connections.set(server.connections.get() - 1);
            server.none_left.notify_one();
        });
    }
}

/// Polls a connection; where it has nothing more to do, what it wrote is sent now.
pub fn sent<T: AsyncWrite + Unpin, R>(
    writer: &Coalesce<T>,
    cx: &mut Context<'_>,
    poll: impl FnOnce(&mut Context<'_>) -> Poll<R>,
) -> Poll<R> {
    let polled = poll(cx);
    if polled.is_pending() {
        let _ = writer.send(cx); // an error comes back with the next read
    }
    polled
}

async fn connection(io: Rc<Io>, server: &Rc<ServerHere>, stream: TcpStream) {
    let mut stage = server.stage.subscribe();
    let _ = stream.set_nodelay(true); // else an answer's trailers wait for the acknowledgement of its data
    let writer = Coalesce::new(stream);
    let mut handshake = pin!(
        h2::server::Builder::new()
            .initial_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .max_frame_size(256 << 10)
            .max_header_list_size(16 << 10)
            .max_concurrent_streams(server.service.streams)
            // By default the 21st call that is cancelled before it was looked at ends the connection.
            .max_pending_accept_reset_streams(1024)
            .handshake::<_, Bytes>(writer.clone())
    );
    let mut connection = tokio::select! {
        made = poll_fn(|cx| sent(&writer, cx, |cx| handshake.as_mut().poll(cx))) => match made {
            Ok(connection) => connection,
            Err(_) => return,
        },
        _ = reached(&mut stage, Stage::Draining) => return,
    };
    let mut next = Stage::Draining;
    loop {
        tokio::select! {
            biased;
            _ = reached(&mut stage, next) => {
                if next == Stage::Closed {
                    return;
                }
                connection.graceful_shutdown();
                next = Stage::Closed;
            }
            accepted = poll_fn(|cx| sent(&writer, cx, |cx| connection.poll_accept(cx))) => match accepted {
                Some(Ok((request, respond))) => drop(spawn_local(call(io.clone(), server.clone(), request, respond))),
                _ => break,
            },
        }
    }
    let _ = poll_fn(|cx| writer.send(cx)).await;
}

/// A call whose request is there. Lives on its I/O thread.
pub struct Call {
    pub shared: Arc<Shared>,
    pub server: Rc<ServerHere>,
    pub deadline: Option<Instant>,
    /// None once it has ended.
    respond: RefCell<Option<SendResponse<Bytes>>>,
    exchange: RefCell<Option<Py<Exchange>>>,
    begun: Cell<bool>,
    on_cancel: RefCell<Vec<Py<PyAny>>>,
    attempts: RefCell<Vec<Cancel>>,
    over: Notify,
}

/// Takes a call from its first headers to its end.
async fn call(io: Rc<Io>, server: Rc<ServerHere>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let (head, mut body) = request.into_parts();
    let path = head.uri.path();
    if !server.service.methods.contains_key(path) {
        let streams = server.service.streaming.contains(path);
        let said = if streams { "this spike has no streams, so no" } else { "there is no method" };
        return fail(respond, Failure::new(grpc::UNIMPLEMENTED, format!("{said} {path}")));
    }
    let deadline = grpc::timeout_of(&head.headers).map(|given| Instant::now() + given);
    let read = tokio::select! {
        read = grpc::read_frame(&mut body, server.service.message_bytes) => read,
        _ = passes(deadline) => Err(Failure::deadline()),
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    let frame = match read {
        Ok(Some(frame)) => frame,
        Ok(None) => return fail(respond, Failure::new(grpc::INTERNAL, "there is no message")),
        Err(failure) => return fail(respond, failure),
    };
    let id = io.next_id();
    let shared = Shared { id, path: path.to_owned(), headers: head.headers, frame, left: AtomicBool::new(false) };
    let call = Rc::new(Call {
        shared: Arc::new(shared),
        server,
        deadline,
        respond: RefCell::new(Some(respond)),
        exchange: RefCell::default(),
        begun: Cell::new(false),
        on_cancel: RefCell::default(),
        attempts: RefCell::default(),
        over: Notify::new(),
    });
    io.calls.borrow_mut().insert(id, call.clone());
    io.tell(Event::Begin(call.clone()));
    tokio::select! {
        biased;
        _ = call.over.notified() => {}
        _ = poll_fn(|cx| call.poll_reset(cx)) => call.leave(&io, None),
        _ = passes(deadline) => call.leave(&io, Some(Failure::deadline())),
    }
    io.calls.borrow_mut().remove(&id);
}

async fn passes(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

impl Call {
    fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *self.respond.borrow_mut() {
            Some(respond) => respond.poll_reset(cx).map(|_| ()),
            None => Poll::Pending,
        }
    }

    pub fn has_begun(&self) -> bool {
        self.begun.get()
    }

    pub fn begin(&self, exchange: PyResult<Py<Exchange>>, py: Python<'_>) -> PyResult<Py<Exchange>> {
        self.begun.set(true);
        let exchange = exchange?;
        self.exchange.replace(Some(exchange.clone_ref(py)));
        Ok(exchange)
    }

    pub fn take_exchange(&self) -> Option<Py<Exchange>> {
        self.exchange.take()
    }

    pub fn has_ended(&self) -> bool {
        self.respond.borrow().is_none()
    }

    /// Ends it; None if it has ended already.
    fn end(&self, io: &Io, code: u16, left: bool) -> Option<SendResponse<Bytes>> {
        let respond = self.respond.take()?;
        self.shared.left.store(left, Ordering::Release);
        for attempt in self.attempts.take() {
            attempt.cancel();
        }
        self.over.notify_one();
        let callbacks = self.on_cancel.take();
        let (called, forgotten) = if left { (callbacks, vec![]) } else { (vec![], callbacks) };
        for callback in forgotten {
            io.tell(Event::Forget(callback));
        }
        if let Some(call) = io.calls.borrow().get(&self.shared.id).cloned() {
            io.tell(Event::Ended { call, code, callbacks: called });
        }
        Some(respond)
    }

    /// Ends it as its client's leaving, who is told of `failure` if there still is one.
    pub fn leave(&self, io: &Io, failure: Option<Failure>) {
        if let (Some(respond), Some(failure)) = (self.end(io, grpc::CANCELLED, true), failure) {
            fail(respond, failure);
        }
    }

    pub fn answer(&self, io: &Io, answer: Answer) {
        let answer = match answer {
            Answer::Ok { frame, trailers } => {
                match grpc::check_size("Sent", frame.len() - grpc::PREFIX, self.server.service.message_bytes) {
                    Ok(()) => Ok((frame, trailers)),
                    Err(failure) => Err(failure),
                }
            }
            Answer::Failed(failure) => Err(failure),
        };
        match answer {
            Ok((frame, trailers)) => {
                if let Some(respond) = self.end(io, 0, false) {
                    let _ = succeed(respond, frame, trailers); // the client left: there is nobody to tell
                }
            }
            Err(failure) => {
                if let Some(respond) = self.end(io, failure.code, false) {
                    fail(respond, failure);
                }
            }
        }
    }

    pub fn on_cancel(&self, io: &Io, callback: Py<PyAny>) {
        match self.has_ended() {
            false => self.on_cancel.borrow_mut().push(callback),
            true if self.shared.has_left() => io.tell(Event::Callback(callback)),
            true => io.tell(Event::Forget(callback)),
        }
    }

    pub fn began(&self, attempt: &Cancel) {
        self.attempts.borrow_mut().push(attempt.clone());
    }

    pub fn attempt_ended(&self, attempt: &Cancel) {
        self.attempts.borrow_mut().retain(|each| !each.is(attempt));
    }
}

fn head(headers: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = headers;
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn succeed(mut respond: SendResponse<Bytes>, frame: Bytes, mut trailers: HeaderMap) -> Result<(), h2::Error> {
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let mut out = respond.send_response(head(HeaderMap::new()), false)?;
    // The whole answer is in memory already, so h2 may hold what the client's window has no room for.
    out.send_data(frame, false)?;
    out.send_trailers(trailers)
}

fn fail(mut respond: SendResponse<Bytes>, failure: Failure) {
    let headers = grpc::status_headers(failure.code, &failure.message, failure.trailers);
    let _ = respond.send_response(head(headers), true); // the client left: there is nobody to tell
}
