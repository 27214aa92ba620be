//! Signs of life: the other side of a silent connection is asked for one by an HTTP/2 PING.

use h2::{Ping, PingPong};
use std::task::{Context, Waker};
use std::time::Duration;
use tokio::time::Instant;

/// When the other side was last heard of, and when it is asked.
pub struct Signs {
    keepalive: Duration,
    timeout: Duration,
    /// Between two questions, as long as only their answers come.
    spacing: Duration,
    asked: bool,
    last_question: Option<Instant>,
    next: Instant,
    ping_pong: Option<PingPong>,
}

impl Signs {
    /// `keepalive` is how long it may be silent, `timeout` how long the answer may take.
    pub fn new(keepalive: Duration, timeout: Duration, spacing: Duration, ping_pong: Option<PingPong>) -> Signs {
        let next = Instant::now() + keepalive;
        Signs { keepalive, timeout, spacing, asked: false, last_question: None, next, ping_pong }
    }

    /// When to check.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Asks where it is time and a sign is `wanted`; `heard` is whether anything came since the last check. False where
    /// the other side has not answered.
    pub fn check(&mut self, heard: bool, wanted: bool) -> bool {
        let now = Instant::now();
        if heard {
            if !std::mem::take(&mut self.asked) {
                self.last_question = None;
            }
            self.next = now + self.keepalive;
        } else if now >= self.next {
            if self.asked {
                return false;
            }
            self.asked = wanted && self.last_question.is_none_or(|last| now >= last + self.spacing);
            self.next = now + if self.asked { self.timeout } else { self.keepalive };
            if self.asked {
                self.last_question = Some(now);
                self.ping();
            }
        }
        true
    }

    fn ping(&mut self) {
        if let Some(ping_pong) = &mut self.ping_pong {
            let _ = ping_pong.poll_pong(&mut Context::from_waker(Waker::noop())); // makes room for the next one
            let _ = ping_pong.send_ping(Ping::opaque());
        }
    }
}
