//! How slowly a client may take an answer.

use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// What a client must take in each `body_timeout_s`, unless less is left: a client that takes a byte at a time would hold
/// its answer for ever. HTTP/2's own first window, so that a client which reads one window at a time is in time.
pub const LEAST: usize = 1 << 16;

/// Whether a client takes an answer fast enough.
pub struct Pace {
    patience: Duration,
    until: Instant,
    taken: usize,
}

impl Pace {
    /// Begins now.
    pub fn new(patience: Duration) -> Pace {
        Pace { patience, until: Instant::now() + patience, taken: 0 }
    }

    /// What `future` gives, unless the client is too slow before.
    pub async fn keep<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        timeout_at(self.until, future).await.ok()
    }

    /// When the client is too slow, unless it takes enough before.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// The client has taken `bytes`.
    pub fn took(&mut self, bytes: usize) {
        self.taken += bytes;
        if self.taken >= LEAST {
            *self = Pace::new(self.patience);
        }
    }
}
