//! When requests are due.

use crate::options::Amount;
use rustix::fd::OwnedFd;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::io;
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;

/// The requests of one phase: how many there are, and from when each one's latency counts.
pub struct Schedule {
    amount: Amount,
    begun: Instant,
    given: u64,
    pace: Option<Pace>,
}

struct Pace {
    rate: f64,
    timer: AsyncFd<OwnedFd>,
}

impl Schedule {
    /// With a `rate`, requests per second, request n is due n / rate seconds from now; else at once.
    pub fn new(amount: Amount, rate: Option<f64>) -> io::Result<Self> {
        let pace = rate.map(|rate| timer().map(|timer| Pace { rate, timer })).transpose()?;
        Ok(Schedule { amount, begun: Instant::now(), given: 0, pace })
    }

    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Waits until the next request is due, and says when that was; `None` after the last request.
    pub async fn next(&mut self) -> io::Result<Option<Instant>> {
        let due = match &self.pace {
            None => Instant::now(),
            Some(pace) => self.begun + Duration::from_secs_f64(self.given as f64 / pace.rate),
        };
        let over = match self.amount {
            Amount::Requests(requests) => self.given >= requests,
            Amount::Time(time) => due.duration_since(self.begun) >= time,
        };
        if over {
            return Ok(None);
        }
        if let Some(pace) = &self.pace {
            pace.wait_until(due).await?;
        }
        self.given += 1;
        Ok(Some(due))
    }
}

impl Pace {
    /// By the kernel's timer: tokio's is precise to a millisecond, which is more than most answers take.
    async fn wait_until(&self, due: Instant) -> io::Result<()> {
        let wait = due.saturating_duration_since(Instant::now());
        if wait.is_zero() {
            return Ok(());
        }
        // u32 nanoseconds fit; seconds are few.
        let once = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = Itimerspec { it_interval: never, it_value: once };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        loop {
            let mut ready = self.timer.readable().await?;
            // Reading takes the expiration away, so that the next wait does not end at once.
            match ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0; 8])?)) {
                Ok(read) => return read.map(|_| ()),
                Err(_would_block) => continue,
            }
        }
    }
}

fn timer() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    // SAFETY: the descriptor is open, and an `OwnedFd` keeps it so, and the same, until the `AsyncFd` drops it.
    Ok(unsafe { AsyncFd::register(timer) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_a_runtime<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn without_a_rate_requests_are_due_at_once_until_all_are_given() {
        on_a_runtime(async {
            let mut schedule = Schedule::new(Amount::Requests(2), None).unwrap();
            let first = schedule.next().await.unwrap().unwrap();
            assert!(first >= schedule.begun());
            assert!(schedule.next().await.unwrap().unwrap() >= first);
            assert_eq!(schedule.next().await.unwrap(), None);
        });
    }

    #[test]
    fn with_a_rate_requests_are_due_evenly_however_late_they_are_asked_for() {
        on_a_runtime(async {
            let mut schedule = Schedule::new(Amount::Time(Duration::from_millis(100)), Some(40.0)).unwrap();
            let mut due = vec![];
            while let Some(next) = schedule.next().await.unwrap() {
                assert!(Instant::now() >= next);
                due.push((next - schedule.begun()).as_millis());
                std::thread::sleep(Duration::from_millis(30)); // longer than between two of them
            }
            assert_eq!(due, [0, 25, 50, 75]);
        });
    }
}
