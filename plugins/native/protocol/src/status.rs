//! The end of a call: its code, its message and what goes beside it.

use crate::refusals::Reason;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// The name of a status's code.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// A status of gRPC, or one of the two that exist in this process alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u16);

impl Code {
    pub const OK: Code = Code(0);
    pub const CANCELLED: Code = Code(1);
    pub const UNKNOWN: Code = Code(2);
    pub const INVALID_ARGUMENT: Code = Code(3);
    pub const DEADLINE_EXCEEDED: Code = Code(4);
    pub const PERMISSION_DENIED: Code = Code(7);
    pub const RESOURCE_EXHAUSTED: Code = Code(8);
    pub const UNIMPLEMENTED: Code = Code(12);
    pub const INTERNAL: Code = Code(13);
    pub const UNAVAILABLE: Code = Code(14);
    pub const UNAUTHENTICATED: Code = Code(16);
    /// This process cancelled the attempt.
    pub const ATTEMPT_CANCELLED: Code = Code(100);
    /// The node's answer is not a protobuf message.
    pub const MALFORMED: Code = Code(101);
}

/// How a call has failed.
#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    pub message: String,
    pub trailers: HeaderMap,
    /// The limit that the client was over, if it was.
    pub reason: Option<Reason>,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Failure { code, message: message.into(), trailers: HeaderMap::new(), reason: None }
    }

    pub fn because(self, reason: Reason) -> Self {
        Failure { reason: Some(reason), ..self }
    }

    pub fn deadline() -> Self {
        Failure::new(Code::DEADLINE_EXCEEDED, "the deadline passed")
    }

    pub fn cancelled() -> Self {
        Failure::new(Code::ATTEMPT_CANCELLED, "this process cancelled the attempt")
    }
}

/// The trailers of a status: the code, the message percent-encoded, and the metadata.
pub fn status_headers(failure: Failure) -> HeaderMap {
    let Failure { code, message, mut trailers, .. } = failure;
    trailers.insert(GRPC_STATUS, HeaderValue::from(code.0));
    if !message.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(&percent_encoded(&message))
    {
        trailers.insert("grpc-message", value);
    }
    trailers
}

fn percent_encoded(message: &str) -> Vec<u8> {
    let mut text = Vec::with_capacity(message.len());
    let last = message.len().saturating_sub(1);
    for (at, byte) in message.bytes().enumerate() {
        // Blanks at either end would be taken off on the way.
        if (0x21..=0x7e).contains(&byte) && byte != b'%' || byte == b' ' && at != 0 && at != last {
            text.push(byte);
        } else {
            text.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    text
}

fn percent_decoded(text: &[u8]) -> String {
    fn hex(byte: u8) -> Option<u8> {
        char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        if let [b'%', high, low, after @ ..] = rest
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            bytes.push(high << 4 | low);
            rest = after;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The trailers of a call that has ended OK, from the last headers that the node sent; else the failure.
pub fn status_of(http: StatusCode, mut trailers: HeaderMap) -> Result<HeaderMap, Failure> {
    let Some(status) = trailers.get(GRPC_STATUS) else {
        // gRPC's own mapping, doc/http-grpc-status-mapping.md.
        let code = match http.as_u16() {
            400 => Code::INTERNAL,
            401 => Code::UNAUTHENTICATED,
            403 => Code::PERMISSION_DENIED,
            404 => Code::UNIMPLEMENTED,
            429 | 502..=504 => Code::UNAVAILABLE,
            _ => Code::UNKNOWN,
        };
        return Err(Failure::new(code, format!("the node answered without a status of gRPC, with HTTP {http}")));
    };
    let status = status.to_str().ok().and_then(|text| text.parse::<u16>().ok()).map(Code);
    if status == Some(Code::OK) {
        return Ok(trailers);
    }
    let code = status.filter(|code| code.0 <= Code::UNAUTHENTICATED.0).unwrap_or(Code::UNKNOWN);
    let message = trailers.remove("grpc-message").map(|value| percent_decoded(value.as_bytes())).unwrap_or_default();
    Err(Failure { trailers, ..Failure::new(code, message) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        for message in ["plain", "", " blanks ", "100 % of “naïve” 輸入\nand a second line\t%41", "%"] {
            let headers = status_headers(Failure::new(Code(3), message));
            let failure = status_of(StatusCode::OK, headers).unwrap_err();
            assert_eq!((failure.code, failure.message.as_str()), (Code(3), message));
        }
    }

    #[test]
    fn what_is_not_percent_encoded_stays() {
        assert_eq!(percent_decoded(b"%zz %4 %"), "%zz %4 %");
        assert_eq!(percent_decoded(b"%+1%41"), "%+1A");
    }

    #[test]
    fn statuses_that_grpc_does_not_have_are_unknown() {
        for text in ["17", "100", "101", "-1", "x", "", "99999999"] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", HeaderValue::from_str(text).unwrap());
            assert_eq!(status_of(StatusCode::OK, headers).unwrap_err().code, Code::UNKNOWN, "{text}");
        }
    }

    #[test]
    fn plain_answers_of_http_are_mapped() {
        for (status, code) in [(200, 2), (400, 13), (401, 16), (403, 7), (404, 12), (429, 14), (500, 2), (503, 14)] {
            let failure = status_of(StatusCode::from_u16(status).unwrap(), HeaderMap::new()).unwrap_err();
            assert_eq!(failure.code, Code(code), "{status}");
        }
    }
}
