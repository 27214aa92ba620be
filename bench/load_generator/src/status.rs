//! gRPC's status codes.

use http::HeaderMap;

/// By their numbers.
pub const NAMES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The code in `trailers`. `Err` describes a code that is missing or malformed.
pub fn code(trailers: &HeaderMap) -> Result<usize, String> {
    let value = trailers.get("grpc-status").ok_or("an answer has no grpc-status")?;
    let code = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|code| *code < NAMES.len());
    code.ok_or_else(|| format!("an answer has the grpc-status {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn of(value: &'static [u8]) -> Result<usize, String> {
        code(&HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_bytes(value).unwrap())]))
    }

    #[test]
    fn codes_are_numbers() {
        assert_eq!(of(b"0"), Ok(0));
        assert_eq!(of(b"16").map(|code| NAMES[code]), Ok("UNAUTHENTICATED"));
    }

    #[test]
    fn anything_else_is_an_error() {
        for value in [&b"17"[..], b"-1", b"", b"OK", b"\xff", b"99999999999999999999999"] {
            assert!(of(value).is_err(), "{value:?}");
        }
        assert!(code(&HeaderMap::new()).is_err());
    }
}
