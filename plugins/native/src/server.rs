//! Connections of clients: TLS, what they speak, HTTP/2, signs of life, and how they end.

use crate::call;
use crate::coalesce::Coalesce;
use crate::http::HttpService;
use crate::http1;
use crate::io::Io;
use crate::listen::{Answering, ServerHere, Stage, reached};
use crate::signs::Signs;
use crate::socket::{Plain, Socket, Spoken, Wire, sniff};
use crate::tls::Newest;
use crate::window::{LARGE, SMALL, Window};
use dl_inference_grpc::{Budget, Frame, Reason};
use dl_inference_wire::KeyFields;
use h2::PingPong;
use h2::server::Connection;
use http::uri::PathAndQuery;
use pyo3::prelude::*;
use pyo3::types::PyString;
use rustls::ServerConfig;
use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsStream};

/// A window that nobody fills, of the whole connection: each stream has its own, so that no stream can take the others'
/// room. With the connection's own, answers that nobody reads would stop all other streams.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Frames of large messages are cheaper the larger they are: 1,196 µs became 796 µs per request of 600 KB.
pub const FRAME_BYTES: u32 = 256 << 10;
/// What h2 decodes of the headers of one call. Beyond `header_kb` and up to here, a call is refused alone; with four
/// times as much, h2 ends the connection.
pub const DECODED_HEADERS: u32 = 128 << 10;
/// Overhead of tiny DATA frames that wait on one connection: a window of 64 KiB full of frames of 7 bytes has 2.3 MB.
pub const SMALL_FRAMES: usize = 8 << 20;
/// Calls of one connection that are cancelled before they were looked at. By default h2 ends the connection at the 21st:
/// a gateway that cancels 50 hedges at once would lose it.
const CANCELLED_AT_ONCE: usize = 1024;
/// Streams that were reset here, of which late frames are passed over; and how many late frames of other streams a
/// connection may send in its life. Each costs no more than the frame does.
const RESET_STREAMS: usize = 1024;
const LATE_FRAMES: usize = 10_000;

const NOT_HTTP2: &[u8] =
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n\
    This port speaks gRPC, which needs HTTP/2.\n";
const CLEAR_TEXT: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n\
    This port speaks clear text, not TLS.\n";
/// How long an answer to what is not HTTP/2 may take to go out.
const REFUSAL: Duration = Duration::from_secs(1);

/// A `Method` of Python.
pub struct ServedMethod {
    /// As Python has it.
    pub path: Py<PyString>,
    pub streams: bool,
    /// As a request to a node has it.
    pub sent: PathAndQuery,
    /// Where the routing key stands in a request.
    pub key: Option<KeyFields>,
}

impl ServedMethod {
    /// Its path, if that is `path`.
    pub fn path_if(&self, path: &str) -> Option<PathAndQuery> {
        (self.sent == path).then(|| self.sent.clone())
    }
}

/// A `Service` of Python: read once, when it is served.
pub struct Service {
    pub begin_all: Py<PyAny>,
    pub ended_all: Py<PyAny>,
    /// By path.
    pub methods: HashMap<String, Arc<ServedMethod>>,
    pub private_trailers: HashSet<String>,
    pub message_bytes: usize,
    pub connections: usize,
    pub streams: u32,
    pub tls: Option<Arc<Newest<ServerConfig>>>,
    /// What answers HTTP that is not gRPC; None refuses it.
    pub http: Option<Arc<HttpService>>,
    /// Connections of all I/O threads, and of each.
    pub connected: AtomicUsize,
    pub by_thread: Vec<AtomicUsize>,
}

impl Service {
    /// A connection of the I/O thread `index` has ended.
    pub fn disconnected(&self, index: usize) {
        self.connected.fetch_sub(1, Ordering::Relaxed);
        if let Some(count) = self.by_thread.get(index) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

type Http2 = Connection<Coalesce<Socket>, Frame>;

/// Serves the connection of a client until it ends.
pub async fn connection(io: &Rc<Io>, server: &Rc<ServerHere>, plain: Plain) {
    let mut stage = server.stage();
    let until = Instant::now() + io.common.settings.headers_timeout();
    let made = tokio::select! {
        made = timeout_at(until, handshakes(io, server, plain)) => made,
        _ = reached(&mut stage, Stage::Draining) => return,
    };
    match made {
        Ok(Some(Made::Http2(writer, connection))) => {
            serve(io, server, &writer, *connection).await;
            let _ = timeout(REFUSAL, poll_fn(|cx| writer.send(cx))).await;
        }
        Ok(Some(Made::Http1(socket))) => Box::pin(http1::serve(io, server, socket)).await,
        Ok(Some(Made::Other(socket, why))) => refuse(io, socket, why).await,
        Ok(None) => {}
        Err(_) => io.refused(Reason::HandshakeTime),
    }
}

/// A connection after its handshakes.
enum Made {
    Http2(Coalesce<Socket>, Box<Http2>),
    Http1(Socket),
    /// What the port does not speak, and what is said to that.
    Other(Socket, &'static [u8]),
}

async fn handshakes(io: &Io, server: &ServerHere, plain: Plain) -> Option<Made> {
    let service = &server.service;
    let wire = match &service.tls {
        Some(newest) => {
            let accepted = TlsAcceptor::from(newest.get()).accept(plain).await;
            let stream = accepted.inspect_err(|error| count_failed(io, error)).ok()?;
            Wire::Tls(Box::new(TlsStream::Server(stream)))
        }
        None => Wire::Plain(Box::new(plain)),
    };
    let mut socket = Socket::of_client(wire);
    match sniff(&mut socket).await.ok()? {
        Spoken::Http2 => {}
        Spoken::Tls => return Some(Made::Other(socket, CLEAR_TEXT)),
        Spoken::Other if service.http.is_some() => return Some(Made::Http1(socket.without_authorities())),
        Spoken::Other => return Some(Made::Other(socket, NOT_HTTP2)),
    }
    let writer = Coalesce::new(socket, io.common.settings.body_timeout());
    let handshake = h2::server::Builder::new()
        .initial_window_size(SMALL)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(DECODED_HEADERS)
        .max_concurrent_streams(service.streams)
        .max_pending_accept_reset_streams(CANCELLED_AT_ONCE)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(LATE_FRAMES))
        .data_frame_budget(SMALL_FRAMES)
        .handshake(writer.clone());
    let mut handshake = pin!(handshake);
    let connection = poll_fn(|cx| writer.poll_and_send(cx, |cx| handshake.as_mut().poll(cx))).await;
    let connection = connection.inspect_err(|error| count_error(io, error)).ok()?;
    Some(Made::Http2(writer, Box::new(connection)))
}

/// Counts a handshake of TLS that the client did not just leave.
fn count_failed(io: &Io, error: &std::io::Error) {
    if !matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) {
        io.refused(Reason::Handshake);
    }
}

/// Counts a connection that ends here because of its client.
fn count_error(io: &Io, error: &h2::Error) {
    if error.is_library() {
        let flood = error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
        io.refused(if flood { Reason::Flood } else { Reason::Http2 });
    }
}

/// Says why, then closes, once the client has: to close first would lose what was said.
async fn refuse(io: &Io, mut socket: Socket, why: &[u8]) {
    io.refused(Reason::OtherProtocol);
    let said = async {
        socket.write_all(why).await?;
        socket.shutdown().await?;
        while socket.read(&mut [0; 1024]).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = timeout(REFUSAL, said).await;
}

async fn serve(io: &Rc<Io>, server: &Rc<ServerHere>, writer: &Coalesce<Socket>, mut connection: Http2) {
    let mut stage = server.stage();
    let mut next = Stage::Draining;
    let mut vitals = Vitals::new(io, connection.ping_pong());
    let window = Rc::new(Window::default());
    let answering = Answering::new(server);
    let mut tick = pin!(sleep_until(vitals.next));
    loop {
        tokio::select! {
            // First, so that a call costs none of the rest; each read of the socket gives the others their turn.
            biased;
            accepted = poll_fn(|cx| {
                let accepted = writer.poll_and_send(cx, |cx| connection.poll_accept(cx));
                if next == Stage::Closed {
                    answering.set(writer.is_stuck());
                }
                accepted
            }) => match accepted {
                Some(Ok((request, respond))) => {
                    vitals.idle_since = None;
                    drop(spawn_local(call::run(io.clone(), server.clone(), window.clone(), request, respond)));
                }
                Some(Err(error)) => return count_error(io, &error),
                None => return,
            },
            _ = reached(&mut stage, next) => {
                if next == Stage::Closed {
                    return;
                }
                connection.graceful_shutdown(); // the last id is said after a PING, so that no call is lost
                next = Stage::Closed;
            }
            _ = window.wants_to_grow(&io.common.budget) => {
                window.grew(connection.set_initial_window_size(LARGE).is_ok());
            }
            _ = &mut tick => {
                match vitals.check(writer, connection.has_streams(), &io.common.budget) {
                    Verdict::Fine => {}
                    Verdict::Retire => connection.graceful_shutdown(),
                    Verdict::Dead(reason) => return io.refused(reason),
                }
                tick.as_mut().reset(vitals.next);
            }
        }
    }
}

/// When a connection that is made now is to end. A tenth sooner or later, so that clients that came together do not come
/// back together.
pub fn retirement(io: &Io) -> Option<Instant> {
    let spread = 0.9 + 0.2 * ((io.next_id() * 37 % 100) as f64 / 100.0);
    io.common.settings.connection_age().map(|age| Instant::now() + age.mul_f64(spread))
}

#[derive(PartialEq)]
enum Verdict {
    Fine,
    /// It is to end once its calls have.
    Retire,
    /// It is to end at once.
    Dead(Reason),
}

/// When a connection was last heard of, and when it is to end.
struct Vitals {
    signs: Signs,
    idle_timeout: Option<Duration>,
    retires: Option<Instant>,
    idle_since: Option<Instant>,
    /// When to check.
    next: Instant,
}

impl Vitals {
    fn new(io: &Io, ping_pong: Option<PingPong>) -> Vitals {
        let settings = &io.common.settings;
        let now = Instant::now();
        let mut vitals = Vitals {
            signs: Signs::new(settings.keepalive(), settings.keepalive_timeout(), Duration::ZERO, ping_pong),
            idle_timeout: settings.idle_timeout(),
            retires: retirement(io),
            idle_since: Some(now),
            next: now,
        };
        vitals.set_next(now);
        vitals
    }

    fn set_next(&mut self, now: Instant) {
        let idle = self.idle_timeout.map(|limit| self.idle_since.unwrap_or(now) + limit);
        self.next = [idle, self.retires].into_iter().flatten().fold(self.signs.next(), Instant::min);
    }

    fn check(&mut self, writer: &Coalesce<Socket>, busy: bool, budget: &Budget) -> Verdict {
        let now = Instant::now();
        self.idle_since = if busy { None } else { self.idle_since.or(Some(now)) };
        let mut verdict = Verdict::Fine;
        if !self.signs.check(writer.was_heard(), true) {
            return Verdict::Dead(Reason::Silence);
        }
        if writer.is_too_slow(budget) {
            return Verdict::Dead(Reason::SlowReader);
        }
        let is_idle = |limit| self.idle_since.is_some_and(|since| now >= since + limit);
        if self.retires.is_some_and(|at| now >= at) || self.idle_timeout.is_some_and(is_idle) {
            (self.retires, self.idle_timeout) = (None, None);
            verdict = Verdict::Retire;
        }
        self.set_next(now);
        self.next = writer.patience_ends().into_iter().fold(self.next, Instant::min);
        verdict
    }
}
