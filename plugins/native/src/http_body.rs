//! The body of an HTTP request, taken in within limits.

use crate::window::Window;
use bytes::{Bytes, BytesMut};
use dl_inference_grpc::{Charge, Code, Encoding, Failure, Frame, Reason, message_of};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::body::{Body as _, Incoming};
use std::cell::RefCell;
use std::error::Error as _;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tokio::task::yield_now;
use tokio::time::timeout;

/// What is taken of a body that is refused: a client that is cut off while it sends may see no answer.
const MOST_DISCARDED: usize = 10; // times the limit of a body
const LINGER: Duration = Duration::from_millis(500); // that a client may pause in it
/// Bytes of an unknown content encoding that are repeated to the client.
const MOST_REPEATED: usize = 100;

/// A body that a client sends, by either version of HTTP.
pub enum Incomplete {
    Http1(Incoming),
    Http2 {
        stream: RecvStream,
        window: Rc<Window>,
        /// By which a client that waits for it is told to send the body.
        awaited: Option<Respond>,
    },
}

/// The head of the answer on a stream of HTTP/2, until it is sent.
pub type Respond = Rc<RefCell<SendResponse<Frame>>>;

/// A whole body, without its content encoding, and what it uses of the budget.
pub struct Body {
    pub bytes: Bytes,
    pub charge: Charge,
}

/// Why a request does not begin, or does not go on. The core has an error for each, but for `NoRoom`.
pub enum Refusal {
    TooLarge,
    UnknownEncoding(String),
    NotGzip,
    NoRoom,
    TookTooLong,
}

impl Refusal {
    /// By the names that `_native.pyi` has, with what there is to say beside it.
    pub fn told(self) -> (&'static str, String) {
        match self {
            Refusal::TooLarge => ("too_large", String::new()),
            Refusal::UnknownEncoding(encoding) => ("unknown_encoding", encoding),
            Refusal::NotGzip => ("not_gzip", String::new()),
            Refusal::NoRoom => ("no_room", String::new()),
            Refusal::TookTooLong => ("took_too_long", String::new()),
        }
    }

    /// What it counts as; None where the time that the service gives is over.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Refusal::TooLarge => Some(Reason::MessageBytes),
            Refusal::UnknownEncoding(_) => Some(Reason::Unimplemented),
            Refusal::NotGzip => Some(Reason::MalformedHttp),
            Refusal::NoRoom => Some(Reason::Buffer),
            Refusal::TookTooLong => None,
        }
    }
}

/// Why a body could not be taken in.
pub enum Unread {
    Refused(Refusal),
    /// It is not framed as HTTP has it.
    Broken,
    /// It ends early: the client has left.
    Left,
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Unread {
        Unread::Refused(refusal)
    }
}

impl Incomplete {
    /// The next bytes; None at the end.
    async fn piece(&mut self, so_far: usize) -> Option<Result<Bytes, Unread>> {
        match self {
            Incomplete::Http1(incoming) => loop {
                match poll_fn(|cx| Pin::new(&mut *incoming).poll_frame(cx)).await? {
                    Ok(frame) => match frame.into_data() {
                        Ok(piece) => return Some(Ok(piece)),
                        Err(_) => continue, // trailers, which nobody reads
                    },
                    Err(error) if ends_early(&error) => return Some(Err(Unread::Left)),
                    Err(_) => return Some(Err(Unread::Broken)),
                }
            },
            Incomplete::Http2 { stream, window, awaited } => {
                if let Some(respond) = awaited.take() {
                    let mut go_on = Response::new(());
                    *go_on.status_mut() = StatusCode::CONTINUE;
                    if !poll_fn(|cx| Poll::Ready(respond.borrow_mut().poll_reset(cx).is_ready())).await {
                        let _ = respond.borrow_mut().send_informational(go_on); // else the client left
                    }
                }
                let piece = match stream.data().await? {
                    Ok(piece) => piece,
                    Err(error) if error.is_library() => return Some(Err(Unread::Broken)),
                    Err(_) => return Some(Err(Unread::Left)),
                };
                window.has_read(so_far + piece.len());
                let _ = stream.flow_control().release_capacity(piece.len()); // fails where the stream has ended
                Some(Ok(piece))
            }
        }
    }

    /// All of it. No more is held than `limit` and one piece. With `decode`, it comes without its content encoding.
    pub async fn read(
        mut self,
        headers: &HeaderMap,
        limit: usize,
        decode: bool,
        mut charge: Charge,
    ) -> Result<Body, Unread> {
        let gzip = decode && is_gzip(headers)?;
        match self.collect(headers, limit, &mut charge).await {
            Ok(bytes) if gzip => Ok(unpacked(&bytes, limit, charge).await?),
            Ok(bytes) => Ok(Body { bytes, charge }),
            Err(unread) => {
                drop(charge);
                self.discard(headers, limit).await;
                Err(unread)
            }
        }
    }

    async fn collect(&mut self, headers: &HeaderMap, limit: usize, charge: &mut Charge) -> Result<Bytes, Unread> {
        if announced(headers).is_some_and(|size| size > limit) {
            return Err(Refusal::TooLarge.into());
        }
        let (mut whole, mut joined) = (Bytes::new(), BytesMut::new());
        let mut size = 0;
        while let Some(piece) = self.piece(size).await {
            let piece = piece?;
            size += piece.len();
            if size > limit {
                return Err(Refusal::TooLarge.into());
            }
            if !charge.grow(piece.len()) {
                return Err(Refusal::NoRoom.into());
            }
            if size == piece.len() {
                whole = piece; // a body that comes in one piece is not copied
            } else {
                joined.extend_from_slice(&std::mem::take(&mut whole));
                joined.extend_from_slice(&piece);
            }
        }
        Ok(if joined.is_empty() { whole } else { joined.freeze() })
    }

    async fn discard(&mut self, headers: &HeaderMap, limit: usize) {
        if headers.contains_key(header::EXPECT) && announced(headers).is_some_and(|size| size > limit) {
            return; // the client was not told to send it
        }
        let mut left = MOST_DISCARDED.saturating_mul(limit);
        while left > 0 {
            match timeout(LINGER, self.piece(0)).await {
                Ok(Some(Ok(piece))) => left = left.saturating_sub(piece.len()),
                _ => return,
            }
        }
    }
}

/// Whether the connection has ended within the body.
fn ends_early(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.is_some_and(|cause| cause.kind() == ErrorKind::UnexpectedEof)
}

/// The length that the client says; HTTP has checked that it is a number.
fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn is_gzip(headers: &HeaderMap) -> Result<bool, Refusal> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes).unwrap_or(b"identity");
    let encoding = encoding.trim_ascii().to_ascii_lowercase();
    match encoding.as_slice() {
        b"identity" => Ok(false),
        b"gzip" => Ok(true),
        other => {
            Err(Refusal::UnknownEncoding(other.iter().take(MOST_REPEATED).map(|byte| char::from(*byte)).collect()))
        }
    }
}

async fn unpacked(packed: &[u8], limit: usize, mut charge: Charge) -> Result<Body, Refusal> {
    let held = |more| match charge.grow(more) {
        true => Ok(()),
        false => Err(Failure::new(Code::UNAVAILABLE, "")),
    };
    match Encoding::Gzip.unpack(packed, limit, Code::INVALID_ARGUMENT, held, yield_now).await {
        Ok(frame) => {
            drop(charge.split(usize::MAX));
            charge.hold(frame.len());
            Ok(Body { bytes: message_of(&frame), charge })
        }
        Err(failure) => Err(match failure.code {
            Code::RESOURCE_EXHAUSTED => Refusal::TooLarge,
            Code::UNAVAILABLE => Refusal::NoRoom,
            _ => Refusal::NotGzip,
        }),
    }
}
