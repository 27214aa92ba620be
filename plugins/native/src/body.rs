//! The messages of a request or of an answer.

use crate::window::Window;
use dl_inference_grpc::{Charge, Code, Deframer, Encoding, Failure, Frame};
use h2::{Reason, RecvStream};
use http::HeaderMap;
use std::future::pending;
use std::rc::Rc;
use tokio::task::yield_now;

/// What an error of HTTP/2 stands for, as gRPC maps it. `other` is who the other side is.
pub fn failure_of(error: &h2::Error, other: &str) -> Failure {
    let code = match error.reason() {
        Some(Reason::CANCEL) if error.is_reset() => Code::CANCELLED,
        Some(Reason::REFUSED_STREAM) => Code::UNAVAILABLE,
        Some(Reason::ENHANCE_YOUR_CALM) if error.is_reset() => Code::RESOURCE_EXHAUSTED,
        Some(Reason::INADEQUATE_SECURITY) => Code::PERMISSION_DENIED,
        Some(_) if error.is_reset() => Code::INTERNAL,
        _ => Code::UNAVAILABLE,
    };
    Failure::new(code, format!("the connection to the {other} failed: {error}"))
}

/// Reads messages, and gives the other side room for more as it reads.
pub struct Messages {
    body: RecvStream,
    deframer: Deframer,
    encoding: Encoding,
    limit: usize,
    malformed: Code,
    window: Rc<Window>,
    since_last: usize,
    /// Bytes that were taken in and still use the window.
    unreleased: usize,
}

impl Messages {
    /// Of a body with such headers; `limit` is of the bytes of a message. What is malformed fails with the code
    /// `malformed`.
    pub fn new(
        body: RecvStream,
        headers: &HeaderMap,
        limit: usize,
        malformed: Code,
        charge: Charge,
        window: Rc<Window>,
    ) -> Self {
        let deframer = Deframer::new(limit, malformed, charge);
        let encoding = Encoding::of(headers);
        Messages { body, deframer, encoding, limit, malformed, window, since_last: 0, unreleased: 0 }
    }

    /// The next message; None at the end. An error of HTTP/2 comes as the inner error.
    pub async fn next(&mut self) -> Result<Result<Option<Frame>, Failure>, h2::Error> {
        self.read("the stream ended within a message").await
    }

    /// As `next`; `cut_short` says what it means that the body ends within a message.
    async fn read(&mut self, cut_short: &str) -> Result<Result<Option<Frame>, Failure>, h2::Error> {
        loop {
            match self.deframer.next_message() {
                Ok(Some(message)) => {
                    self.since_last = 0;
                    self.release(self.unreleased.saturating_sub(self.deframer.len()));
                    return Ok(message.unpack(&self.encoding, self.limit, yield_now).await.map(Some));
                }
                Ok(None) => {}
                Err(failure) => return Ok(Err(failure)),
            }
            self.release(self.unreleased); // a message may be larger than the window
            let Some(piece) = self.body.data().await else {
                let whole = self.deframer.is_empty();
                return Ok(if whole { Ok(None) } else { Err(self.failure(cut_short)) });
            };
            let piece = piece?;
            self.since_last += piece.len();
            self.window.has_read(self.since_last);
            self.unreleased = piece.len();
            self.release(piece.len());
            if let Err(failure) = self.deframer.push(piece) {
                return Ok(Err(failure));
            }
        }
    }

    /// Takes in what comes before anybody asks for it, so that the budget counts it. It uses the window until the message
    /// is asked for. Returns only where the budget has no room; `next` tells of an end or an error.
    pub async fn take_in(&mut self) -> Failure {
        while let Some(Ok(piece)) = self.body.data().await {
            self.unreleased += piece.len();
            if let Err(failure) = self.deframer.push(piece) {
                return failure;
            }
        }
        pending().await
    }

    /// Gives the other side room for `bytes` more.
    fn release(&mut self, bytes: usize) {
        if bytes > 0 {
            self.unreleased -= bytes;
            let _ = self.body.flow_control().release_capacity(bytes); // fails where the stream has ended
        }
    }

    fn failure(&self, said: &str) -> Failure {
        Failure::new(self.malformed, said)
    }

    /// The only message of a call that has one, or none.
    pub async fn at_most_one(&mut self) -> Result<Result<Option<Frame>, Failure>, h2::Error> {
        let first = match self.read("expected one message; got part of one").await? {
            Ok(Some(first)) => first,
            other => return Ok(other),
        };
        if !self.deframer.is_empty() {
            return Ok(Err(self.failure("expected one message; got more")));
        }
        Ok(match self.next().await? {
            Ok(None) => Ok(Some(first)),
            Ok(Some(_)) => Err(self.failure("expected one message; got more")),
            Err(failure) => Err(failure),
        })
    }

    /// What is left of the body once it was read.
    pub fn into_body(self) -> RecvStream {
        self.body
    }

    pub async fn trailers(&mut self) -> Result<HeaderMap, h2::Error> {
        Ok(self.body.trailers().await?.unwrap_or_default())
    }
}
