//! The windows of the streams of a connection: 64 KiB at first, 1 MiB once a large message comes, and 64 KiB again when
//! none has come for a while.

use dl_inference_grpc::Budget;
use std::cell::Cell;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// HTTP/2's own first window.
pub const SMALL: u32 = (1 << 16) - 1;
/// Messages of 600 KB cost 978 µs of CPU each with it, 2,014 µs with the small one.
const LARGE: u32 = 1 << 20;
/// Large windows shrink after this time without a large message. To grow them again takes one SETTINGS frame, and a
/// large message only begins with the small window.
const KEPT: Duration = Duration::from_secs(10);

/// The size that the windows of a connection are to have. HTTP/2 for Rust has one size for all streams of a connection.
#[derive(Default)]
pub struct Window {
    is_large: Cell<bool>,
    /// When a large message was last read, or the windows could not be changed.
    since: Cell<Option<Instant>>,
    asking: Notify,
}

impl Window {
    /// So many bytes of a message that is read have come in one window.
    pub fn has_read(&self, bytes: usize) {
        if bytes >= SMALL as usize / 2 {
            self.since.set(Some(Instant::now()));
            if !self.is_large.get() {
                self.asking.notify_one();
            }
        }
    }

    /// Returns another size than the windows have, once it is the better one.
    pub async fn wanted(&self, budget: &Budget) -> u32 {
        while !self.is_large.get() {
            self.asking.notified().await;
            if !self.left().is_zero() && budget.has_ample_room() {
                return LARGE;
            }
        }
        while !self.left().is_zero() {
            sleep(self.left()).await;
        }
        SMALL
    }

    /// How long large windows are still kept.
    fn left(&self) -> Duration {
        self.since.get().map_or(Duration::ZERO, |since| KEPT.saturating_sub(since.elapsed()))
    }

    /// Whether the windows could get the `size` that was wanted; where not, the next large message asks again, or it is
    /// tried again after a while.
    pub fn set(&self, size: u32, done: bool) {
        if done {
            self.is_large.set(size == LARGE);
        } else {
            self.since.set(Some(Instant::now()));
        }
    }
}
