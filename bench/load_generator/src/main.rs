//! Replays gRPC requests over HTTP/2 and says what came back. See README.md.

mod answer;
mod bodies;
mod connection;
mod options;
mod report;
mod run;
mod schedule;
mod status;
mod tally;
mod tls;

use crate::options::Options;
use crate::report::Report;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match replay(&Options::parse()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn replay(options: &Options) -> anyhow::Result<Report> {
    let traffic = options.traffic()?;
    // One thread: a second one would take a core from the server that is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(run::run(options, traffic))
}
