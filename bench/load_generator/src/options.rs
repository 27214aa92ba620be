//! The command line.

use crate::bodies;
use crate::run::Traffic;
use anyhow::{Context, bail};
use clap::{ArgGroup, Parser};
use http::{HeaderName, HeaderValue, Request, Uri};
use std::path::PathBuf;
use std::time::Duration;

/// Replays gRPC requests over HTTP/2 and prints what came back as JSON.
#[derive(Debug, Parser)]
#[command(group(ArgGroup::new("amount").required(true).args(["requests", "seconds"])))]
pub struct Options {
    /// HOST:PORT of the server
    #[arg(long)]
    pub address: String,
    /// Path of the method, such as /inference.GRPCInferenceService/ModelInfer
    #[arg(long)]
    pub path: String,
    /// File of the request messages, which are sent in turn: each a big-endian u32 with its length, then its bytes
    #[arg(long, value_name = "FILE")]
    pub bodies: PathBuf,
    /// File of the expected answers in the same format, one for each message; an answer with other bytes is a mismatch
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
    /// PEM file of the authorities that the server's certificate may come from; speaks TLS 1.3. Without, plaintext
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// A line of metadata, "name: value"; may be repeated
    #[arg(long = "header", value_name = "LINE")]
    pub headers: Vec<String>,
    /// Requests in flight, over all connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub in_flight: u32,
    /// Connections, of which each has an equal share of the requests in flight
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// How many requests to send
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// For how many seconds to send requests; the answers to all of them are awaited and counted
    #[arg(long, value_name = "S", value_parser = positive)]
    pub seconds: Option<f64>,
    /// Seconds of the same load before, reported apart
    #[arg(long, value_name = "S", default_value = "0", value_parser = not_negative)]
    pub warm_up: f64,
    /// Requests per second, evenly spaced; latency then starts when a request is due, not when one of the --in-flight
    /// places is free to send it. By default each answer is followed by the next request
    #[arg(long, value_name = "R", value_parser = positive)]
    pub rate: Option<f64>,
    /// Seconds without an answer to the requests in flight after which the run fails
    #[arg(long, value_name = "S", default_value = "30", value_parser = positive)]
    pub stall: f64,
}

/// How long a phase sends requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    Requests(u64),
    Time(Duration),
}

impl Options {
    pub fn amount(&self) -> Amount {
        match (self.requests, self.seconds) {
            (Some(requests), _) => Amount::Requests(requests),
            (None, seconds) => Amount::Time(Duration::from_secs_f64(seconds.unwrap_or_default())),
        }
    }

    /// What is sent and what is expected, from the files.
    pub fn traffic(&self) -> anyhow::Result<Traffic> {
        if self.in_flight < self.connections {
            bail!("{} requests in flight do not fill {} connections", self.in_flight, self.connections);
        }
        let messages = bodies::read(&self.bodies)?;
        let answers = self.answers.as_deref().map(bodies::read).transpose()?;
        if let Some(answers) = answers.as_ref().filter(|answers| answers.len() != messages.len()) {
            bail!("there are {} answers; expected one for each of the {} messages", answers.len(), messages.len());
        }
        Ok(Traffic::new(self.request()?, &messages, answers))
    }

    fn request(&self) -> anyhow::Result<Request<()>> {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        let uri = Uri::builder().scheme(scheme).authority(self.address.as_str()).path_and_query(self.path.as_str());
        let uri = uri.build().with_context(|| format!("{scheme}://{}{} is not a URL", self.address, self.path))?;
        let mut request = Request::post(uri);
        for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
            request = request.header(name, value);
        }
        for line in &self.headers {
            let (name, value) = header(line).with_context(|| format!("{line:?} is not a header \"name: value\""))?;
            request = request.header(name, value);
        }
        Ok(request.body(())?)
    }
}

fn header(line: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = line.split_once(": ").context("there is no \": \"")?;
    Ok((name.parse()?, value.parse()?))
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // A million seconds and more overflow nothing, and are nobody's benchmark.
        Ok(value) if (0.0..=1e6).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 1000000".into()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    not_negative(text).and_then(|value| if value > 0.0 { Ok(value) } else { Err("expected more than 0".into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: [&str; 7] = ["load-generator", "--address", "127.0.0.1:1", "--path", "/s/m", "--bodies", "b"];

    fn parse(more: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from(NEEDED.iter().chain(more))
    }

    #[test]
    fn the_command_is_sound() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn the_amount_is_requests_or_seconds() {
        assert_eq!(parse(&["--requests", "5"]).unwrap().amount(), Amount::Requests(5));
        assert_eq!(parse(&["--seconds", "0.5"]).unwrap().amount(), Amount::Time(Duration::from_millis(500)));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--requests", "5", "--seconds", "1"]).is_err());
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for value in ["0", "-1", "NaN", "inf", "x"] {
            assert!(parse(&["--seconds", value]).is_err(), "{value}");
        }
        assert!(parse(&["--requests", "0"]).is_err());
        assert!(parse(&["--requests", "1", "--in-flight", "0"]).is_err());
    }

    #[test]
    fn headers_go_with_the_request() {
        let request = parse(&["--requests", "1", "--header", "grpc-timeout: 60S"]).unwrap().request().unwrap();
        assert_eq!(request.uri(), "http://127.0.0.1:1/s/m");
        assert_eq!(request.headers()["grpc-timeout"], "60S");
        assert_eq!(request.headers()["te"], "trailers");
        for line in ["no-colon", "bad name: x", "x: \n"] {
            let error = parse(&["--requests", "1", "--header", line]).unwrap().request().unwrap_err();
            assert!(error.to_string().contains("is not a header"), "{error}");
        }
    }
}
