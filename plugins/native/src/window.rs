//! The windows of the streams of a connection: 64 KiB at first, 1 MiB once a large message comes.
//!
//! They do not shrink again. h2 would take the difference from the windows of open streams too: a stream whose peer had
//! used more of it than the small window has would get no room any more, because h2 gives room only with data that it
//! hands out.

use crate::flag::Bell;
use dl_inference_grpc::Budget;
use std::cell::Cell;
use std::future::poll_fn;
use std::task::Poll;

/// HTTP/2's own first window.
pub const SMALL: u32 = (1 << 16) - 1;
/// Messages of 600 KB cost 978 µs of CPU each with it, 2,014 µs with the small one.
pub const LARGE: u32 = 1 << 20;

/// Whether the windows of a connection are to grow. HTTP/2 for Rust has one size for all streams of a connection.
#[derive(Default)]
pub struct Window {
    is_large: Cell<bool>,
    asked: Cell<bool>,
    asking: Bell,
}

impl Window {
    /// So many bytes of a message that is read have come in one window.
    pub fn has_read(&self, bytes: usize) {
        if bytes >= SMALL as usize / 2 && !self.is_large.get() {
            self.asked.set(true);
            self.asking.ring();
        }
    }

    /// Returns once a large message is read while the windows are small, and less than half of `budget` is used.
    pub async fn wants_to_grow(&self, budget: &Budget) {
        poll_fn(|cx| {
            self.asking.register(cx);
            let grows = self.asked.take() && !self.is_large.get() && budget.has_ample_room();
            if grows { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Whether they could grow, after `wants_to_grow`; where not, the next large message asks again.
    pub fn grew(&self, grew: bool) {
        self.is_large.set(grew);
    }
}
