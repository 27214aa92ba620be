//! A writer for HTTP/2 connections: small writes wait until the connection's task has nothing more to do, large ones go
//! through.

use crate::pace::Pace;
use dl_inference_grpc::Budget;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Writes of fewer bytes than this are copied and held.
const SMALL: usize = 16 << 10;
/// No more than this is held.
const HELD: usize = 64 << 10;
/// A buffer of more than this is given back when it is empty; a smaller one stays until the connection rests.
const KEPT: usize = 16 << 10;

struct Inner<T> {
    stream: T,
    held: Vec<u8>,
    heard: bool,
    closed: bool,
    /// Whether the stream may hold bytes of its own, as TLS does, and so is to be flushed.
    unflushed: bool,
    /// Whether the last write waits for the other side to read.
    blocked: bool,
    /// Since a write had to wait, until all is written.
    stuck: Option<Pace>,
    /// How long the other side may take too little, where somebody asks `is_too_slow`.
    patience: Duration,
}

/// h2 asks for a flush after each frame that it does not copy. `Coalesce` ignores that, and whoever polls the connection
/// calls `send` once the poll is pending. One system call then carries the frames of many streams.
pub struct Coalesce<T>(Rc<RefCell<Inner<T>>>);

impl<T> Clone for Coalesce<T> {
    fn clone(&self) -> Self {
        Coalesce(self.0.clone())
    }
}

impl<T: AsyncWrite + Unpin> Coalesce<T> {
    /// `patience` is how long the other side may take too little of what is written.
    pub fn new(stream: T, patience: Duration) -> Self {
        Coalesce(Rc::new(RefCell::new(Inner {
            stream,
            held: Vec::new(),
            heard: true,
            closed: false,
            unflushed: false,
            blocked: false,
            stuck: None,
            patience,
        })))
    }

    /// Writes what is held.
    pub fn send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().send(cx)
    }

    /// Whether there is more to write than the other side takes.
    pub fn is_stuck(&self) -> bool {
        self.0.borrow().stuck.is_some()
    }

    /// When to ask `is_too_slow`; None where nothing waits for the other side.
    pub fn patience_ends(&self) -> Option<Instant> {
        self.0.borrow().stuck.as_ref().map(Pace::until)
    }

    /// Whether the other side is to be given up, because it takes too little of what is written.
    pub fn is_too_slow(&self, budget: &Budget) -> bool {
        match &mut self.0.borrow_mut().stuck {
            Some(pace) => Instant::now() >= pace.until() && pace.is_too_slow(budget),
            None => false,
        }
    }

    /// Whether the other side has closed the connection, or reading failed.
    pub fn is_closed(&self) -> bool {
        self.0.borrow().closed
    }

    pub fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Whether anything was received since the last call of this. Where nothing was, the connection rests, and keeps no
    /// buffer.
    pub fn was_heard(&self) -> bool {
        let mut inner = self.0.borrow_mut();
        if !inner.heard && inner.held.is_empty() {
            inner.held = Vec::new();
        }
        std::mem::take(&mut inner.heard)
    }

    /// Polls a connection; where it has nothing more to do, sends what it wrote.
    pub fn poll_and_send<R>(&self, cx: &mut Context<'_>, poll: impl FnOnce(&mut Context<'_>) -> Poll<R>) -> Poll<R> {
        let polled = poll(cx);
        if polled.is_pending() {
            let _ = self.send(cx); // an error comes back with the next read
        }
        polled
    }
}

impl<T: AsyncWrite + Unpin> Inner<T> {
    /// Notes how the other side gets on with what is written.
    fn noted(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.heard |= self.blocked && written.is_ready(); // it has read some
        self.blocked = written.is_pending();
        match (&mut self.stuck, &written) {
            (stuck, Poll::Pending) => drop(stuck.get_or_insert_with(|| Pace::new(self.patience))),
            (Some(pace), Poll::Ready(Ok(bytes))) => pace.took(*bytes),
            _ => {}
        }
        written
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let written = Pin::new(&mut self.stream).poll_write(cx, &self.held);
            let written = ready!(self.noted(written))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.held.drain(..written);
        }
        if self.held.capacity() > KEPT {
            self.held = Vec::new();
        }
        if self.unflushed {
            let flushed = Pin::new(&mut self.stream).poll_flush(cx);
            if flushed.is_pending() {
                self.stuck.get_or_insert_with(|| Pace::new(self.patience));
            }
            ready!(flushed)?;
            self.unflushed = false;
        }
        if !self.blocked {
            self.stuck = None; // all is written
        }
        Poll::Ready(Ok(()))
    }

    fn write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let size = slices.iter().map(|slice| slice.len()).sum::<usize>();
        if size < SMALL {
            if self.held.len() + size > HELD {
                ready!(self.send(cx))?;
            }
            for slice in slices {
                self.held.extend_from_slice(slice);
            }
            return Poll::Ready(Ok(size));
        }
        loop {
            // What is held and what comes now, in one call.
            let mut all = Vec::with_capacity(slices.len() + 1);
            all.push(IoSlice::new(&self.held));
            all.extend(slices.iter().map(|slice| IoSlice::new(slice)));
            let written = Pin::new(&mut self.stream).poll_write_vectored(cx, &all);
            let written = ready!(self.noted(written))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            let held = written.min(self.held.len());
            self.held.drain(..held);
            if written > held {
                return Poll::Ready(Ok(written - held));
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Coalesce<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut inner.stream).poll_read(cx, buf));
        inner.heard = true;
        inner.closed = read.is_err() || buf.filled().len() == before;
        Poll::Ready(read)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Coalesce<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.send(cx))?;
        Pin::new(&mut inner.stream).poll_shutdown(cx)
    }
}
