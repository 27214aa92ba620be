//! How many bytes of messages a process holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A limit on the bytes of messages that a process holds at one time.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    pub fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget { limit, used: AtomicUsize::new(0) })
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether less than half of it is used.
    pub fn has_ample_room(&self) -> bool {
        self.used() < self.limit / 2
    }
}

/// The part of a budget that one message uses. Its drop gives it back.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Charge {
    pub fn new(budget: &Arc<Budget>) -> Charge {
        Charge { budget: budget.clone(), bytes: 0 }
    }

    /// Uses `bytes` more; false, and no change, where that is over the limit.
    #[must_use]
    pub fn grow(&mut self, bytes: usize) -> bool {
        let before = self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.budget.limit {
            self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Uses `bytes` more, whatever the limit is: they are in memory already.
    pub fn hold(&mut self, bytes: usize) {
        self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
    }

    /// Takes `bytes` of it, or all where it has fewer, into a charge of their own.
    pub fn split(&mut self, bytes: usize) -> Charge {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Charge { budget: self.budget.clone(), bytes }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_grows_up_to_the_limit_and_is_given_back() {
        let budget = Budget::new(100);
        let mut charge = Charge::new(&budget);
        assert!(charge.grow(60) && budget.used() == 60 && !budget.has_ample_room());
        assert!(!charge.grow(41) && budget.used() == 60);
        let part = charge.split(50);
        drop(charge);
        assert_eq!(budget.used(), 50);
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_held_counts_beyond_the_limit() {
        let budget = Budget::new(100);
        let mut charge = Charge::new(&budget);
        charge.hold(150);
        assert!(!Charge::new(&budget).grow(1));
        drop(charge);
        assert!(Charge::new(&budget).grow(100));
    }
}
