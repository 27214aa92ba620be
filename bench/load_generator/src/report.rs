//! What is printed.

use crate::status::NAMES;
use crate::tally::Tally;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

const NS_PER_US: f64 = 1e3;

/// Everything, as JSON.
#[derive(Serialize)]
pub struct Report {
    /// What was measured.
    #[serde(flatten)]
    pub measured: Phase,
    /// Latency of its good answers, in µs.
    pub latency_us: Latency,
    /// CPU, user and system, that this process used for it.
    pub cpu_s: f64,
    pub cpu_us_per_request: f64,
    /// The same load before it.
    pub warm_up: Phase,
}

/// One phase, from its first request to its last answer.
#[derive(Serialize)]
pub struct Phase {
    /// Good answers: with the status OK, and the expected bytes if any are expected.
    ok: u64,
    /// All answers by their status.
    statuses: BTreeMap<&'static str, u64>,
    transport_errors: u64,
    mismatched: u64,
    first_error: Option<String>,
    seconds: f64,
    /// Good answers per second.
    requests_per_s: f64,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Latency {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    #[serde(rename = "p99.9")]
    p99_9: f64,
    max: f64,
}

impl Report {
    pub fn new(begun: Instant, tally: Tally, cpu: Duration, warm_up: Phase) -> Self {
        let (answered, latency_us) = (tally.answered(), Latency::from(&tally.latency));
        let cpu_s = cpu.as_secs_f64();
        let cpu_us_per_request = ratio(cpu_s * 1e6, answered as f64);
        Report { measured: Phase::new(begun, tally), latency_us, cpu_s, cpu_us_per_request, warm_up }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Phase {
    pub fn new(begun: Instant, tally: Tally) -> Self {
        let seconds = tally.last.map_or(0.0, |last| last.duration_since(begun).as_secs_f64());
        let statuses = NAMES.into_iter().zip(tally.statuses).filter(|(_, count)| *count > 0).collect();
        Phase {
            ok: tally.good(),
            statuses,
            transport_errors: tally.transport_errors,
            mismatched: tally.mismatched,
            requests_per_s: ratio(tally.good() as f64, seconds),
            first_error: tally.first_error,
            seconds,
        }
    }
}

impl From<&Histogram<u64>> for Latency {
    fn from(ns: &Histogram<u64>) -> Self {
        let at = |quantile| ns.value_at_quantile(quantile) as f64 / NS_PER_US;
        let (mean, max) = (ns.mean() / NS_PER_US, ns.max() as f64 / NS_PER_US);
        Latency { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), max }
    }
}

/// 0 where there is nothing to divide by: JSON has no other number for it.
fn ratio(value: f64, by: f64) -> f64 {
    if by > 0.0 { value / by } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::Outcome;
    use serde_json::{Value, json};

    #[test]
    fn percentiles_are_microseconds_to_three_digits() {
        let mut tally = Tally::new().unwrap();
        (1..=1_000).for_each(|us| tally.latency.saturating_record(us * 1_000));
        let latency = Latency::from(&tally.latency);
        let near = |value: f64, expected: f64| (value / expected - 1.0).abs() < 2e-3;
        for (value, expected) in [
            (latency.mean, 500.5),
            (latency.p50, 500.0),
            (latency.p90, 900.0),
            (latency.p99, 990.0),
            (latency.p99_9, 999.0),
            (latency.max, 1000.0),
        ] {
            assert!(near(value, expected), "{value} for {expected}");
        }
    }

    #[test]
    fn a_report_has_the_counts() {
        let begun = Instant::now();
        let mut tally = Tally::new().unwrap();
        for code in [0, 0, 0, 8] {
            tally.add(0, begun, Ok(Outcome { code, matches: true }));
        }
        let warm_up = Phase::new(begun, Tally::new().unwrap());
        let text = Report::new(begun, tally, Duration::from_micros(20), warm_up).to_string();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["ok"], 3);
        assert_eq!(value["statuses"], json!({"OK": 3, "RESOURCE_EXHAUSTED": 1}));
        assert_eq!(value["first_error"], "message 0: RESOURCE_EXHAUSTED");
        assert_eq!(value["cpu_us_per_request"], 5.0);
        assert_eq!(value["warm_up"]["requests_per_s"], 0.0);
        assert!(value["requests_per_s"].as_f64().unwrap() > 0.0);
    }
}
