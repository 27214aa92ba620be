//! What Python sees. Every method may be called on any thread; none waits for an I/O thread.

pub mod convert;
mod exchange;
mod http;
mod node;
pub mod routing;
mod threads;

pub use exchange::{Attempt, Exchange};
pub use http::HttpExchange;
pub use node::Node;
pub use threads::{ClientTls, ServerTls, Threads, Timer, stop_all};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Only for exchanging what is in it: nobody attaches, waits or runs Python while he holds it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
