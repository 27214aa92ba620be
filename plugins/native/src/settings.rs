//! What the options of the transport come to.

use pyo3::prelude::*;
use std::time::Duration;

/// The fields of the Python class `NativeTransport.Options` by their names.
#[derive(FromPyObject)]
pub struct Settings {
    pub threads: usize,
    pub buffer_mb: usize,
    connect_timeout_ms: u64,
    unacknowledged_ms: u64,
    header_kb: usize,
    idle_timeout_s: u64,
    connection_age_s: u64,
    headers_timeout_s: u64,
    body_timeout_s: u64,
    keepalive_s: u64,
    keepalive_timeout_s: u64,
}

fn unless_zero(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

impl Settings {
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    /// Of what was sent to a node.
    pub fn unacknowledged_by_node(&self) -> Option<Duration> {
        unless_zero(Duration::from_millis(self.unacknowledged_ms))
    }

    /// Of what was sent to a client: as long as it may be silent.
    pub fn unacknowledged_by_client(&self) -> Option<Duration> {
        Some(self.keepalive() + self.keepalive_timeout())
    }

    pub fn header_bytes(&self) -> usize {
        self.header_kb << 10
    }

    pub fn idle_timeout(&self) -> Option<Duration> {
        unless_zero(Duration::from_secs(self.idle_timeout_s))
    }

    pub fn connection_age(&self) -> Option<Duration> {
        unless_zero(Duration::from_secs(self.connection_age_s))
    }

    pub fn headers_timeout(&self) -> Duration {
        Duration::from_secs(self.headers_timeout_s)
    }

    /// Of the body of a request that is not gRPC; and of answers that wait for their clients.
    pub fn body_timeout(&self) -> Duration {
        Duration::from_secs(self.body_timeout_s)
    }

    pub fn keepalive(&self) -> Duration {
        Duration::from_secs(self.keepalive_s)
    }

    pub fn keepalive_timeout(&self) -> Duration {
        Duration::from_secs(self.keepalive_timeout_s)
    }
}
