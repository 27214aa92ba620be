//! The calls of clients, from their first headers to their end.

use crate::attempt::{self, Cancel, Forward};
use crate::body::{Messages, failure_of};
use crate::events::Event;
use crate::flag::Flag;
use crate::http::{answer_stream, send};
use crate::io::{Common, Io};
use crate::listen::{Answering, ServerHere};
use crate::python::Exchange;
use crate::server::{ServedMethod, Service};
use crate::stream::Stream;
use crate::window::Window;
use atomic_waker::AtomicWaker;
use bytes::Buf;
use dl_inference_grpc::{
    ACCEPTED, Code, Failure, Frame, GRPC_STATUS, check_headers, check_size, status_headers, timeout_of,
};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep_until};

pub const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// What every thread may read of an exchange.
pub struct Shared {
    pub id: u64,
    pub method: Arc<ServedMethod>,
    pub headers: HeaderMap,
    /// Whether some of the headers are the client's own metadata.
    pub has_metadata: bool,
    /// The request; of a stream, an empty one.
    pub frame: Frame,
    /// Of a stream: bytes that were given to `send` and are not sent yet.
    pub unsent: AtomicUsize,
    /// Written by the I/O thread alone.
    left: AtomicBool,
}

impl Shared {
    /// Whether it has ended by the client's leaving, or by the deadline.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }
}

/// How an exchange ends.
pub enum End {
    /// With an answer, if there is one, and the status OK.
    Ok {
        frame: Option<Frame>,
        trailers: HeaderMap,
    },
    Failed(Failure),
    /// The client leaves; it is told of the failure, if it may still be there.
    Left(Option<Failure>),
}

/// A call that has become an exchange. Lives on its I/O thread.
pub struct Call {
    pub shared: Arc<Shared>,
    pub server: Rc<ServerHere>,
    pub deadline: Option<Instant>,
    pub stream: Option<Stream>,
    /// None once the head of the answer was sent.
    pub respond: RefCell<Option<SendResponse<Frame>>>,
    ended: Cell<bool>,
    over: Flag,
    exchange: RefCell<Option<Py<Exchange>>>,
    on_cancel: RefCell<Vec<Py<PyAny>>>,
    attempts: RefCell<Vec<Cancel>>,
    /// Attempts that the call's task is to begin; and its waker.
    #[allow(clippy::vec_box)] // as the command brought it: nothing is copied
    coming: RefCell<Vec<Box<Forward>>>,
    task: AtomicWaker,
}

/// Takes a call from its first headers to its end.
pub async fn run(
    io: Rc<Io>,
    server: Rc<ServerHere>,
    window: Rc<Window>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Frame>,
) {
    let (head, body) = request.into_parts();
    if head.method != Method::POST || !is_grpc(&head.headers) {
        return Box::pin(answer_stream(io, server, window, head, body, respond)).await; // apart: each call would have room for it
    }
    let service = &server.service;
    let Admitted { method, has_metadata, deadline } = match admit(&io, service, &head) {
        Ok(admitted) => admitted,
        Err(failure) => return refuse(&io, respond, failure),
    };
    let streams = method.streams;
    let limit = service.message_bytes;
    let mut messages = Messages::new(body, &head.headers, limit, Code::INVALID_ARGUMENT, io.charge(), window);
    let mut frame = Frame::none(io.charge());
    if !streams {
        frame = match read_request(&mut messages, deadline, &mut respond).await {
            Some(Ok(frame)) => frame,
            Some(Err(failure)) => return refuse(&io, respond, failure),
            None => return,
        };
    }
    let shared = Arc::new(Shared {
        id: io.next_id(),
        method,
        headers: head.headers,
        has_metadata,
        frame,
        unsent: AtomicUsize::new(0),
        left: AtomicBool::new(false),
    });
    let call = Rc::new(Call {
        shared,
        server: server.clone(),
        deadline,
        stream: streams.then(Stream::default),
        respond: RefCell::new(Some(respond)),
        ended: Cell::new(false),
        over: Flag::default(),
        exchange: RefCell::default(),
        on_cancel: RefCell::default(),
        attempts: RefCell::default(),
        coming: RefCell::default(),
        task: AtomicWaker::new(),
    });
    let mut attempts = Attempts::default();
    let known = Known::new(&io, &call);
    io.tell(Event::Begin(call.clone()));
    tokio::select! {
        biased;
        _ = poll_fn(|cx| attempts.poll(&io, &call, cx)) => {}
        _ = call.over.raised() => {}
        _ = poll_fn(|cx| call.poll_reset(cx)) => call.leave(&io, None),
        _ = passes(deadline) => call.leave(&io, Some(Failure::deadline())),
        _ = carry(&call, &io, &mut messages) => {}
    }
    drop(known);
    poll_fn(|cx| attempts.poll_to_end(&io, &call, cx)).await;
}

/// Commands reach the call for as long as this lives. Where its task panics, the call ends as if its client had left.
struct Known(Rc<Io>, Rc<Call>);

impl Known {
    fn new(io: &Rc<Io>, call: &Rc<Call>) -> Known {
        io.calls.borrow_mut().insert(call.shared.id, call.clone());
        Known(io.clone(), call.clone())
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let Known(io, call) = self;
        if !call.has_ended() {
            call.leave(io, None);
        }
        io.calls.borrow_mut().remove(&call.shared.id);
    }
}

/// The attempts of a call that are under way. The call's task polls them: each would cost more as a task of its own.
#[derive(Default)]
struct Attempts(Vec<Pin<Box<dyn Future<Output = ()>>>>);

impl Attempts {
    /// Goes on with all of them, and with those that come. Never ready.
    fn poll(&mut self, io: &Rc<Io>, call: &Rc<Call>, cx: &mut Context<'_>) -> Poll<()> {
        call.task.register(cx.waker());
        for forward in call.coming.take() {
            self.0.push(Box::pin(attempt::run(io.clone(), Some(call.clone()), forward)));
        }
        self.0.retain_mut(|attempt| attempt.as_mut().poll(cx).is_pending());
        Poll::Pending
    }

    /// As `poll`; ready once none is left.
    fn poll_to_end(&mut self, io: &Rc<Io>, call: &Rc<Call>, cx: &mut Context<'_>) -> Poll<()> {
        let _ = self.poll(io, call, cx);
        if self.0.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// What the headers of a call say.
struct Admitted {
    method: Arc<ServedMethod>,
    has_metadata: bool,
    deadline: Option<Instant>,
}

/// A failure where a call is refused by its headers.
fn admit(io: &Io, service: &Service, head: &Parts) -> Result<Admitted, Failure> {
    let path = head.uri.path();
    let Some(method) = service.methods.get(path).cloned() else {
        return Err(Failure::new(Code::UNIMPLEMENTED, format!("there is no method {path}")));
    };
    let has_metadata = check_headers(&head.headers, io.common.settings.header_bytes())?;
    match timeout_of(&head.headers)? {
        Some(Duration::ZERO) => Err(Failure::deadline()),
        timeout => Ok(Admitted { method, has_metadata, deadline: timeout.map(|given| Instant::now() + given) }),
    }
}

/// As `Call::carry`. Apart: each call would have room for what a stream needs.
async fn carry(call: &Call, io: &Io, messages: &mut Messages) {
    match &call.stream {
        Some(stream) => Box::pin(call.carry(stream, io, messages)).await,
        None => pending().await,
    }
}

/// The message of a unary call; None where the client has left.
async fn read_request(
    messages: &mut Messages,
    deadline: Option<Instant>,
    respond: &mut SendResponse<Frame>,
) -> Option<Result<Frame, Failure>> {
    let read = tokio::select! {
        biased;
        read = messages.at_most_one() => read,
        _ = passes(deadline) => return Some(Err(Failure::deadline())),
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return None,
    };
    Some(match read {
        Ok(Ok(Some(frame))) => Ok(frame),
        Ok(Ok(None)) => Err(Failure::new(Code::INVALID_ARGUMENT, "expected one message; got none")),
        Ok(Err(failure)) => Err(failure),
        Err(error) => Err(failure_of(&error, "client")),
    })
}

pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    match kind.strip_prefix(b"application/grpc") {
        Some(rest) => matches!(rest.first(), None | Some(b'+' | b';')),
        None => false,
    }
}

pub async fn passes(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

impl Call {
    fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(respond) = &mut *self.respond.borrow_mut() {
            return respond.poll_reset(cx).map(drop);
        }
        match &self.stream {
            Some(stream) => stream.poll_reset(cx),
            None => Poll::Pending,
        }
    }

    /// Reads and writes the messages of a stream until all is sent.
    async fn carry(&self, stream: &Stream, io: &Io, messages: &mut Messages) {
        let mut write = pin!(stream.write(io, self));
        tokio::select! {
            failure = stream.read(io, messages) => {
                io.common.refusals.count_failure(&failure);
                self.end(io, End::Failed(failure));
            }
            _ = &mut write => return,
        }
        write.await;
    }

    pub fn has_begun(&self) -> bool {
        self.exchange.borrow().is_some()
    }

    pub fn begin(&self, exchange: Py<Exchange>) {
        self.exchange.replace(Some(exchange));
    }

    pub fn take_exchange(&self) -> Option<Py<Exchange>> {
        self.exchange.take()
    }

    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    pub fn leave(&self, io: &Io, failure: Option<Failure>) {
        if !self.has_ended() {
            return self.end(io, End::Left(failure));
        }
        // It has ended, and its client takes no more of what was still to be sent.
        if let Some((code, _)) = self.stream.as_ref().and_then(Stream::abandon) {
            self.tell_ended(io, code, vec![]);
        }
    }

    /// Ends it, unless it has ended already.
    pub fn end(&self, io: &Io, end: End) {
        if self.ended.replace(true) {
            return;
        }
        let left = matches!(end, End::Left(_));
        self.shared.left.store(left, Ordering::Release);
        for attempt in self.attempts.take() {
            attempt.cancel();
        }
        let mut callbacks = self.on_cancel.take();
        if !left {
            callbacks.drain(..).for_each(|callback| io.tell(Event::Forget(callback)));
        }
        let end = self.checked(end);
        match &self.stream {
            Some(stream) if !left => stream.end(io, end),
            _ => {
                let code = end.code();
                self.finish(io, end);
                self.tell_ended(io, code, callbacks);
                self.over.raise();
            }
        }
    }

    /// An answer that is too large is a failure.
    fn checked(&self, end: End) -> End {
        let size = if let End::Ok { frame: Some(frame), .. } = &end { frame.size() } else { 0 };
        match check_size("Sent", size, self.server.service.message_bytes) {
            Ok(()) => end,
            Err(failure) => End::Failed(failure),
        }
    }

    pub fn tell_ended(&self, io: &Io, code: Code, callbacks: Vec<Py<PyAny>>) {
        if let Some(stream) = &self.stream {
            stream.forget(io);
        }
        if let Some(call) = io.calls.borrow().get(&self.shared.id) {
            io.tell(Event::Ended { call: call.clone(), code, callbacks });
        }
    }

    /// Sends the last of the answer.
    pub fn finish(&self, io: &Io, end: End) {
        let respond = self.respond.take();
        let Some(respond) = respond else {
            if let Some(stream) = &self.stream {
                stream.finish(end);
            }
            return;
        };
        match end {
            End::Ok { frame, trailers } => {
                let _ = succeed(io, &self.server, respond, frame, trailers); // else the client left: there is nobody to tell
            }
            End::Failed(failure) | End::Left(Some(failure)) => fail(respond, failure),
            End::Left(None) => {}
        }
    }

    pub fn on_cancel(&self, io: &Io, callback: Py<PyAny>) {
        match self.has_ended() {
            false => self.on_cancel.borrow_mut().push(callback),
            true if self.shared.has_left() => io.tell(Event::Callback(callback)),
            true => io.tell(Event::Forget(callback)),
        }
    }

    pub fn on_message(&self, io: &Io, callback: Py<PyAny>) {
        match &self.stream {
            Some(stream) if !self.has_ended() => stream.on_message(io, callback),
            _ => io.tell(Event::Forget(callback)),
        }
    }

    pub fn on_writable(&self, io: &Io, callback: Py<PyAny>) {
        match &self.stream {
            Some(stream) if !self.has_ended() => stream.on_writable(io, &self.shared, callback),
            _ => io.tell(Event::Forget(callback)),
        }
    }

    /// A message of a stream.
    pub fn send(&self, frame: Frame) {
        match &self.stream {
            Some(stream) if !self.has_ended() => stream.send(frame),
            _ => {}
        }
    }

    pub fn begin_attempt(&self, forward: Box<Forward>) {
        self.attempts.borrow_mut().push(forward.ask.cancel.clone());
        self.coming.borrow_mut().push(forward);
        self.task.wake();
    }

    pub fn attempt_ended(&self, attempt: &Cancel) {
        self.attempts.borrow_mut().retain(|each| !each.is(attempt));
    }
}

impl End {
    pub fn code(&self) -> Code {
        match self {
            End::Ok { .. } => Code::OK,
            End::Failed(failure) => failure.code,
            End::Left(_) => Code::CANCELLED,
        }
    }

    /// The last headers of an answer; None of a client that has left.
    pub fn trailers(self) -> Option<HeaderMap> {
        match self {
            End::Ok { mut trailers, .. } => {
                trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
                Some(trailers)
            }
            End::Failed(failure) | End::Left(Some(failure)) => Some(status_headers(failure)),
            End::Left(None) => None,
        }
    }
}

/// The head of an answer.
pub fn head(headers: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = headers;
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    response
}

fn succeed(
    io: &Io,
    server: &Rc<ServerHere>,
    mut respond: SendResponse<Frame>,
    frame: Option<Frame>,
    trailers: HeaderMap,
) -> Result<(), h2::Error> {
    let trailers = End::Ok { frame: None, trailers }.trailers().unwrap_or_default();
    let mut out = respond.send_response(head(HeaderMap::new()), false)?;
    if let Some(frame) = frame {
        out.reserve_capacity(frame.remaining());
        if out.capacity() < frame.remaining() {
            let answering = Answering::new(server);
            drop(spawn_local(send_as_read(io.common.clone(), out, frame, trailers, answering)));
            return Ok(());
        }
        out.send_data(frame, false)?;
    }
    out.send_trailers(trailers)
}

/// Sends an answer for which the client's window, or h2's buffer, has no room yet.
async fn send_as_read(
    common: Arc<Common>,
    mut out: SendStream<Frame>,
    frame: Frame,
    trailers: HeaderMap,
    answering: Answering,
) {
    answering.set(true);
    match send(&common, &mut out, frame, false).await {
        Some(()) => drop(out.send_trailers(trailers)), // else the client left: there is nobody to tell
        None => out.send_reset(Reason::CANCEL),
    }
}

/// Fails a call that the service has not seen.
fn refuse(io: &Io, respond: SendResponse<Frame>, failure: Failure) {
    io.common.refusals.count_failure(&failure);
    fail(respond, failure);
}

fn fail(mut respond: SendResponse<Frame>, failure: Failure) {
    let unimplemented = failure.code == Code::UNIMPLEMENTED;
    let mut headers = status_headers(failure);
    if unimplemented {
        headers.insert("grpc-accept-encoding", HeaderValue::from_static(ACCEPTED));
    }
    let _ = respond.send_response(head(headers), true); // else the client left: there is nobody to tell
}
