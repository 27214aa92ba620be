//! What gRPC adds to HTTP/2: frames, statuses, timeouts and metadata. No Python, no sockets, no threads.

mod authority;
mod budget;
mod encoding;
mod frames;
mod metadata;
mod refusals;
mod status;
mod timeout;

pub use authority::Authorities;
pub use budget::{Budget, Charge};
pub use encoding::{ACCEPTED, Encoding};
pub use frames::{Deframer, Frame, Message, PREFIX, check_size, message_of};
pub use metadata::{check_header_bytes, check_headers, decode_binary, encode_binary, is_reserved};
pub use refusals::{Reason, Refusals};
pub use status::{Code, Failure, GRPC_STATUS, status_headers, status_of};
pub use timeout::{GRPC_TIMEOUT, Timeouts, timeout_of};
