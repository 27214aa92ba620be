//! Compressed messages.

use crate::frames::{PREFIX, check_size};
use crate::status::{Code, Failure};
use bytes::{BufMut, Bytes, BytesMut};
use flate2::read::{GzDecoder, ZlibDecoder};
use http::HeaderMap;
use std::io::Read;

/// What `grpc-accept-encoding` says here.
pub const ACCEPTED: &str = "identity, deflate, gzip";

/// Room for an unpacked message is made by at most so many bytes at a time.
const STEP: usize = 64 << 10;

/// How the compressed messages of a call are compressed, from its header `grpc-encoding`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encoding {
    Identity,
    Gzip,
    Deflate,
    Unknown,
}

impl Encoding {
    pub fn of(headers: &HeaderMap) -> Encoding {
        match headers.get("grpc-encoding").map(|value| value.as_bytes()) {
            None | Some(b"identity") => Encoding::Identity,
            Some(b"gzip") => Encoding::Gzip,
            Some(b"deflate") => Encoding::Deflate,
            Some(_) => Encoding::Unknown,
        }
    }

    /// The frame of the message that `packed` was made of. `held` is asked before memory for more bytes is taken.
    pub fn unpack(
        self,
        packed: &[u8],
        limit: usize,
        mut held: impl FnMut(usize) -> Result<(), Failure>,
    ) -> Result<Bytes, Failure> {
        let mut unpacking: Box<dyn Read + '_> = match self {
            Encoding::Gzip => Box::new(GzDecoder::new(packed)),
            Encoding::Deflate => Box::new(ZlibDecoder::new(packed)),
            Encoding::Identity => {
                let said = "the message is compressed, but grpc-encoding names no compression";
                return Err(Failure::new(Code::INTERNAL, said));
            }
            Encoding::Unknown => {
                let said = format!("the compression is unknown; expected one of {ACCEPTED}");
                return Err(Failure::new(Code::UNIMPLEMENTED, said));
            }
        };
        let mut frame = BytesMut::zeroed(PREFIX);
        loop {
            let end = frame.len();
            held(STEP)?;
            frame.resize(end + STEP, 0);
            let read = unpacking
                .read(frame.get_mut(end..).unwrap_or_default())
                .map_err(|error| Failure::new(Code::INTERNAL, format!("the compressed message is damaged: {error}")))?;
            frame.truncate(end + read);
            let size = frame.len() - PREFIX;
            check_size("Received", size, limit)?;
            if read == 0 {
                let mut prefix: &mut [u8] = frame.get_mut(1..PREFIX).unwrap_or_default();
                prefix.put_u32(u32::try_from(size).unwrap_or(u32::MAX));
                return Ok(frame.freeze());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use std::io::Write;

    fn packed(encoding: Encoding, message: &[u8]) -> Vec<u8> {
        if encoding == Encoding::Gzip {
            let mut packing = GzEncoder::new(Vec::new(), Compression::default());
            packing.write_all(message).unwrap();
            packing.finish().unwrap()
        } else {
            let mut packing = ZlibEncoder::new(Vec::new(), Compression::default());
            packing.write_all(message).unwrap();
            packing.finish().unwrap()
        }
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        for encoding in [Encoding::Gzip, Encoding::Deflate] {
            for size in [0, 1, STEP - 1, STEP, STEP + 1, 5 * STEP] {
                let message: Vec<u8> = (0..size).map(|at| (at * at % 251) as u8).collect();
                let frame = encoding.unpack(&packed(encoding, &message), size, |_| Ok(())).unwrap();
                assert_eq!(&frame[PREFIX..], message);
                assert_eq!(frame[1..PREFIX], (size as u32).to_be_bytes());
            }
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_fills_the_memory() {
        let mut most = 0;
        let refused = Encoding::Gzip.unpack(&packed(Encoding::Gzip, &vec![0; 100 << 20]), 1 << 20, |more| {
            most += more;
            Ok(())
        });
        assert_eq!(refused.unwrap_err().code, Code::RESOURCE_EXHAUSTED);
        assert!(most <= (4 << 20), "{most}");
    }

    #[test]
    fn damaged_and_short_messages_fail() {
        let whole = packed(Encoding::Gzip, &[7; 1000]);
        for broken in [&whole[..whole.len() - 1], &whole[..12], b"", b"no gzip at all"] {
            assert_eq!(Encoding::Gzip.unpack(broken, 1 << 20, |_| Ok(())).unwrap_err().code, Code::INTERNAL);
        }
    }

    #[test]
    fn an_unknown_encoding_is_unimplemented() {
        let mut headers = HeaderMap::new();
        assert_eq!(Encoding::of(&headers), Encoding::Identity);
        headers.insert("grpc-encoding", "snappy".parse().unwrap());
        let refused = Encoding::of(&headers).unpack(b"", 10, |_| Ok(()));
        assert_eq!(refused.unwrap_err().code, Code::UNIMPLEMENTED);
    }
}
