//! A call whose messages stream in both directions: one message is read for each that is asked for, and messages are
//! sent as the client's window has room for them.

use crate::body::{Messages, failure_of};
use crate::call::{Call, End, Shared, head};
use crate::events::Event;
use crate::io::Io;
use crate::pace::Pace;
use bytes::Buf;
use dl_inference_grpc::{Code, Failure, Frame};
use h2::{Reason, SendStream};
use http::HeaderMap;
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// Bytes that wait to be sent, from which on the service is told to wait: four of HTTP/2's first windows.
pub const MOST_UNSENT: usize = 256 << 10;

/// The state of a stream, beside that of its call.
#[derive(Default)]
pub struct Stream {
    out: RefCell<Option<SendStream<Frame>>>,
    outgoing: RefCell<VecDeque<Frame>>,
    /// How it is to end, once all that waits is sent.
    ending: RefCell<Option<End>>,
    /// Whether a frame was sent in part.
    cut: Cell<bool>,
    changed: Notify,
    on_message: RefCell<Option<Py<PyAny>>>,
    asked: Notify,
    on_writable: RefCell<Option<Py<PyAny>>>,
}

impl Stream {
    pub fn on_message(&self, io: &Io, callback: Py<PyAny>) {
        if let Some(before) = self.on_message.replace(Some(callback)) {
            io.tell(Event::Forget(before));
        }
        self.asked.notify_one();
    }

    pub fn on_writable(&self, io: &Io, shared: &Shared, callback: Py<PyAny>) {
        if shared.unsent.load(Ordering::Acquire) < MOST_UNSENT {
            return io.tell(Event::Callback(callback));
        }
        if let Some(before) = self.on_writable.replace(Some(callback)) {
            io.tell(Event::Forget(before));
        }
    }

    pub fn send(&self, frame: Frame) {
        self.outgoing.borrow_mut().push_back(frame);
        self.changed.notify_one();
    }

    /// Has `write` end it, once all that waits is sent.
    pub fn end(&self, io: &Io, end: End) {
        self.forget(io);
        let end = match end {
            End::Ok { frame, trailers } => {
                self.outgoing.borrow_mut().extend(frame);
                End::Ok { frame: None, trailers }
            }
            end => end,
        };
        self.ending.replace(Some(end));
        self.changed.notify_one();
    }

    /// Its end, if it waits for the client to read.
    pub fn abandon(&self) -> Option<(Code, End)> {
        self.ending.take().map(|end| (end.code(), end))
    }

    /// Nobody waits for messages or for room any more.
    pub fn forget(&self, io: &Io) {
        for callback in [self.on_message.take(), self.on_writable.take()].into_iter().flatten() {
            io.tell(Event::Forget(callback));
        }
    }

    pub fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *self.out.borrow_mut() {
            Some(out) => out.poll_reset(cx).map(drop),
            None => Poll::Pending,
        }
    }

    /// Gives each message to who has asked for one. Returns why it cannot go on.
    pub async fn read(&self, io: &Io, messages: &mut Messages) -> Failure {
        loop {
            tokio::select! {
                biased;
                _ = self.asked.notified() => {}
                failure = messages.take_in() => return failure,
            }
            if self.on_message.borrow().is_none() {
                continue;
            }
            let message = match messages.next().await {
                Ok(Ok(message)) => message,
                Ok(Err(failure)) => return failure,
                Err(error) => return failure_of(&error, "client"),
            };
            if let Some(callback) = self.on_message.take() {
                io.tell(Event::Message { callback, message });
            }
        }
    }

    /// Sends what waits until the end is sent too.
    pub async fn write(&self, io: &Io, call: &Call) {
        let patience = io.common.settings.body_timeout();
        let mut pace = Pace::new(patience);
        loop {
            let next = self.outgoing.borrow_mut().pop_front();
            if let Some(frame) = next {
                let size = frame.size();
                if self.write_frame(io, call, frame, &mut pace).await.is_none() {
                    return call.leave(io, None);
                }
                let unsent = call.shared.unsent.fetch_sub(size, Ordering::AcqRel).saturating_sub(size);
                if unsent < MOST_UNSENT
                    && let Some(callback) = self.on_writable.take()
                {
                    io.tell(Event::Callback(callback));
                }
            } else if let Some((code, end)) = self.abandon() {
                call.finish(io, end);
                return call.tell_ended(io, code, vec![]);
            } else {
                self.changed.notified().await;
                pace = Pace::new(patience);
            }
        }
    }

    /// None where the client has left, or takes too little for `body_timeout_s` while others need the room: a stream may
    /// rest for as long as its client wants to, but many that rest would use all of the budget.
    async fn write_frame(&self, io: &Io, call: &Call, mut frame: Frame, pace: &mut Pace) -> Option<()> {
        if let Some(mut respond) = call.respond.take() {
            self.out.replace(Some(respond.send_response(head(HeaderMap::new()), false).ok()?));
        }
        while frame.has_remaining() {
            let reserved = self.with_out(|out| out.reserve_capacity(frame.remaining()));
            reserved?;
            let room = poll_fn(|cx| match &mut *self.out.borrow_mut() {
                Some(out) => out.poll_capacity(cx),
                None => Poll::Ready(None),
            });
            let Some(room) = pace.keep(room).await else {
                if io.common.budget.has_ample_room() {
                    *pace = Pace::new(io.common.settings.body_timeout());
                    continue;
                }
                io.refused(dl_inference_grpc::Reason::SlowReader);
                return None;
            };
            let part = frame.split_to(room?.ok()?);
            pace.took(part.remaining());
            self.cut.set(frame.has_remaining());
            self.with_out(|out| out.send_data(part, false))?.ok()?;
        }
        Some(())
    }

    fn with_out<T>(&self, what: impl FnOnce(&mut SendStream<Frame>) -> T) -> Option<T> {
        self.out.borrow_mut().as_mut().map(what)
    }

    /// Sends the trailers; where a message was sent in part, a reset, because the trailers would pass for a whole one's.
    pub fn finish(&self, end: End) {
        let Some(mut out) = self.out.take() else { return };
        match end.trailers() {
            Some(trailers) if !self.cut.get() => {
                let _ = out.send_trailers(trailers); // else the client left: there is nobody to tell
            }
            _ => out.send_reset(Reason::CANCEL),
        }
    }
}
