//! The plain messages of inference protocols, read and written without protobuf.
//!
//! The core's Python readers and codecs are the reference. Each function here answers only where it is sure that the
//! reference gives the same result. Everything else is `NotPlain`, and the reference decides: malformed bytes, fields
//! that occur twice, groups, strings in tensors, messages that may cost too much to decode. So this crate has no error
//! messages of its own.

pub mod key;
pub mod openinference;
pub mod seldon;
pub mod tensor;
pub mod tfserving;
pub mod walk;
pub mod write;

pub use key::{Key, KeyFields, Model, Version, find_key};
pub use tensor::{Dtype, Output, Shape, Tensor, Values};
pub use walk::{NotPlain, well_formed};
