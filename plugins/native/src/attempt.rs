//! Requests to nodes: those of exchanges that are forwarded, and those that belong to no exchange.

use crate::body::{Messages, failure_of};
use crate::call::{Call, End, GRPC, Shared};
use crate::events::{Event, Raised, Which};
use crate::flag::Flag;
use crate::io::Io;
use crate::node::{NodeHere, Sender, Target};
use crate::python::convert;
use bytes::Bytes;
use dl_inference_grpc::{
    ACCEPTED, Charge, Code, Failure, Frame, GRPC_TIMEOUT, PREFIX, check_header_bytes, check_size, is_reserved,
    message_of, status_of,
};
use h2::Reason;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header};
use pyo3::prelude::*;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};

/// How often a request is sent to a node that has not looked at it.
const SENT: usize = 3;
/// Requests of fewer bytes have gone out when their answers are there: all windows are larger, but those of a node that
/// wants few bytes at a time.
const SMALL: usize = 16 << 10;
/// Headers of a request that are the protocol's own.
const OWN_HEADERS: usize = 4;
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Cancels an attempt, from any thread; once is enough, also before it has begun.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Flag>);

impl Cancel {
    pub fn cancel(&self) {
        self.0.raise();
    }

    pub fn is(&self, other: &Cancel) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The metadata of a request to a node.
pub struct Metadata {
    /// The exchange whose client's metadata goes on, but for what `own` names too.
    pub of: Option<Arc<Shared>>,
    pub own: Arc<HeaderMap>,
}

impl Metadata {
    /// With room for the protocol's own headers; a failure where they are of more than `most_bytes`.
    fn headers(&self, most_bytes: usize) -> Result<HeaderMap, Failure> {
        check_header_bytes(&self.own, most_bytes)?; // so that there are few
        let of = self.of.as_ref().filter(|shared| shared.has_metadata).map(|shared| &shared.headers);
        let mut headers = HeaderMap::with_capacity(of.map_or(0, HeaderMap::len) + self.own.len() + OWN_HEADERS);
        for (name, value) in of.into_iter().flatten() {
            if !is_reserved(name.as_str(), false) && !self.own.contains_key(name) {
                headers.append(name.clone(), value.clone());
            }
        }
        for (name, value) in &*self.own {
            headers.append(name.clone(), value.clone());
        }
        check_header_bytes(&headers, most_bytes)?;
        Ok(headers)
    }
}

/// A request to a node.
pub struct Ask {
    pub target: Arc<Target>,
    pub path: PathAndQuery,
    pub metadata: Metadata,
    /// The whole frame.
    pub frame: Bytes,
    pub timeout: Option<f64>,
    pub cancel: Cancel,
}

/// A node's answer, or how it failed; whether the node has certainly not looked at the request.
struct Unanswered {
    failure: Failure,
    unprocessed: bool,
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Self {
        Unanswered { failure, unprocessed: false }
    }
}

impl Ask {
    /// The message and the trailers of the node's answer; the call is reset at the node where that is not waited for.
    pub async fn run(&self, io: &Io) -> Result<(Frame, HeaderMap), Failure> {
        if self.target.closed.load(Ordering::Acquire) {
            return Err(Failure::new(Code::UNAVAILABLE, "the connection was closed"));
        }
        if self.timeout.is_some_and(|seconds| seconds <= 0.0) {
            return Err(Failure::deadline());
        }
        let limit = self.timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        let node = NodeHere::of(io, &self.target);
        let asking = async {
            match until {
                Some(until) => timeout_at(until, self.ask(io, &node, Some(until))).await,
                None => Ok(self.ask(io, &node, None).await),
            }
        };
        let outcome = tokio::select! {
            biased;
            _ = self.cancel.0.raised() => Err(Failure::cancelled()),
            outcome = asking => outcome.unwrap_or_else(|_| Err(Failure::deadline())),
        };
        if outcome.is_err() && self.target.closed.load(Ordering::Acquire) {
            return Err(Failure::new(Code::ATTEMPT_CANCELLED, "the connection was closed"));
        }
        outcome
    }

    /// Sends the request; again, by a new connection, where a node that says goodbye has not looked at it.
    async fn ask(&self, io: &Io, node: &Rc<NodeHere>, until: Option<Instant>) -> Result<(Frame, HeaderMap), Failure> {
        check_size("Sent", self.frame.len().saturating_sub(PREFIX), self.target.message_bytes)?;
        let mut sent = 0;
        loop {
            let sender = node.sender(io).await?;
            sent += 1;
            match self.send(io, node, sender, until).await {
                Err(unanswered) if unanswered.unprocessed && sent < SENT => {}
                outcome => return outcome.map_err(|unanswered| unanswered.failure),
            }
        }
    }

    fn request(&self, io: &Io, until: Option<Instant>) -> Result<Request<()>, Failure> {
        let mut headers = self.metadata.headers(io.common.settings.header_bytes())?;
        headers.insert(header::CONTENT_TYPE, GRPC);
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(GRPC_ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED));
        if let Some(until) = until {
            headers
                .insert(GRPC_TIMEOUT, io.timeouts.borrow_mut().header(until.saturating_duration_since(Instant::now())));
        }
        let mut uri = Uri::default().into_parts();
        uri.scheme = Some(if self.target.tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP });
        uri.authority = Some(self.target.authority.clone());
        uri.path_and_query = Some(self.path.clone());
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.version_mut() = http::Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).map_err(|error| Failure::new(Code::INTERNAL, error.to_string()))?;
        *request.headers_mut() = headers;
        Ok(request)
    }

    async fn send(
        &self,
        io: &Io,
        node: &NodeHere,
        mut sender: Sender,
        until: Option<Instant>,
    ) -> Result<(Frame, HeaderMap), Unanswered> {
        let writer = sender.writer.clone();
        let failed = |error: h2::Error| {
            // A GOAWAY without an error ends the streams that the node has not looked at. Where it comes with the
            // connection's end, it may end others too.
            let unseen = error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
            let refused = error.is_reset() && error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
            Unanswered { failure: failure_of(&error, "node"), unprocessed: refused || unseen && !writer.is_closed() }
        };
        let (answer, mut out) = sender.send.send_request(self.request(io, until)?, false).map_err(failed)?;
        let window = sender.window.clone();
        drop(sender); // or this call would count as one that still may open a stream
        // The whole message is in memory already, so h2 may hold what the node's window has no room for. A node that
        // has answered without reading all of it is heard below.
        let _ = out.send_data(self.frame.clone(), true);
        node.forget_ended(); // the connection's task is awake for the request
        let (head, body) = answer.await.map_err(failed)?.into_parts();
        if body.is_end_stream() {
            status_of(head.status, head.headers)?;
            return Err(Failure::new(Code::MALFORMED, "the node answered OK without a message").into());
        }
        if !head.status.is_success() {
            status_of(head.status, head.headers)?;
            return Err(Failure::new(Code::UNKNOWN, format!("the node answered with HTTP {}", head.status)).into());
        }
        let mut messages =
            Messages::new(body, &head.headers, self.target.message_bytes, Code::INTERNAL, io.charge(), window);
        let frame = messages.at_most_one().await.map_err(failed)?;
        let frame = frame?;
        let trailers = status_of(head.status, messages.trailers().await.map_err(failed)?)?;
        if self.frame.len() < SMALL {
            node.stream_ended(&writer, out, messages.into_body());
        }
        match frame {
            Some(frame) => Ok((frame, trailers)),
            None => Err(Failure::new(Code::MALFORMED, "the node answered OK without a message").into()),
        }
    }
}

/// An exchange that goes to a node.
pub struct Forward {
    pub exchange: Arc<Shared>,
    pub ask: Ask,
    pub done: Py<PyAny>,
    pub context: Py<PyAny>,
    pub allow_empty: bool,
    pub extras: Option<Arc<Extras>>,
}

/// Functions of Python that see the messages of an attempt.
pub struct Extras {
    pub change_request: Option<Py<PyAny>>,
    pub change_answer: Option<Py<PyAny>>,
    /// `Sink.offer`.
    pub offer: Option<Py<PyAny>>,
}

impl Extras {
    fn changes(&self, which: Which) -> Option<&Py<PyAny>> {
        match which {
            Which::Request => self.change_request.as_ref(),
            Which::Answer => self.change_answer.as_ref(),
        }
    }

    pub fn change(&self, py: Python<'_>, which: Which, message: Bytes, charge: Charge) -> Result<Frame, Raised> {
        let Some(function) = self.changes(which) else { return Err(Failure::cancelled().into()) };
        let changed = function.call1(py, (convert::message(py, message)?,))?;
        convert::frame_of(changed.bind(py), charge)
    }

    pub fn offer(&self, py: Python<'_>, request: Bytes, answer: Bytes) -> PyResult<()> {
        let Some(offer) = &self.offer else { return Ok(()) };
        offer.call1(py, (convert::message(py, request)?, convert::message(py, answer)?)).map(drop)
    }
}

/// Begins an attempt of an exchange that this thread has, or had.
pub fn forward(io: &Rc<Io>, forward: Box<Forward>) {
    let call = io.calls.borrow().get(&forward.exchange.id).cloned().filter(|call| !call.has_ended());
    match call {
        Some(call) => call.begin_attempt(forward),
        None => {
            forward.ask.cancel.cancel();
            spawn_local(run(io.clone(), None, forward));
        }
    }
}

/// Takes an attempt to its end, and has Python told.
pub async fn run(io: Rc<Io>, call: Option<Rc<Call>>, mut forward: Box<Forward>) {
    let begun = Instant::now();
    let outcome = attempt(&io, call.as_deref(), &mut forward).await;
    let seconds = begun.elapsed().as_secs_f64();
    if let (Err(_), Some(call)) = (&outcome, &call) {
        call.attempt_ended(&forward.ask.cancel);
    }
    let (error, trailers) = match outcome {
        Ok(trailers) => (None, trailers),
        Err(Raised::Failure(failure)) => {
            let trailers = failure.trailers.clone();
            (Some(Raised::Failure(failure)), trailers)
        }
        Err(error) => (Some(error), HeaderMap::new()),
    };
    io.tell(Event::Done { done: forward.done, context: forward.context, error, trailers, seconds });
}

/// Has the node answer, and gives a good answer to the client; returns the node's trailers that a service may read.
async fn attempt(io: &Io, call: Option<&Call>, forward: &mut Forward) -> Result<HeaderMap, Raised> {
    let Forward { ask, extras, .. } = forward;
    let changed = change(io, extras.as_ref(), Which::Request, || message_of(&ask.frame)).await?;
    if let Some(frame) = &changed {
        ask.frame = frame.bytes().clone();
    }
    let (frame, trailers) = ask.run(io).await?;
    let answer = frame.message();
    let good = dl_inference_wire::well_formed(&answer) || forward.allow_empty && answer.is_empty();
    if !good {
        let message = "the answer is not a protobuf message".to_owned();
        return Err(Failure { trailers, ..Failure::new(Code::MALFORMED, message) }.into());
    }
    let frame = change(io, extras.as_ref(), Which::Answer, || answer.clone()).await?.unwrap_or(frame);
    let call = call.filter(|call| !call.has_ended()).ok_or_else(Failure::cancelled)?;
    call.attempt_ended(&ask.cancel); // before the others are cancelled
    let (to_client, readable) = shared_out(trailers, &call.server.service.private_trailers);
    call.end(io, End::Ok { frame: Some(frame), trailers: to_client });
    if let Some(extras) = extras.clone().filter(|extras| extras.offer.is_some()) {
        io.tell(Event::Offer { extras, request: message_of(&ask.frame), answer });
    }
    Ok(readable)
}

/// A node's trailers as they go to the client, and as the service reads them.
fn shared_out(trailers: HeaderMap, private: &HashSet<String>) -> (HeaderMap, HeaderMap) {
    if trailers.keys().all(|name| is_reserved(name.as_str(), true)) {
        return (trailers, HeaderMap::new()); // as most are
    }
    let mut to_client = trailers.clone();
    for name in private {
        to_client.remove(name.as_str());
    }
    (to_client, trailers)
}

/// The message that a function of `extras` makes; None where none does.
async fn change(
    io: &Io,
    extras: Option<&Arc<Extras>>,
    which: Which,
    message: impl FnOnce() -> Bytes,
) -> Result<Option<Frame>, Raised> {
    let Some(extras) = extras.filter(|extras| extras.changes(which).is_some()) else { return Ok(None) };
    let (changed, answer) = oneshot::channel();
    io.tell(Event::Change { extras: extras.clone(), which, message: message(), changed });
    answer.await.unwrap_or_else(|_| Err(Failure::cancelled().into())).map(Some)
}
