//! A connection of which small writes go out together.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, BufWriter, ReadBuf};

/// As h2load: the largest of which no server's arithmetic is in danger. A window that fills would pause the other side.
pub const WINDOW: u32 = (1 << 30) - 1;
/// Frames of so many bytes go out in one system call; larger frames pass by the buffer.
const BUFFER: usize = 64 << 10;

/// A stream whose writes wait until whoever polls the connection has nothing more to do.
///
/// h2 asks for a flush after every frame that it does not copy: with 128 requests in flight that is as many system calls.
#[derive(Debug)]
pub struct Together<T>(Rc<RefCell<BufWriter<T>>>);

impl<T> Clone for Together<T> {
    fn clone(&self) -> Self {
        Together(Rc::clone(&self.0))
    }
}

impl<T: AsyncWrite + Unpin> Together<T> {
    pub fn new(stream: T) -> Self {
        Together(Rc::new(RefCell::new(BufWriter::with_capacity(BUFFER, stream))))
    }

    /// Polls, and sends what that has written, once there is nothing more to do.
    pub fn poll_then_send<R>(&self, cx: &mut Context<'_>, poll: impl FnOnce(&mut Context<'_>) -> Poll<R>) -> Poll<R> {
        let polled = poll(cx);
        if polled.is_pending() {
            let _ = Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx); // an error comes back with the next write
        }
        polled
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Together<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Together<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}
