//! The extension module.

mod codecs;

use pyo3::prelude::*;

#[pymodule]
fn _codecs(module: &Bound<'_, PyModule>) -> PyResult<()> {
    codecs::register(module)
}
