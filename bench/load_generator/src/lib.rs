//! What the load generator and the echo server share.

pub mod together;
