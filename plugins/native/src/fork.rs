//! Processes that are forked from this one: they have no I/O threads, and none of our sockets.
//!
//! A child has only the thread that forked. Whoever would command an I/O thread finds that it belongs to another process
//! (`Process::is_this`), and the child closes its copies of our sockets at once: else it would hold a port or the
//! connection of a client after its parent has ended.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many forks lie between this process and the one that loaded this module.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Descriptors of more than this are not noted; Linux's own limit of a process is 2²⁰ by default.
const MOST: usize = 1 << 20;
const WORD: usize = 64;
/// A bit for each descriptor that is a socket of ours. No lock, because a child may not wait for one.
static OURS: [AtomicU64; MOST / WORD] = [const { AtomicU64::new(0) }; MOST / WORD];

/// A process, told apart from those that are forked from it.
#[derive(Clone, Copy)]
pub struct Process(u32);

impl Process {
    pub fn this() -> Process {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            // SAFETY: `forget_sockets` only touches atomics and calls `close`: both are async-signal-safe, as the child
            // of a process with threads requires.
            unsafe { libc::pthread_atfork(None, None, Some(forget_sockets)) };
        });
        Process(FORKS.load(Ordering::Relaxed))
    }

    pub fn is_this(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

unsafe extern "C" fn forget_sockets() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    for (at, word) in OURS.iter().enumerate() {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            let number = at * WORD + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            // SAFETY: the descriptor is open, and was opened by an I/O thread. The child has no such thread, so nobody
            // in it uses the descriptor or closes it.
            unsafe { libc::close(number as RawFd) };
        }
    }
}

/// Notes that a descriptor is a socket of ours, for as long as it lives. Drop it before the socket is closed.
pub struct Ours(RawFd);

impl Ours {
    pub fn new(socket: &impl AsRawFd) -> Ours {
        let number = socket.as_raw_fd();
        if let Some((word, bit)) = place(number) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ours(number)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if let Some((word, bit)) = place(self.0) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

fn place(number: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let number = usize::try_from(number).ok()?;
    Some((OURS.get(number / WORD)?, 1 << (number % WORD)))
}
