//! Files of messages.

use anyhow::{Context, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::path::Path;

/// gRPC's prefix of a message: whether it is compressed, and its length as a big-endian u32.
pub const PREFIX: usize = 5;
const LENGTH: usize = 4;

/// The messages of a file, one at the least.
pub fn read(file: &Path) -> anyhow::Result<Vec<Bytes>> {
    let content = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let messages = parse(content.into()).with_context(|| format!("{} is malformed", file.display()))?;
    if messages.is_empty() {
        bail!("{} has no message", file.display());
    }
    Ok(messages)
}

/// Each message is a big-endian u32 with its length, then its bytes.
fn parse(mut content: Bytes) -> anyhow::Result<Vec<Bytes>> {
    let mut messages = vec![];
    while content.has_remaining() {
        let number = messages.len();
        if content.len() < LENGTH {
            bail!("message {number} has {} of the {LENGTH} bytes of its length", content.len());
        }
        let length = content.get_u32() as usize;
        if content.len() < length {
            bail!("message {number} has {} of its {length} bytes", content.len());
        }
        messages.push(content.split_to(length));
    }
    Ok(messages)
}

/// A message as gRPC sends it.
pub fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX + message.len());
    frame.put_u8(0);
    // The file has it as a u32 too.
    frame.put_u32(message.len() as u32);
    frame.put_slice(message);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_in_their_order() {
        let content = Bytes::from_static(b"\0\0\0\x02ab\0\0\0\0\0\0\0\x01c");
        assert_eq!(parse(content).unwrap(), ["ab", "", "c"]);
    }

    #[test]
    fn every_cut_is_an_error_or_fewer_messages() {
        let content = Bytes::from_static(b"\0\0\0\x02ab\0\0\0\x01c");
        let whole: Vec<usize> = vec![0, 6, 11];
        for end in 0..=content.len() {
            assert_eq!(parse(content.slice(..end)).is_ok(), whole.contains(&end), "{end} bytes");
        }
    }

    #[test]
    fn an_error_names_the_message() {
        let error = parse(Bytes::from_static(b"\0\0\0\x01a\xff\xff\xff\xffb")).unwrap_err();
        assert_eq!(error.to_string(), "message 1 has 1 of its 4294967295 bytes");
    }

    #[test]
    fn a_frame_has_grpcs_prefix() {
        assert_eq!(framed(&[7; 258])[..6], [0, 0, 0, 1, 2, 7]);
        assert_eq!(framed(b""), Bytes::from_static(&[0; 5]));
    }
}
