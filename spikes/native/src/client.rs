//! Connections to nodes, one of each I/O thread to each node, and attempts.

use crate::coalesce::Coalesce;
use crate::grpc::{self, Failure};
use crate::io::{Answer, Event, Extras, Forward, Io, Raised};
use crate::server::{Call, sent};
use bytes::Bytes;
use h2::client::SendRequest;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Notify, oneshot};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, timeout_at};

const CONNECT: Duration = Duration::from_secs(1);
/// Bytes of metadata that a request may have. A server on h2 ends the whole connection for one value over its limit.
const METADATA: usize = 15 << 10;

/// Where a node is. Every thread may read it.
pub struct Target {
    pub id: u64,
    pub address: String,
    pub authority: Authority,
    pub message_bytes: usize,
    pub closed: AtomicBool,
}

/// Cancels an attempt, from any thread; once is enough, also before it has begun.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Notify>);

impl Cancel {
    pub fn cancel(&self) {
        self.0.notify_one();
    }

    pub fn is(&self, other: &Cancel) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The connection of one I/O thread to a node.
pub struct NodeHere {
    target: Arc<Target>,
    live: RefCell<Option<SendRequest<Bytes>>>,
    /// Held while one of those who wait connects for all of them. It belongs to this thread alone.
    connecting: Mutex<()>,
    tries: Cell<u64>,
    last_error: RefCell<String>,
    tasks: RefCell<Vec<AbortHandle>>,
}

impl NodeHere {
    fn of(io: &Io, target: &Arc<Target>) -> Rc<NodeHere> {
        let make = || {
            Rc::new(NodeHere {
                target: target.clone(),
                live: RefCell::default(),
                connecting: Mutex::new(()),
                tries: Cell::new(0),
                last_error: RefCell::default(),
                tasks: RefCell::default(),
            })
        };
        io.nodes.borrow_mut().entry(target.id).or_insert_with(make).clone()
    }

    /// Ends the connection, and so all that is in flight on it.
    pub fn close(&self) {
        self.live.take();
        for task in self.tasks.take() {
            task.abort();
        }
    }

    /// What can send a request now. One caller connects, the others wait for how that ends.
    async fn sender(self: &Rc<Self>) -> Result<SendRequest<Bytes>, Failure> {
        let tries = self.tries.get();
        for _ in 0..3 {
            let live = self.live.borrow().clone();
            if let Some(sender) = live {
                match sender.ready().await {
                    Ok(sender) => return Ok(sender),
                    Err(_) => drop(self.live.take()), // the node has said goodbye
                }
            }
            let _held = self.connecting.lock().await;
            if self.live.borrow().is_some() {
                continue;
            }
            if self.tries.get() == tries {
                self.connect().await;
            }
            if self.live.borrow().is_none() {
                break;
            }
        }
        Err(Failure::new(grpc::UNAVAILABLE, format!("{}: {}", self.target.address, self.last_error.borrow())))
    }

    async fn connect(self: &Rc<Self>) {
        let connected = match tokio::time::timeout(CONNECT, handshake(&self.target.address)).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it did not answer within a second".to_owned()),
        };
        self.tries.set(self.tries.get() + 1);
        match connected {
            Err(error) => drop(self.last_error.replace(error)),
            Ok((sender, connection)) => {
                self.live.replace(Some(sender));
                let node = Rc::downgrade(self);
                let tries = self.tries.get();
                let task = spawn_local(async move {
                    connection.await;
                    if let Some(node) = node.upgrade().filter(|node| node.tries.get() == tries) {
                        node.live.take();
                    }
                });
                let mut tasks = self.tasks.borrow_mut();
                tasks.retain(|task| !task.is_finished());
                tasks.push(task.abort_handle());
            }
        }
    }
}

type Driver = Pin<Box<dyn Future<Output = ()>>>;

async fn handshake(address: &str) -> Result<(SendRequest<Bytes>, Driver), Box<dyn std::error::Error>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let writer = Coalesce::new(stream);
    let handshake = h2::client::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(256 << 10)
        .max_concurrent_reset_streams(1000)
        .max_local_error_reset_streams(None)
        .enable_push(false)
        .handshake(writer.clone());
    let mut handshake = Box::pin(handshake);
    let (sender, mut connection) = poll_fn(|cx| sent(&writer, cx, |cx| handshake.as_mut().poll(cx))).await?;
    let driver = async move {
        let _ = poll_fn(|cx| sent(&writer, cx, |cx| Pin::new(&mut connection).poll(cx))).await;
    };
    Ok((sender, Box::pin(driver)))
}

/// A request to a node.
pub struct Ask {
    pub target: Arc<Target>,
    pub path: PathAndQuery,
    pub metadata: HeaderMap,
    pub frame: Bytes,
    pub timeout: Option<f64>,
    pub cancel: Cancel,
}

impl Ask {
    /// The frame and the trailers of the node's answer; the call is reset at the node where that is not waited for.
    pub async fn run(self, io: &Io) -> Result<(Bytes, HeaderMap), Failure> {
        if self.target.closed.load(Ordering::Acquire) {
            return Err(Failure::new(grpc::UNAVAILABLE, "the connection was closed"));
        }
        if self.timeout.is_some_and(|seconds| seconds <= 0.0) {
            return Err(Failure::deadline());
        }
        let limit = self.timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let until = limit.map(|limit| Instant::now() + limit);
        let node = NodeHere::of(io, &self.target);
        let (target, cancel) = (self.target.clone(), self.cancel.clone());
        let outcome = async {
            match until {
                Some(until) => timeout_at(until, self.ask(&node, limit)).await.unwrap_or(Err(Failure::deadline())),
                None => self.ask(&node, None).await,
            }
        };
        let outcome = tokio::select! {
            biased;
            _ = cancel.0.notified() => Err(Failure::new(grpc::ATTEMPT_CANCELLED, "this process cancelled the attempt")),
            outcome = outcome => outcome,
        };
        if outcome.is_err() && target.closed.load(Ordering::Acquire) {
            return Err(Failure::new(grpc::ATTEMPT_CANCELLED, "the connection was closed"));
        }
        outcome
    }

    async fn ask(self, node: &Rc<NodeHere>, limit: Option<Duration>) -> Result<(Bytes, HeaderMap), Failure> {
        let most = self.target.message_bytes;
        grpc::check_size("Sent", self.frame.len() - grpc::PREFIX, most)?;
        let metadata: usize = self.metadata.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        if metadata > METADATA {
            let said = format!("received metadata size exceeds limit ({metadata} vs. {METADATA})");
            return Err(Failure::new(grpc::RESOURCE_EXHAUSTED, said));
        }
        let mut request = Request::new(());
        let mut uri = Uri::default().into_parts();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(self.target.authority.clone());
        uri.path_and_query = Some(self.path);
        *request.method_mut() = Method::POST;
        *request.version_mut() = http::Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).map_err(|error| Failure::new(grpc::INTERNAL, error.to_string()))?;
        let headers = request.headers_mut();
        *headers = self.metadata;
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
        if let Some(limit) = limit {
            headers.insert("grpc-timeout", grpc::timeout_header(limit));
        }
        let mut sender = node.sender().await?;
        let (answer, mut stream) = sender.send_request(request, false)?;
        drop(sender); // or this call would count as one that still may open a stream
        // The whole message is in memory already, so h2 may hold what the node's window has no room for. A node that
        // has answered without reading all of it is heard below.
        let _ = stream.send_data(self.frame, true);
        let (head, mut body) = answer.await?.into_parts();
        if body.is_end_stream() {
            grpc::status_of(head.status, head.headers)?;
            return Err(Failure::new(grpc::MALFORMED, "the node answered OK without a message"));
        }
        if head.headers.contains_key("grpc-status") || !head.status.is_success() {
            grpc::status_of(head.status, head.headers.clone())?;
        }
        let frame = grpc::read_frame(&mut body, most).await?;
        let trailers = body.trailers().await?.unwrap_or_default();
        let trailers = grpc::status_of(head.status, trailers)?;
        match frame {
            Some(frame) => Ok((frame, trailers)),
            None => Err(Failure::new(grpc::MALFORMED, "the node answered OK without a message")),
        }
    }
}

/// Begins an attempt of an exchange that this thread has, or had.
pub fn forward(io: &Rc<Io>, forward: Forward) {
    let call = io.calls.borrow().get(&forward.exchange.id).cloned().filter(|call| !call.has_ended());
    if let Some(call) = &call {
        call.began(&forward.ask.cancel);
    } else {
        forward.ask.cancel.cancel();
    }
    let io = io.clone();
    spawn_local(async move {
        let begun = Instant::now();
        let Forward { ask, done, extras, .. } = forward;
        let cancel = ask.cancel.clone();
        let outcome = attempt(&io, call.as_deref(), ask, extras.as_deref()).await;
        let seconds = begun.elapsed().as_secs_f64();
        if let (Err(_), Some(call)) = (&outcome, &call) {
            call.attempt_ended(&cancel);
        }
        let (error, trailers) = match outcome {
            Ok(trailers) => (None, trailers),
            Err(Raised::Failure(mut failure)) => {
                let trailers = std::mem::take(&mut failure.trailers);
                (Some(Raised::Failure(failure)), trailers)
            }
            Err(error) => (Some(error), HeaderMap::new()),
        };
        io.tell(Event::Done { done, error, trailers, seconds, extras });
    });
}

/// Has the node answer, and gives a good answer to the client; returns the node's trailers.
async fn attempt(io: &Io, call: Option<&Call>, mut ask: Ask, extras: Option<&Extras>) -> Result<HeaderMap, Raised> {
    let cancel = ask.cancel.clone();
    if let Some(function) = extras.and_then(|extras| extras.change_request.as_ref()) {
        ask.frame = change(io, function, ask.frame).await?;
    }
    let copy = extras.filter(|extras| extras.offer.is_some()).map(|_| ask.frame.clone());
    let (mut frame, trailers) = ask.run(io).await.map_err(Raised::Failure)?;
    if !grpc::well_formed(&frame[grpc::PREFIX..]) {
        let failure = Failure::new(grpc::MALFORMED, "the answer is not a protobuf message");
        return Err(Raised::Failure(failure));
    }
    let from_node = frame.clone();
    if let Some(function) = extras.and_then(|extras| extras.change_answer.as_ref()) {
        frame = change(io, function, frame).await?;
    }
    let cancelled = || Raised::Failure(Failure::new(grpc::ATTEMPT_CANCELLED, "this process cancelled the attempt"));
    let call = call.filter(|call| !call.has_ended()).ok_or_else(cancelled)?;
    call.attempt_ended(&cancel); // before the others are cancelled
    let mut to_client = trailers.clone();
    for name in &call.server.service.private_trailers {
        to_client.remove(name.as_str());
    }
    call.answer(io, Answer::Ok { frame, trailers: to_client });
    if let (Some(request), Some(offer)) = (copy, extras.and_then(|extras| extras.offer.as_ref())) {
        let offer = Python::attach(|py| offer.clone_ref(py));
        io.tell(Event::Offer { offer, request, answer: from_node });
    }
    Ok(trailers)
}

async fn change(io: &Io, function: &Py<PyAny>, message: Bytes) -> Result<Bytes, Raised> {
    let function = Python::attach(|py| function.clone_ref(py));
    let (changed, answer) = oneshot::channel();
    io.tell(Event::Change { function, message, changed });
    match answer.await {
        Ok(answer) => answer.map_err(Raised::ByPython),
        Err(_) => Err(Raised::Failure(Failure::new(grpc::INTERNAL, "the thread ended"))),
    }
}
