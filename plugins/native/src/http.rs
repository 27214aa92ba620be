//! Requests of HTTP that are not calls of gRPC: from the end of their headers to their answer, by HTTP/1 and HTTP/2 alike.

use crate::call::{is_grpc, passes};
use crate::events::Event;
use crate::http_body::{Body, Incomplete, Refusal, Unread};
use crate::io::{Common, Io};
use crate::listen::{Answering, ServerHere};
use crate::pace::Pace;
use crate::python::HttpExchange;
use crate::server::Service;
use crate::window::Window;
use bytes::Buf;
use dl_inference_grpc::{Failure, Frame, PREFIX, Reason, check_header_bytes};
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::header::{ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, Version};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// A whole answer.
pub type Answer = Response<Option<Frame>>;

/// What answers HTTP in Python: its attributes by their names, read once.
#[derive(FromPyObject)]
pub struct HttpService {
    /// `(exchange)`: a request of `paths` has come.
    pub begin: Py<PyAny>,
    /// `(exchange)`: any other request has come.
    pub begin_page: Py<PyAny>,
    /// `(exchange, which refusal, its detail)`: a request of `paths` has failed.
    pub fail: Py<PyAny>,
    paths: Vec<String>,
    body_bytes: usize,
    timeout_s: Option<f64>,
}

impl HttpService {
    /// As `http_exchange.is_among` has it.
    fn has(&self, path: &str) -> bool {
        self.paths.iter().any(|each| path == each || each.ends_with('/') && path.starts_with(each))
    }

    /// When a request that has come now is to have its answer.
    fn deadline(&self) -> Option<Instant> {
        let limit = self.timeout_s.and_then(|limit| Duration::try_from_secs_f64(limit).ok());
        limit.and_then(|limit| Instant::now().checked_add(limit))
    }
}

/// What every thread may read of an exchange.
pub struct HttpShared {
    pub id: u64,
    pub head: Parts,
    /// Written by the I/O thread alone.
    left: AtomicBool,
}

impl HttpShared {
    /// Whether the client has left, or the deadline passed, before the answer.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }
}

/// A request on its way. Lives on its I/O thread.
pub struct HttpCall {
    pub shared: Arc<HttpShared>,
    pub server: Rc<ServerHere>,
    pub service: Arc<HttpService>,
    pub deadline: Option<Instant>,
    /// Whether it belongs to the application, and not to the service.
    pub is_page: bool,
    pub exchange: RefCell<Option<Py<HttpExchange>>>,
    on_cancel: RefCell<Vec<Py<PyAny>>>,
    ended: Cell<bool>,
    answer: RefCell<Option<Answer>>,
    answered: Notify,
}

impl HttpCall {
    /// Ends it with `answer`, unless it has ended already.
    pub fn end(&self, io: &Io, answer: Answer) {
        if !self.ended.replace(true) {
            self.answer.replace(Some(answer));
            self.answered.notify_one();
            self.on_cancel.take().into_iter().for_each(|callback| io.tell(Event::Forget(callback)));
        }
    }

    /// The client has left, or the deadline has passed. Without an answer, it has not ended.
    fn leave(&self, io: &Io) {
        if !self.ended.get() {
            self.shared.left.store(true, Ordering::Release);
            self.on_cancel.take().into_iter().for_each(|callback| io.tell(Event::Callback(callback)));
        }
    }

    /// The server ends before it has an answer.
    pub fn cancel(&self, io: &Io) {
        self.leave(io);
        self.end(io, plain(io, StatusCode::SERVICE_UNAVAILABLE, "The server is shutting down.\n"));
    }

    pub fn on_cancel(&self, io: &Io, callback: Py<PyAny>) {
        match (self.shared.has_left(), self.ended.get()) {
            (true, _) => io.tell(Event::Callback(callback)),
            (false, true) => io.tell(Event::Forget(callback)),
            (false, false) => self.on_cancel.borrow_mut().push(callback),
        }
    }

    async fn answered(&self) -> Answer {
        loop {
            if let Some(answer) = self.answer.take() {
                return answer;
            }
            self.answered.notified().await;
        }
    }
}

/// Commands reach the request for as long as this lives. Where it is dropped without an answer, the client has left.
struct Known(Rc<Io>, Rc<HttpCall>);

impl Known {
    fn new(io: Rc<Io>, call: HttpCall) -> Known {
        let call = Rc::new(call);
        io.http_calls.borrow_mut().insert(call.shared.id, call.clone());
        Known(io, call)
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let Known(io, call) = self;
        io.http_calls.borrow_mut().remove(&call.shared.id);
        call.leave(io);
        if let Some(exchange) = call.exchange.take() {
            io.tell(Event::Forget(exchange.into_any()));
        }
    }
}

/// Takes a request from its headers to its answer. Is dropped where the client leaves.
pub async fn answer(io: Rc<Io>, server: Rc<ServerHere>, head: Parts, body: Incomplete) -> Answer {
    let verb = head.method.clone();
    let answer = match (refused(&io, &server.service, &head), server.service.http.clone()) {
        (Some(refused), _) => refused,
        (None, Some(service)) => {
            let id = io.next_id();
            let is_page = !service.has(head.uri.path());
            let call = HttpCall {
                shared: Arc::new(HttpShared { id, head, left: AtomicBool::new(false) }),
                server,
                deadline: if is_page { None } else { service.deadline() },
                service,
                is_page,
                exchange: RefCell::default(),
                on_cancel: RefCell::default(),
                ended: Cell::new(false),
                answer: RefCell::default(),
                answered: Notify::new(),
            };
            answer_by_python(&Known::new(io.clone(), call), body).await
        }
        (None, None) => not_a_call(&io, &head),
    };
    complete(answer, &verb)
}

async fn answer_by_python(Known(io, call): &Known, body: Incomplete) -> Answer {
    let limit = call.service.body_bytes;
    let read = body.read(&call.shared.head.headers, limit, !call.is_page, io.charge());
    let read = tokio::select! {
        biased;
        answer = call.answered() => return answer, // the server drains
        read = timeout(io.common.settings.body_timeout(), read) => read,
        _ = passes(call.deadline) => Ok(Err(Refusal::TookTooLong.into())),
    };
    match read {
        Ok(Ok(body)) => begin(io, call, body).await,
        Ok(Err(Unread::Refused(refusal))) => {
            refusal.reason().into_iter().for_each(|reason| io.refused(reason));
            if call.is_page { refuse_page(io, &refusal) } else { fail(io, call, refusal).await }
        }
        // Nobody hears it.
        Ok(Err(Unread::Left)) => plain(io, StatusCode::BAD_REQUEST, "The body of the request ends early.\n"),
        Ok(Err(Unread::Broken)) => {
            io.refused(Reason::MalformedHttp);
            plain(io, StatusCode::BAD_REQUEST, "The body of the request is malformed.\n")
        }
        Err(_) => {
            io.refused(Reason::BodyTime);
            plain(io, StatusCode::REQUEST_TIMEOUT, "The body of the request took too long to come.\n")
        }
    }
}

async fn begin(io: &Io, call: &Rc<HttpCall>, body: Body) -> Answer {
    io.tell(Event::BeginHttp(call.clone(), body));
    tokio::select! {
        biased;
        answer = call.answered() => answer,
        _ = passes(call.deadline) => fail(io, call, Refusal::TookTooLong).await,
    }
}

/// Has the service answer that the request has failed.
async fn fail(io: &Io, call: &Rc<HttpCall>, refusal: Refusal) -> Answer {
    call.leave(io);
    io.tell(Event::FailHttp(call.clone(), refusal));
    call.answered().await
}

/// The answer to a request that is refused by its headers.
fn refused(io: &Io, service: &Service, head: &Parts) -> Option<Answer> {
    if let Err(Failure { message, .. }) = check_header_bytes(&head.headers, io.common.settings.header_bytes()) {
        io.refused(Reason::HeaderBytes);
        return Some(plain(io, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &format!("{message}\n")));
    }
    // RFC 9112, section 3.2: proxies that take different ones of several hosts can be played off against each other.
    if head.version == Version::HTTP_11 && head.headers.get_all(HOST).iter().count() != 1 {
        io.refused(Reason::MalformedHttp);
        return Some(plain(io, StatusCode::BAD_REQUEST, "Expected one header Host.\n"));
    }
    service.methods.contains_key(head.uri.path()).then(|| not_a_call(io, head))
}

/// The answer to what would have to be a call of gRPC.
fn not_a_call(io: &Io, head: &Parts) -> Answer {
    if head.method != Method::POST {
        let mut answer = plain(io, StatusCode::METHOD_NOT_ALLOWED, "A method of gRPC: expected POST.\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
        return answer;
    }
    if !is_grpc(&head.headers) {
        let said = "A method of gRPC: expected the content type application/grpc.\n";
        return plain(io, StatusCode::UNSUPPORTED_MEDIA_TYPE, said);
    }
    plain(io, StatusCode::HTTP_VERSION_NOT_SUPPORTED, "A method of gRPC, which needs HTTP/2.\n")
}

/// The answer to a request of the application that is refused by its body.
fn refuse_page(io: &Io, refusal: &Refusal) -> Answer {
    match refusal {
        Refusal::NoRoom => plain(io, StatusCode::SERVICE_UNAVAILABLE, "The server holds as many bytes as it may.\n"),
        _ => plain(io, StatusCode::PAYLOAD_TOO_LARGE, "The body of the request is too large.\n"),
    }
}

fn plain(io: &Io, status: StatusCode, said: &str) -> Answer {
    let frame = Frame::build(said.len(), io.charge(), |place| {
        place.copy_from_slice(said.as_bytes());
        Ok::<_, Failure>(())
    });
    let mut answer = Response::new(frame.ok());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// `answer` as it goes out: with its length, without what belongs to a connection, and without a body where none may be.
fn complete(answer: Answer, verb: &Method) -> Answer {
    let (mut head, mut body) = answer.into_parts();
    let (keep_alive, proxy) = (HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection"));
    for name in [CONNECTION, keep_alive, proxy, TE, TRANSFER_ENCODING, UPGRADE] {
        head.headers.remove(name);
    }
    if let Some(frame) = &mut body {
        frame.advance(PREFIX); // gRPC's
    }
    let size = body.as_ref().map_or(0, Buf::remaining);
    let has_no_body = matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if has_no_body {
        head.headers.remove(CONTENT_LENGTH);
    } else if verb != Method::HEAD || !head.headers.contains_key(CONTENT_LENGTH) {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
    }
    let is_empty = has_no_body || verb == Method::HEAD || size == 0;
    Response::from_parts(head, if is_empty { None } else { body })
}

/// Answers a request that has come on a stream of HTTP/2.
pub async fn answer_stream(
    io: Rc<Io>,
    server: Rc<ServerHere>,
    window: Rc<Window>,
    head: Parts,
    body: RecvStream,
    respond: SendResponse<Frame>,
) {
    let respond = Rc::new(RefCell::new(respond));
    let waits =
        head.headers.get(EXPECT).is_some_and(|expected| expected.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let body = Incomplete::Http2 { stream: body, window, awaited: waits.then(|| respond.clone()) };
    let common = io.common.clone();
    let answering = Answering::new(&server);
    let answer = tokio::select! {
        biased;
        answer = answer(io, server, head, body) => answer,
        _ = poll_fn(|cx| respond.borrow_mut().poll_reset(cx)) => return,
    };
    answering.set(true);
    let (head, body) = answer.into_parts();
    let out = respond.borrow_mut().send_response(Response::from_parts(head, ()), body.is_none());
    if let (Ok(mut out), Some(frame)) = (out, body)
        && send(&common, &mut out, frame, true).await.is_none()
    {
        out.send_reset(h2::Reason::CANCEL); // where the client has left, there is nobody to tell
    }
}

/// Sends as much as the client takes at a time; `last` says whether the stream ends with it. None where the client has
/// left, or is too slow: an answer that nobody reads would use the budget for ever.
pub async fn send(common: &Common, out: &mut SendStream<Frame>, mut frame: Frame, last: bool) -> Option<()> {
    let mut pace = Pace::new(common.settings.body_timeout());
    while frame.has_remaining() {
        out.reserve_capacity(frame.remaining());
        let Some(room) = pace.keep(poll_fn(|cx| out.poll_capacity(cx))).await else {
            if pace.is_too_slow(&common.budget) {
                common.refusals.count(Reason::SlowReader);
                return None;
            }
            continue;
        };
        let part = frame.split_to(room?.ok()?);
        pace.took(part.remaining());
        out.send_data(part, last && !frame.has_remaining()).ok()?;
    }
    Some(())
}
