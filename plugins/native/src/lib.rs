//! A native transport: HTTP/2 and gRPC in Rust, what to answer in Python. The README draws how the modules go together.

mod attempt;
mod body;
mod call;
mod coalesce;
mod events;
mod fork;
mod io;
mod listen;
mod node;
mod python;
mod server;
mod settings;
mod socket;
mod stream;
mod tls;
mod window;

#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::python::{Attempt, ClientTls, Exchange, Node, ServerTls, Threads, Timer, stop_all, well_formed};
}
