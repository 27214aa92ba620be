//! What gRPC adds to HTTP/2: frames, timeouts, status, and whether bytes are a protobuf message. No Python, no sockets.

use bytes::{BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, StatusCode};
use std::time::Duration;

/// A frame's first bytes: whether it is compressed, and the length of its message.
pub const PREFIX: usize = 5;

pub const CANCELLED: u16 = 1;
pub const UNKNOWN: u16 = 2;
pub const DEADLINE_EXCEEDED: u16 = 4;
pub const PERMISSION_DENIED: u16 = 7;
pub const RESOURCE_EXHAUSTED: u16 = 8;
pub const UNIMPLEMENTED: u16 = 12;
pub const INTERNAL: u16 = 13;
pub const UNAVAILABLE: u16 = 14;
pub const UNAUTHENTICATED: u16 = 16;
/// No status of gRPC: this process cancelled the attempt.
pub const ATTEMPT_CANCELLED: u16 = 100;
/// No status of gRPC: the node's answer is not a protobuf message.
pub const MALFORMED: u16 = 101;

/// How a call has failed.
#[derive(Debug)]
pub struct Failure {
    pub code: u16,
    pub message: String,
    pub trailers: HeaderMap,
}

impl Failure {
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Failure { code, message: message.into(), trailers: HeaderMap::new() }
    }

    pub fn deadline() -> Self {
        Failure::new(DEADLINE_EXCEEDED, "the deadline passed")
    }
}

/// What the error of a connection or of a stream stands for, as gRPC maps them.
impl From<h2::Error> for Failure {
    fn from(error: h2::Error) -> Self {
        let code = match error.reason() {
            Some(Reason::CANCEL) if error.is_reset() => CANCELLED,
            Some(Reason::REFUSED_STREAM) => UNAVAILABLE,
            Some(Reason::ENHANCE_YOUR_CALM) if error.is_reset() => RESOURCE_EXHAUSTED,
            Some(Reason::INADEQUATE_SECURITY) => PERMISSION_DENIED,
            Some(_) if error.is_reset() => INTERNAL,
            _ => UNAVAILABLE,
        };
        Failure::new(code, format!("the connection to the node failed: {error}"))
    }
}

/// A frame that holds `message`.
pub fn frame(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX + message.len());
    frame.put_u8(0);
    frame.put_u32(message.len() as u32);
    frame.extend_from_slice(message);
    frame.freeze()
}

pub fn check_size(what: &str, size: usize, limit: usize) -> Result<(), Failure> {
    if size <= limit {
        return Ok(());
    }
    Err(Failure::new(RESOURCE_EXHAUSTED, format!("{what} message larger than max ({size} vs. {limit})")))
}

/// The only frame of a body, whole; None where the body is empty. A frame that came in one piece is not copied.
pub async fn read_frame(body: &mut RecvStream, limit: usize) -> Result<Option<Bytes>, Failure> {
    let mut whole = Bytes::new();
    let mut joined = BytesMut::new();
    let mut size = None;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        let _ = body.flow_control().release_capacity(chunk.len());
        if whole.is_empty() && joined.is_empty() {
            whole = chunk;
        } else {
            if joined.is_empty() {
                joined.extend_from_slice(&std::mem::take(&mut whole));
            }
            joined.extend_from_slice(&chunk);
        }
        let so_far: &[u8] = if joined.is_empty() { &whole } else { &joined };
        if size.is_none() && so_far.len() >= PREFIX {
            if so_far[0] != 0 {
                return Err(Failure::new(UNIMPLEMENTED, "this spike reads no compressed messages"));
            }
            let announced = u32::from_be_bytes([so_far[1], so_far[2], so_far[3], so_far[4]]) as usize;
            check_size("Received", announced, limit)?;
            size = Some(PREFIX + announced);
            if PREFIX + announced > so_far.len() {
                let missing = PREFIX + announced - joined.len();
                joined.reserve(missing); // so that the pieces are copied once
            }
        }
        if size.is_some_and(|size| so_far_len(&whole, &joined) > size) {
            return Err(Failure::new(INTERNAL, "there is more than one message"));
        }
    }
    let frame = if joined.is_empty() { whole } else { joined.freeze() };
    match size {
        None if frame.is_empty() => Ok(None),
        Some(size) if size == frame.len() => Ok(Some(frame)),
        _ => Err(Failure::new(INTERNAL, "the message is cut short")),
    }
}

fn so_far_len(whole: &Bytes, joined: &BytesMut) -> usize {
    if joined.is_empty() { whole.len() } else { joined.len() }
}

/// The time that a client gives a call.
pub fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// A timeout as a header, in at most 8 digits, rounded up.
pub fn timeout_header(timeout: Duration) -> HeaderValue {
    let micros = timeout.as_micros();
    let text = if micros < 100_000_000 {
        format!("{}u", micros.max(1))
    } else if micros < 100_000_000_000 {
        format!("{}m", micros.div_ceil(1000))
    } else {
        format!("{}S", micros.div_ceil(1_000_000).min(99_999_999))
    };
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("1u"))
}

/// The trailers of a status: the code, the message percent-encoded, and the metadata.
pub fn status_headers(code: u16, message: &str, mut trailers: HeaderMap) -> HeaderMap {
    trailers.insert("grpc-status", HeaderValue::from(code));
    if !message.is_empty() {
        let mut text = Vec::with_capacity(message.len());
        let last = message.len() - 1;
        for (at, byte) in message.bytes().enumerate() {
            // Blanks at either end would be taken off on the way.
            if (0x21..=0x7e).contains(&byte) && byte != b'%' || byte == b' ' && at != 0 && at != last {
                text.push(byte);
            } else {
                text.extend_from_slice(format!("%{byte:02X}").as_bytes());
            }
        }
        if let Ok(value) = HeaderValue::from_bytes(&text) {
            trailers.insert("grpc-message", value);
        }
    }
    trailers
}

fn percent_decoded(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => (bytes.push(byte), rest = &tail[2..]).1,
            None => (bytes.push(*first), rest = tail).1,
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The end of a call, from its trailers, or from its headers where the node has sent no more.
pub fn status_of(http: StatusCode, mut trailers: HeaderMap) -> Result<HeaderMap, Failure> {
    let status = trailers.get("grpc-status").map(|value| value.to_str().ok().and_then(|text| text.parse::<u16>().ok()));
    let code = match status {
        Some(Some(0)) => return Ok(trailers),
        Some(Some(code)) if code <= UNAUTHENTICATED => code,
        Some(_) => UNKNOWN,
        None => {
            let code = match http.as_u16() {
                400 => INTERNAL,
                401 => UNAUTHENTICATED,
                403 => PERMISSION_DENIED,
                404 => UNIMPLEMENTED,
                429 | 502..=504 => UNAVAILABLE,
                _ => UNKNOWN,
            };
            return Err(Failure::new(code, format!("the node answered without a status of gRPC, with HTTP {http}")));
        }
    };
    let message = trailers.remove("grpc-message").map(|value| percent_decoded(value.as_bytes())).unwrap_or_default();
    Err(Failure { code, message, trailers })
}

/// Whether a name of a header is the protocol's own, and no metadata.
pub fn is_reserved(name: &str) -> bool {
    matches!(name, "te" | "content-type" | "user-agent" | "content-length")
        || name.starts_with("grpc-") && name != "grpc-status-details-bin"
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Whether `bytes` are a sequence of protobuf fields, and not an empty one. Looks at the top level only.
pub fn well_formed(bytes: &[u8]) -> bool {
    fn fields(bytes: &[u8]) -> Option<()> {
        let mut at = 0;
        let mut groups = vec![];
        while at < bytes.len() {
            let start = at;
            let key = varint(bytes, &mut at)?;
            let number = key >> 3;
            if number == 0 || number >= 1 << 29 || at - start > 5 {
                return None;
            }
            let size = match key & 7 {
                0 => varint(bytes, &mut at).map(|_| 0)?,
                1 => 8,
                2 => varint(bytes, &mut at)?,
                3 if groups.len() < 100 => {
                    groups.push(number);
                    0
                }
                4 if groups.pop() == Some(number) => 0,
                5 => 4,
                _ => return None,
            };
            at = at.checked_add(usize::try_from(size).ok()?).filter(|end| *end <= bytes.len())?;
        }
        groups.is_empty().then_some(())
    }
    !bytes.is_empty() && fields(bytes).is_some()
}
