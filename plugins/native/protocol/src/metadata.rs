//! Metadata: headers that are the caller's own.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::{HeaderMap, HeaderValue};

/// Whether a header belongs to the protocol. `grpc-status-details-bin` is metadata beside a status.
pub fn is_reserved(name: &str, in_trailers: bool) -> bool {
    matches!(name, "te" | "content-type" | "user-agent" | "content-length")
        || name.starts_with("grpc-") && !(in_trailers && name == "grpc-status-details-bin")
}

/// The values of a header whose name ends in "-bin": several may be joined by commas, and padding is optional. A value
/// that is not base64 is empty.
pub fn decode_binary(value: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    value.split(|byte| *byte == b',').map(|part| {
        let part = part.trim_ascii();
        let end = part.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
        STANDARD_NO_PAD.decode(part.get(..end).unwrap_or_default()).unwrap_or_default()
    })
}

pub fn encode_binary(value: &[u8]) -> HeaderValue {
    HeaderValue::try_from(STANDARD.encode(value)).unwrap_or(HeaderValue::from_static(""))
}

/// The size of a list of headers, as RFC 9113 (section 6.5.2) counts it.
pub fn size_of(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_values_come_back() {
        for value in [&b""[..], b"\0", b"\0\xff\x01", &[7; 300]] {
            assert_eq!(decode_binary(encode_binary(value).as_bytes()).collect::<Vec<_>>(), [value]);
        }
        assert_eq!(decode_binary(b"AAE=, /w").collect::<Vec<_>>(), [vec![0, 1], vec![255]]);
        assert_eq!(decode_binary(b"not base64!").collect::<Vec<_>>(), [b""]);
    }

    #[test]
    fn the_protocols_own_names_are_reserved() {
        assert!(is_reserved("grpc-timeout", true) && is_reserved("te", false));
        assert!(is_reserved("grpc-status-details-bin", false) && !is_reserved("grpc-status-details-bin", true));
        assert!(!is_reserved("x-request-id", false));
    }

    #[test]
    fn a_list_has_32_bytes_for_each_header_beside_its_text() {
        let mut headers = HeaderMap::new();
        headers.append("a", HeaderValue::from_static("xy"));
        headers.append("a", HeaderValue::from_static(""));
        assert_eq!(size_of(&headers), 35 + 33);
    }
}
