//! Compressed messages.

use crate::frames::{PREFIX, check_received};
use crate::status::{Code, Failure};
use bytes::{BufMut, Bytes, BytesMut};
use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::{HeaderMap, HeaderName};
use std::io::{ErrorKind, Read};

/// What `grpc-accept-encoding` says here.
pub const ACCEPTED: &str = "identity,gzip,deflate";

/// Room for an unpacked message is made by at most so many bytes at a time.
const STEP: usize = 64 << 10;

/// Others have a turn after so many bytes, which take about 1 ms.
const TURN: usize = 4 * STEP;

const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// How the compressed messages of a call are compressed, from its header `grpc-encoding`.
#[derive(Clone, Debug, PartialEq)]
pub enum Encoding {
    Identity,
    Gzip,
    Deflate,
    Unknown(String),
}

impl Encoding {
    pub fn of(headers: &HeaderMap) -> Encoding {
        match headers.get(GRPC_ENCODING).map(|value| value.as_bytes()) {
            None | Some(b"identity") => Encoding::Identity,
            Some(b"gzip") => Encoding::Gzip,
            Some(b"deflate") => Encoding::Deflate,
            Some(name) => Encoding::Unknown(String::from_utf8_lossy(name).into_owned()),
        }
    }

    /// The frame of the message that `packed` was made of. `held` is asked before memory for more bytes is taken; `turn`
    /// lets others run. What is malformed fails with the code `malformed`.
    pub async fn unpack(
        &self,
        packed: &[u8],
        limit: usize,
        malformed: Code,
        held: impl FnMut(usize) -> Result<(), Failure>,
        turn: impl AsyncFn(),
    ) -> Result<Bytes, Failure> {
        let (name, frame, rest) = match self {
            Encoding::Gzip => {
                let mut unpacking = GzDecoder::new(packed);
                ("gzip", unpacked(&mut unpacking, limit, held, turn).await, unpacking.into_inner())
            }
            Encoding::Deflate => {
                let mut unpacking = ZlibDecoder::new(packed);
                ("deflate", unpacked(&mut unpacking, limit, held, turn).await, unpacking.into_inner())
            }
            Encoding::Identity => {
                let said = "the message is compressed, and no grpc-encoding says how";
                return Err(Failure::new(malformed, said));
            }
            Encoding::Unknown(name) => {
                let said = format!("the grpc-encoding \"{name}\" is not known; known: identity, gzip, deflate");
                return Err(Failure::new(Code::UNIMPLEMENTED, said));
            }
        };
        let said = match frame {
            Ok(frame) if rest.is_empty() => return Ok(frame),
            Ok(_) => format!("the message goes on after its {name} has ended"),
            Err(Unpacking::Failed(failure)) => return Err(failure),
            Err(Unpacking::Damaged(ErrorKind::UnexpectedEof)) => format!("the message ends before its {name} does"),
            Err(Unpacking::Damaged(_)) => format!("the message is not compressed by {name}, as its grpc-encoding says"),
        };
        Err(Failure::new(malformed, said))
    }
}

/// Why a message could not be unpacked.
enum Unpacking {
    Damaged(ErrorKind),
    Failed(Failure),
}

impl From<Failure> for Unpacking {
    fn from(failure: Failure) -> Self {
        Unpacking::Failed(failure)
    }
}

async fn unpacked(
    unpacking: &mut impl Read,
    limit: usize,
    mut held: impl FnMut(usize) -> Result<(), Failure>,
    turn: impl AsyncFn(),
) -> Result<Bytes, Unpacking> {
    let mut frame = BytesMut::zeroed(PREFIX);
    let mut since_turn = 0;
    loop {
        let end = frame.len();
        held(STEP)?;
        frame.resize(end + STEP, 0);
        let read = unpacking.read(frame.get_mut(end..).unwrap_or_default());
        let read = read.map_err(|error| Unpacking::Damaged(error.kind()))?;
        frame.truncate(end + read);
        let size = frame.len() - PREFIX;
        check_received(size, limit)?;
        if read == 0 {
            let mut prefix: &mut [u8] = frame.get_mut(1..PREFIX).unwrap_or_default();
            prefix.put_u32(u32::try_from(size).unwrap_or(u32::MAX));
            return Ok(frame.freeze());
        }
        since_turn += read;
        if since_turn >= TURN {
            since_turn = 0;
            turn().await;
        }
    }
}

/// What `future` gives, which waits for nothing.
#[cfg(test)]
pub(crate) fn at_once<T>(future: impl Future<Output = T>) -> T {
    match std::pin::pin!(future).poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("it waits"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use std::cell::Cell;
    use std::io::Write;

    const MALFORMED: Code = Code::INVALID_ARGUMENT;

    fn packed(encoding: &Encoding, message: &[u8]) -> Vec<u8> {
        if *encoding == Encoding::Gzip {
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
                let packed = packed(&encoding, &message);
                let frame = at_once(encoding.unpack(&packed, size, MALFORMED, |_| Ok(()), async || {})).unwrap();
                assert_eq!(&frame[PREFIX..], message);
                assert_eq!(frame[1..PREFIX], (size as u32).to_be_bytes());
            }
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_fills_the_memory() {
        let mut most = 0;
        let whole = packed(&Encoding::Gzip, &vec![0; 100 << 20]);
        let held = |more| {
            most += more;
            Ok(())
        };
        let refused = at_once(Encoding::Gzip.unpack(&whole, 1 << 20, MALFORMED, held, async || {}));
        assert_eq!(refused.unwrap_err().code, Code::RESOURCE_EXHAUSTED);
        assert!(most <= (4 << 20), "{most}");
    }

    #[test]
    fn others_have_a_turn_while_a_large_message_is_unpacked() {
        for (size, expected) in [(TURN - 1, 0), (TURN, 1), (10 * TURN, 10)] {
            let turns = Cell::new(0);
            let whole = packed(&Encoding::Gzip, &vec![7; size]);
            let turn = async || turns.set(turns.get() + 1);
            at_once(Encoding::Gzip.unpack(&whole, size, MALFORMED, |_| Ok(()), turn)).unwrap();
            assert_eq!(turns.get(), expected);
        }
    }

    #[test]
    fn damaged_and_short_and_long_messages_are_malformed() {
        let whole = packed(&Encoding::Gzip, &[7; 1000]);
        let longer = [&whole[..], b"x"].concat();
        for (broken, said) in [
            (&whole[..whole.len() - 1], "ends before its gzip"),
            (&whole[..12], "ends before its gzip"),
            (b"", "ends before its gzip"),
            (b"no gzip at all", "not compressed by gzip"),
            (&longer, "goes on after its gzip"),
        ] {
            let failure =
                at_once(Encoding::Gzip.unpack(broken, 1 << 20, MALFORMED, |_| Ok(()), async || {})).unwrap_err();
            assert_eq!(failure.code, MALFORMED);
            assert!(failure.message.contains(said), "{}", failure.message);
        }
    }

    #[test]
    fn an_unknown_encoding_is_unimplemented() {
        let mut headers = HeaderMap::new();
        assert_eq!(Encoding::of(&headers), Encoding::Identity);
        headers.insert("grpc-encoding", "snappy".parse().unwrap());
        let refused = at_once(Encoding::of(&headers).unpack(b"", 10, MALFORMED, |_| Ok(()), async || {}));
        assert_eq!(refused.unwrap_err().code, Code::UNIMPLEMENTED);
    }
}
