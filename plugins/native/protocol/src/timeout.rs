//! The header `grpc-timeout`.

use crate::status::{Code, Failure};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::time::Duration;

/// The name of the header.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// The longest timeout in microseconds: three digits of seconds, and the five zeros that gRPC has room for.
const LONGEST: u64 = 99_900_000_000_000;

/// The time that a client gives a call; None where it gives none.
pub fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    parsed(text).map(Some).ok_or_else(|| {
        let expected = "at most 8 digits and one of H, M, S, m, u and n";
        Failure::new(Code::INVALID_ARGUMENT, format!("the grpc-timeout \"{text}\" is malformed; expected {expected}"))
    })
}

fn parsed(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.is_empty() || number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
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

/// Makes headers, and keeps the last one: routes have few timeouts.
#[derive(Debug)]
pub struct Timeouts {
    micros: u64,
    header: HeaderValue,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { micros: 1, header: HeaderValue::from_static("1u") }
    }
}

impl Timeouts {
    /// `timeout`, rounded up to three digits. Values that come again and again are one byte each in HPACK; values that
    /// never do would fill its table, which is searched for each request.
    pub fn header(&mut self, timeout: Duration) -> HeaderValue {
        let up = timeout.saturating_add(Duration::from_nanos(999)); // to whole microseconds
        let micros = u64::try_from(up.as_micros()).unwrap_or(u64::MAX).clamp(1, LONGEST);
        let step = 10u64.pow(micros.ilog10().saturating_sub(2));
        let micros = micros.div_ceil(step) * step;
        if micros != self.micros
            && let Ok(header) = HeaderValue::from_str(&text(micros))
        {
            *self = Timeouts { micros, header };
        }
        self.header.clone()
    }
}

fn text(micros: u64) -> String {
    if !micros.is_multiple_of(1000) {
        format!("{micros}u")
    } else if !micros.is_multiple_of(1_000_000) {
        format!("{}m", micros / 1000)
    } else {
        format!("{}S", micros / 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
        timeout_of(&headers).ok().flatten()
    }

    #[test]
    fn each_unit_is_read() {
        let expected = [("1H", 3_600_000_000_000), ("2M", 120_000_000_000), ("3S", 3_000_000_000)];
        for (text, nanos) in expected.into_iter().chain([("4m", 4_000_000), ("5u", 5000), ("99999999n", 99_999_999)]) {
            assert_eq!(read(text), Some(Duration::from_nanos(nanos)), "{text}");
        }
    }

    #[test]
    fn none_is_no_failure() {
        assert_eq!(timeout_of(&HeaderMap::new()).unwrap(), None);
    }

    #[test]
    fn anything_else_is_malformed() {
        for text in ["", "5", "S", "-1S", "+1S", "1 S", "1s", "123456789S", "1.5S"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    fn timeout_header(timeout: Duration) -> HeaderValue {
        Timeouts::default().header(timeout)
    }

    #[test]
    fn nearly_equal_times_have_one_header() {
        let headers: Vec<_> =
            (0..1000).map(|micros| timeout_header(Duration::from_micros(60_000_000 - micros))).collect();
        assert!(headers.iter().all(|header| header == "60S"));
        assert_eq!(timeout_header(Duration::from_micros(1_234_567)), "1240m");
        assert_eq!(timeout_header(Duration::from_micros(12_345)), "12400u");
    }

    #[test]
    fn a_header_is_read_as_at_least_what_it_was_made_of() {
        for micros in [0, 1, 999, 1001, 999_001, 99_999_999, 100_000_001, 99_999_999_000, 99_999_999_001, 1 << 45] {
            let given = Duration::from_micros(micros);
            let text = timeout_header(given);
            assert!(text.len() <= 9);
            let read = read(text.to_str().unwrap()).unwrap();
            assert!(read >= given && read <= given + given / 100 + Duration::from_micros(1), "{text:?}");
        }
    }
}
