//! What came of the requests of one phase.

use crate::status::NAMES;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

/// Longer than any request is waited for.
const LONGEST_NS: u64 = 3_600_000_000_000;
/// Three significant digits.
const DIGITS: u8 = 3;

/// What came of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Its status, an index of `NAMES`.
    pub code: usize,
    /// Whether the answer has the expected bytes, or nothing was expected.
    pub matches: bool,
}

pub struct Tally {
    pub statuses: [u64; NAMES.len()],
    /// Requests without a well-formed answer.
    pub transport_errors: u64,
    /// Answers with the status OK and other bytes than the expected ones.
    pub mismatched: u64,
    /// About the first request that has no good answer.
    pub first_error: Option<String>,
    /// Nanoseconds of the good answers.
    pub latency: Histogram<u64>,
    /// When the last answer came.
    pub last: Option<Instant>,
}

impl Tally {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Tally {
            statuses: [0; NAMES.len()],
            transport_errors: 0,
            mismatched: 0,
            first_error: None,
            latency: Histogram::new_with_bounds(1, LONGEST_NS, DIGITS)?,
            last: None,
        })
    }

    /// A request with the message `number` of the file, whose latency counts from `due`.
    pub fn add(&mut self, number: usize, due: Instant, outcome: Result<Outcome, String>) {
        let now = Instant::now();
        self.last = Some(now);
        let wrong = match outcome {
            Err(error) => {
                self.transport_errors += 1;
                error
            }
            Ok(Outcome { code, matches }) => {
                self.statuses[code] += 1;
                if code != 0 {
                    NAMES[code].into()
                } else if !matches {
                    self.mismatched += 1;
                    "the answer differs from the expected one".into()
                } else {
                    self.latency.saturating_record(nanoseconds(now.duration_since(due)));
                    return;
                }
            }
        };
        self.first_error.get_or_insert_with(|| format!("message {number}: {wrong}"));
    }

    /// All requests.
    pub fn answered(&self) -> u64 {
        self.statuses.iter().sum::<u64>() + self.transport_errors
    }

    /// Requests with the status OK and the expected answer.
    pub fn good(&self) -> u64 {
        self.statuses[0] - self.mismatched
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(LONGEST_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Outcome = Outcome { code: 0, matches: true };

    fn ago(ms: u64) -> Instant {
        Instant::now() - Duration::from_millis(ms)
    }

    #[test]
    fn outcomes_are_counted_apart() {
        let mut tally = Tally::new().unwrap();
        tally.add(0, ago(0), Ok(GOOD));
        tally.add(1, ago(0), Ok(Outcome { matches: false, ..GOOD }));
        tally.add(2, ago(0), Ok(Outcome { code: 14, ..GOOD }));
        tally.add(3, ago(0), Err("reset".into()));
        assert_eq!((tally.answered(), tally.good()), (4, 1));
        assert_eq!((tally.statuses[0], tally.statuses[14], tally.mismatched, tally.transport_errors), (2, 1, 1, 1));
        assert_eq!(tally.first_error.as_deref(), Some("message 1: the answer differs from the expected one"));
    }

    #[test]
    fn latency_is_that_of_good_answers_from_when_they_were_due() {
        let mut tally = Tally::new().unwrap();
        for ms in [1_000, 2_000, 3_000] {
            tally.add(0, ago(ms), Ok(GOOD));
        }
        tally.add(0, ago(9_000), Ok(Outcome { code: 4, ..GOOD }));
        assert_eq!(tally.latency.len(), 3);
        let median = tally.latency.value_at_quantile(0.5);
        assert!((2_000_000_000..2_900_000_000).contains(&median), "{median}");
    }

    #[test]
    fn the_longest_latency_is_an_hour() {
        let mut tally = Tally::new().unwrap();
        tally.latency.saturating_record(u64::MAX);
        assert!(tally.latency.max() >= LONGEST_NS);
        assert_eq!(nanoseconds(Duration::MAX), LONGEST_NS);
    }
}
