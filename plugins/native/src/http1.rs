//! Connections of clients that speak HTTP/1: hyper parses and frames, and here are their times.

use crate::http::answer;
use crate::http_body::Incomplete;
use crate::io::{Common, Io};
use crate::listen::{Answering, ServerHere, Stage, reached};
use crate::pace::Pace;
use crate::server::retirement;
use crate::settings::Settings;
use crate::socket::Socket;
use dl_inference_grpc::{Frame, Reason};
use hyper::body::{Body, Frame as BodyFrame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

/// Of a head that is too large, and of a body, no more is read ahead.
const BUFFER: usize = 256 << 10;
/// How long a client may take to close a connection that was closed here: what it was told last would else be lost where
/// it still sends.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serves a connection until it ends.
pub async fn serve(io: &Rc<Io>, server: &Rc<ServerHere>, socket: Socket) {
    let settings = &io.common.settings;
    let progress = Rc::new(Progress::new(settings.body_timeout()));
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| {
        progress.enter(Doing::Answering);
        let (head, body) = request.into_parts();
        let answer = answer(io.clone(), server.clone(), head, Incomplete::Http1(body));
        let progress = progress.clone();
        async { Ok::<_, Infallible>(answer.await.map(|frame| Whole { frame, progress })) }
    });
    let watched = Watched { socket, progress: progress.clone() };
    let mut connection = http1::Builder::new()
        .max_buf_size(BUFFER)
        .max_header_size(settings.header_bytes())
        .header_read_timeout(None) // hyper's counts from the answer before, and so would end connections that are idle
        .serve_connection(TokioIo::new(watched), service);
    let mut stage = server.stage();
    let mut next = Stage::Draining;
    let answering = Answering::new(server);
    let mut retires = retirement(io);
    let mut tick = pin!(sleep_until(progress.next_check(settings, retires)));
    loop {
        tokio::select! {
            biased;
            ended = poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                if next == Stage::Closed {
                    answering.set(progress.is_answering());
                }
                ended
            }) => {
                if let Err(error) = ended {
                    count_error(io, &error);
                }
                break;
            }
            _ = reached(&mut stage, next) => {
                if next == Stage::Closed {
                    return;
                }
                Pin::new(&mut connection).graceful_shutdown();
                next = Stage::Closed;
            }
            _ = &mut tick => {
                let now = Instant::now();
                if let Some(reason) = progress.is_dead(&io.common, now) {
                    return io.refused(reason);
                }
                if retires.is_some_and(|at| now >= at) || progress.is_idle_too_long(settings, now) {
                    retires = None;
                    Pin::new(&mut connection).graceful_shutdown();
                }
                tick.as_mut().reset(progress.next_check(settings, retires));
            }
        }
    }
    connection.into_parts().io.into_inner().until_closed(&mut stage).await;
}

/// Counts a connection whose request could not be read.
fn count_error(io: &Io, error: &hyper::Error) {
    if error.is_parse_too_large() {
        io.refused(Reason::HeaderBytes);
    } else if error.is_parse() {
        io.refused(Reason::MalformedHttp);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    /// The head of a request comes, or the first one is awaited.
    Reading,
    /// A request is answered; its body may still come.
    Answering,
    /// The client may send another request.
    Idle,
}

/// What a connection is in the middle of.
struct Progress {
    doing: Cell<(Doing, Instant)>,
    /// Since a write had to wait for the client, until all is sent.
    stuck: RefCell<Option<Pace>>,
    /// How long the client may take too little.
    patience: Duration,
    /// Whether the client has closed the connection.
    closed: Cell<bool>,
}

impl Progress {
    fn new(patience: Duration) -> Progress {
        let doing = Cell::new((Doing::Reading, Instant::now()));
        Progress { doing, stuck: RefCell::default(), patience, closed: Cell::new(false) }
    }

    fn enter(&self, doing: Doing) {
        self.doing.set((doing, Instant::now()));
    }

    fn has_read(&self, bytes: usize) {
        self.closed.set(bytes == 0);
        if bytes > 0 && self.doing.get().0 == Doing::Idle {
            self.enter(Doing::Reading);
        }
    }

    /// Notes what a write came to; what was written may still be held by TLS.
    fn has_written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match (&written, &mut *self.stuck.borrow_mut()) {
            (Poll::Ready(Ok(bytes)), Some(pace)) => pace.took(*bytes),
            (Poll::Pending, stuck) => {
                stuck.get_or_insert_with(|| Pace::new(self.patience));
            }
            _ => {}
        }
        written
    }

    /// Notes what a flush came to, which follows when all is written.
    fn has_flushed(&self, flushed: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
        if flushed.is_pending() {
            self.stuck.borrow_mut().get_or_insert_with(|| Pace::new(self.patience));
        } else if self.stuck.take().is_some() && self.doing.get().0 == Doing::Reading {
            // The next request may have begun while the answer went out: its time for headers begins now.
            self.enter(Doing::Reading);
        }
        flushed
    }

    fn is_answering(&self) -> bool {
        self.doing.get().0 == Doing::Answering || self.stuck.borrow().is_some()
    }

    /// Why the connection is to be closed, if it is.
    fn is_dead(&self, common: &Common, now: Instant) -> Option<Reason> {
        let (doing, since) = self.doing.get();
        match &mut *self.stuck.borrow_mut() {
            Some(pace) => (now >= pace.until() && pace.is_too_slow(&common.budget)).then_some(Reason::SlowReader),
            None if doing == Doing::Reading => {
                (now >= since + common.settings.headers_timeout()).then_some(Reason::HeadersTime)
            }
            None => None,
        }
    }

    fn is_idle_too_long(&self, settings: &Settings, now: Instant) -> bool {
        let (doing, since) = self.doing.get();
        doing == Doing::Idle && settings.idle_timeout().is_some_and(|limit| now >= since + limit)
    }

    /// A request that begins, or a client that stops reading, in between is seen at the check after: up to one such
    /// interval late.
    fn next_check(&self, settings: &Settings, retires: Option<Instant>) -> Instant {
        let now = Instant::now();
        let (doing, since) = self.doing.get();
        let most = settings.headers_timeout().min(settings.body_timeout());
        let ends = match doing {
            Doing::Reading => Some(since + settings.headers_timeout()),
            Doing::Answering => None,
            Doing::Idle => settings.idle_timeout().map(|limit| since + limit),
        };
        [ends, retires].into_iter().flatten().filter(|at| *at > now).fold(now + most, Instant::min)
    }
}

/// The body of an answer: one piece.
struct Whole {
    frame: Option<Frame>,
    progress: Rc<Progress>,
}

impl Body for Whole {
    type Data = Frame;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Frame>, Infallible>>> {
        Poll::Ready(self.frame.take().map(|frame| Ok(BodyFrame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.frame.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.frame.as_ref().map_or(0, |frame| bytes::Buf::remaining(frame) as u64))
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        self.progress.enter(Doing::Idle);
    }
}

/// A socket that notes how a connection gets on.
struct Watched {
    socket: Socket,
    progress: Rc<Progress>,
}

impl Watched {
    /// Passes over what the client still sends.
    async fn until_closed(mut self, stage: &mut watch::Receiver<Stage>) {
        let closed = async {
            while !self.progress.closed.get() && self.socket.read(&mut [0; 1024]).await.is_ok_and(|n| n > 0) {}
        };
        tokio::select! {
            _ = timeout(GOODBYE, closed) => {}
            _ = reached(stage, Stage::Closed) => {}
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        self.progress.has_read(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.progress.has_written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.progress.has_written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(cx);
        self.progress.has_flushed(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
