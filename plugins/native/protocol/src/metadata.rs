//! Metadata: headers that are the caller's own.

use crate::refusals::Reason;
use crate::status::{Code, Failure};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::{HeaderMap, HeaderValue, header};

/// The values of metadata that one call may have. Each costs some memory, however short it is.
const MOST_VALUES: usize = 900;

/// Whether a header belongs to the protocol. `grpc-status-details-bin` is metadata beside a status.
pub fn is_reserved(name: &str, in_trailers: bool) -> bool {
    matches!(name, "te" | "content-type" | "user-agent" | "content-length")
        || name.starts_with("grpc-") && !(in_trailers && name == "grpc-status-details-bin")
}

/// The values of a header whose name ends in "-bin": several may be joined by commas, and padding is optional. A value
/// that is not base64 is empty.
pub fn decode_binary(value: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    parts(value).map(|part| STANDARD_NO_PAD.decode(part).unwrap_or_default())
}

fn parts(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(|part| {
        let part = part.trim_ascii();
        let end = part.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
        part.get(..end).unwrap_or_default()
    })
}

pub fn encode_binary(value: &[u8]) -> HeaderValue {
    HeaderValue::try_from(STANDARD.encode(value)).unwrap_or(HeaderValue::from_static(""))
}

/// The size of a list of headers, as RFC 9113 (section 6.5.2) counts it; a failure where it is over `most_bytes`.
pub fn check_header_bytes(headers: &HeaderMap, most_bytes: usize) -> Result<(), Failure> {
    let size = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum::<usize>();
    if size > most_bytes { Err(too_large(format!("{size} vs. {most_bytes}"))) } else { Ok(()) }
}

fn too_large(sizes: String) -> Failure {
    // These are gRPC's own words, by which `errors.from_status` knows the failure.
    Failure::new(Code::RESOURCE_EXHAUSTED, format!("received metadata size exceeds hard limit ({sizes})"))
        .because(Reason::HeaderBytes)
}

/// Whether a client's headers have metadata; a failure where they are not gRPC's, or hold too many values.
pub fn check_headers(headers: &HeaderMap, most_bytes: usize) -> Result<bool, Failure> {
    if headers.get(header::TE).is_none_or(|te| te != "trailers") {
        return Err(Failure::new(Code::INVALID_ARGUMENT, "expected the header te: trailers"));
    }
    let mut values = 0;
    for (name, value) in headers.iter().filter(|(name, _)| !is_reserved(name.as_str(), false)) {
        if !name.as_str().ends_with("-bin") {
            values += 1;
            continue;
        }
        for part in parts(value.as_bytes()) {
            values += 1;
            if values <= MOST_VALUES && STANDARD_NO_PAD.decode(part).is_err() {
                return Err(Failure::new(Code::INVALID_ARGUMENT, format!("the metadata {name} is not base64")));
            }
        }
    }
    if values > MOST_VALUES {
        return Err(too_large(format!("{values} vs. {MOST_VALUES} values")));
    }
    check_header_bytes(headers, most_bytes)?;
    Ok(values > 0)
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
        assert!(check_header_bytes(&headers, 35 + 33).is_ok());
        let failure = check_header_bytes(&headers, 35 + 32).unwrap_err();
        assert!(failure.message.contains("metadata size exceeds hard limit (68 vs. 67)"));
    }

    #[test]
    fn headers_that_are_not_grpcs_are_refused() {
        let checked = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("te", HeaderValue::from_static("trailers"));
            headers.insert(name, HeaderValue::from_str(value).unwrap());
            check_headers(&headers, 1 << 20).map_err(|failure| failure.message)
        };
        assert_eq!(checked("x-bin", "AAE=,/w"), Ok(true));
        assert_eq!(checked("user-agent", "x"), Ok(false));
        assert_eq!(checked("x-bin", "!?"), Err("the metadata x-bin is not base64".to_owned()));
        assert_eq!(checked("te", "x"), Err("expected the header te: trailers".to_owned()));
        assert_eq!(checked("x-bin", &["AA"; MOST_VALUES].join(",")), Ok(true));
        assert!(checked("x-bin", &["AA"; 1000].join(",")).unwrap_err().contains("(1000 vs. 900 values)"));
    }
}
