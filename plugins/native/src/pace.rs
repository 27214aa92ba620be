//! How slowly a client may take an answer.

use crate::window::SMALL;
use dl_inference_grpc::Budget;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// What a client must take in each `body_timeout_s`, while memory is short: one of HTTP/2's first windows.
const LEAST: usize = SMALL as usize;

/// How a client gets on with an answer that waits for it.
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

    /// What `future` gives; None where the time is over before. Then `is_too_slow` says what that means.
    pub async fn keep<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        timeout_at(self.until, future).await.ok()
    }

    /// When the time is over, unless the client takes enough before.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Whether the client is to be given up, now that the time is over; otherwise the time begins anew. A client that
    /// takes some bytes is too slow only where half of `budget` is used: a byte at a time, it would hold its answer for ever.
    pub fn is_too_slow(&mut self, budget: &Budget) -> bool {
        let slow = self.taken == 0 || !budget.has_ample_room();
        if !slow {
            *self = Pace::new(self.patience);
        }
        slow
    }

    /// The client has taken `bytes`.
    pub fn took(&mut self, bytes: usize) {
        self.taken += bytes;
        if self.taken >= LEAST {
            *self = Pace::new(self.patience);
        }
    }
}
