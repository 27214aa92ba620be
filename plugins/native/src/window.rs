//! The windows of the streams of a connection: 64 KiB at first, 1 MiB once a large message comes.

use std::cell::Cell;
use tokio::sync::Notify;

/// HTTP/2's own first window.
pub const SMALL: u32 = (1 << 16) - 1;
/// Messages of 600 KB cost 978 µs of CPU each with it, 2,014 µs with the small one.
pub const LARGE: u32 = 1 << 20;

#[derive(Clone, Copy, Default, PartialEq)]
enum Size {
    #[default]
    Small,
    Asked,
    Large,
}

/// Whether the windows of a connection are to grow. HTTP/2 for Rust has one size for all streams of a connection.
#[derive(Default)]
pub struct Window {
    size: Cell<Size>,
    asking: Notify,
}

impl Window {
    /// So many bytes of a message that is read have come in one window.
    pub fn has_read(&self, bytes: usize) {
        if bytes >= SMALL as usize / 2 && self.size.get() == Size::Small {
            self.size.set(Size::Asked);
            self.asking.notify_one();
        }
    }

    /// Returns once a large message is read while the windows are small.
    pub async fn wants_to_grow(&self) {
        self.asking.notified().await;
    }

    /// Whether they could grow, after `wants_to_grow`; where not, the next large message asks again.
    pub fn grew(&self, grew: bool) {
        self.size.set(if grew { Size::Large } else { Size::Small });
    }
}
