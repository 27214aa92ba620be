//! A flag that one task waits for, and any thread raises.

use atomic_waker::AtomicWaker;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

/// Stays raised. Costs a third of `tokio::sync::Notify`, which has a list of tasks that wait.
#[derive(Default)]
pub struct Flag {
    raised: AtomicBool,
    waiting: AtomicWaker,
}

impl Flag {
    /// Once is enough, also before anybody waits.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        self.waiting.wake();
    }

    /// Returns once it is raised. One task at a time.
    pub async fn raised(&self) {
        poll_fn(|cx| {
            if self.raised.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            self.waiting.register(cx.waker());
            // It may have been raised before the waker was registered.
            if self.raised.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
