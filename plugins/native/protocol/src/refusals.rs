//! Why clients are refused, and how often.

use crate::status::{Code, Failure};
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[$meaning:meta])* $reason:ident = $name:literal,)*) => {
        /// Why a client was refused, or its connection closed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$meaning])* $reason,)*
        }

        const NAMES: &[&str] = &[$($name),*];
    };
}

reasons! {
    /// There are as many connections as there may be.
    Connections = "connections",
    /// The handshakes of TLS and HTTP/2 took too long.
    HandshakeTime = "handshake_time",
    /// The handshake of TLS or HTTP/2 failed.
    Handshake = "handshake",
    /// TLS on a port of clear text, or HTTP/1 where only gRPC is answered.
    OtherProtocol = "other_protocol",
    /// A connection broke the rules of HTTP/2.
    Http2 = "http2",
    /// A connection sent more of what costs work than HTTP/2's limits have room for: resets, headers without an end.
    Flood = "flood",
    /// A connection was silent, and did not answer a PING.
    Silence = "silence",
    /// The headers of a call or request are too large, or too many.
    HeaderBytes = "header_bytes",
    /// A call is not as gRPC has it.
    MalformedCall = "malformed_call",
    /// A method or a compression is not known.
    Unimplemented = "unimplemented",
    /// A message, or the body of a request, is too large.
    MessageBytes = "message_bytes",
    /// The process holds as many bytes of messages as it may.
    Buffer = "buffer",
    /// A request of HTTP is not as HTTP has it.
    MalformedHttp = "malformed_http",
    /// The headers of a request of HTTP/1 took too long.
    HeadersTime = "headers_time",
    /// The body of an HTTP request took too long.
    BodyTime = "body_time",
    /// A client took too little of an answer for too long.
    SlowReader = "slow_reader",
}

/// Counts by reason. Any thread.
#[derive(Debug)]
pub struct Refusals([AtomicU64; NAMES.len()]);

impl Default for Refusals {
    fn default() -> Self {
        Refusals(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Refusals {
    pub fn count(&self, reason: Reason) {
        if let Some(count) = self.0.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a call that fails before the service has seen it, or because the client's next message cannot be read.
    pub fn count_failure(&self, failure: &Failure) {
        let reason = failure.reason.or(match failure.code {
            Code::INVALID_ARGUMENT => Some(Reason::MalformedCall),
            Code::UNIMPLEMENTED => Some(Reason::Unimplemented),
            _ => None,
        });
        if let Some(reason) = reason {
            self.count(reason);
        }
    }

    /// All of them, by name.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.iter().zip(&self.0).map(|(name, count)| (*name, count.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_counts_for_itself() {
        let refusals = Refusals::default();
        refusals.count(Reason::Connections);
        refusals.count(Reason::SlowReader);
        refusals.count(Reason::SlowReader);
        let counted: Vec<_> = refusals.read().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("connections", 1), ("slow_reader", 2)]);
    }

    #[test]
    fn failures_count_for_what_they_are_of() {
        for (failure, expected) in [
            (Failure::new(Code::RESOURCE_EXHAUSTED, "").because(Reason::Buffer), Some("buffer")),
            (Failure::new(Code::INVALID_ARGUMENT, ""), Some("malformed_call")),
            (Failure::new(Code::UNIMPLEMENTED, ""), Some("unimplemented")),
            (Failure::deadline(), None),
        ] {
            let refusals = Refusals::default();
            refusals.count_failure(&failure);
            assert_eq!(refusals.read().find(|(_, count)| *count > 0).map(|(name, _)| name), expected);
        }
    }
}
