//! A native transport: HTTP and gRPC in Rust, what to answer in Python; and codecs. The README draws how the modules go
//! together.

mod attempt;
mod body;
mod call;
mod coalesce;
mod codecs;
mod events;
mod flag;
mod fork;
mod http;
mod http1;
mod http_body;
mod ids;
mod io;
mod listen;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod memory;
mod node;
mod pace;
mod python;
mod server;
mod settings;
mod signs;
mod socket;
mod stream;
mod tls;
mod window;

#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::python::{Attempt, ClientTls, Exchange, HttpExchange, Node, ServerTls, Threads, Timer, stop_all};

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        crate::codecs::register(module)
    }
}
