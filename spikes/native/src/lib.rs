//! A native transport: HTTP/2 and gRPC in Rust, what to answer in Python.

#![allow(clippy::result_large_err)] // failures are rare, and a box is not worth its words here

mod client;
mod coalesce;
mod grpc;
mod io;
mod python;
mod server;
