//! gRPC's frames: a prefix of five bytes, then a message.

use crate::budget::Charge;
use crate::encoding::Encoding;
use crate::refusals::Reason;
use crate::status::{Code, Failure};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// A frame's first bytes: whether its message is compressed, and the length of the message.
pub const PREFIX: usize = 5;

/// Room for a message is made in steps of at most its own size so far, and of this size at first: a peer may announce
/// a large message and send nothing of it.
const FIRST_STEP: usize = 256 << 10;

pub fn check_size(what: &str, size: usize, limit: usize) -> Result<(), Failure> {
    if size <= limit {
        return Ok(());
    }
    // These are gRPC's own words, by which `errors.from_status` knows the failure.
    Err(Failure::new(Code::RESOURCE_EXHAUSTED, format!("{what} message larger than max ({size} vs. {limit})")))
}

/// Whether a message that comes is small enough.
pub(crate) fn check_received(size: usize, limit: usize) -> Result<(), Failure> {
    check_size("Received", size, limit).map_err(|failure| failure.because(Reason::MessageBytes))
}

fn no_room() -> Failure {
    Failure::new(Code::RESOURCE_EXHAUSTED, "the process holds as many bytes of messages as it may")
        .because(Reason::Buffer)
}

/// The message of a whole frame.
pub fn message_of(frame: &Bytes) -> Bytes {
    frame.slice(PREFIX.min(frame.len())..)
}

/// A whole frame of a message that is not compressed, and the budget that it uses.
#[derive(Debug)]
pub struct Frame {
    bytes: Bytes,
    charge: Charge,
}

impl Frame {
    /// A frame of a message of `size` bytes that `fill` writes. They count even beyond the budget.
    pub fn build<E: From<Failure>>(
        size: usize,
        mut charge: Charge,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Frame, E> {
        check_size("Sent", size, u32::MAX as usize)?;
        let mut bytes = BytesMut::zeroed(PREFIX + size);
        let (mut prefix, message) = bytes.split_at_mut(PREFIX);
        prefix.put_u8(0);
        prefix.put_u32(u32::try_from(size).unwrap_or(u32::MAX));
        fill(message)?;
        charge.hold(bytes.len());
        Ok(Frame { bytes: bytes.freeze(), charge })
    }

    /// A frame without a message: what a stream has in the place of one.
    pub fn none(charge: Charge) -> Frame {
        Frame { bytes: Bytes::from_static(&[0; PREFIX]), charge }
    }

    /// The whole frame.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn message(&self) -> Bytes {
        message_of(&self.bytes)
    }

    /// Its first `size` bytes, which it does not have any more.
    pub fn split_to(&mut self, size: usize) -> Frame {
        let size = size.min(self.bytes.len());
        Frame { bytes: self.bytes.split_to(size), charge: self.charge.split(size) }
    }

    /// Of the message.
    pub fn size(&self) -> usize {
        self.bytes.len().saturating_sub(PREFIX)
    }
}

/// So that HTTP/2 holds the charge for as long as it holds the bytes.
impl Buf for Frame {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

/// A frame as it came.
#[derive(Debug)]
pub struct Message {
    frame: Bytes,
    compressed: bool,
    malformed: Code,
    charge: Charge,
}

impl Message {
    /// The frame of the message, unpacked where it is compressed. `turn` lets others run meanwhile.
    pub async fn unpack(mut self, encoding: &Encoding, limit: usize, turn: impl AsyncFn()) -> Result<Frame, Failure> {
        if !self.compressed {
            return Ok(Frame { bytes: self.frame, charge: self.charge });
        }
        let charge = &mut self.charge;
        let packed = self.frame.get(PREFIX..).unwrap_or_default();
        let held = |more| if charge.grow(more) { Ok(()) } else { Err(no_room()) };
        let bytes = encoding.unpack(packed, limit, self.malformed, held, turn).await?;
        drop(self.charge.split(usize::MAX));
        self.charge.hold(bytes.len());
        Ok(Frame { bytes, charge: self.charge })
    }
}

/// Finds messages in the pieces in which they come. A message that comes in one piece is not copied.
#[derive(Debug)]
pub struct Deframer {
    limit: usize,
    malformed: Code,
    charge: Charge,
    /// What has come and belongs to no message yet; in `whole` while it is one piece, else in `joined`.
    whole: Bytes,
    joined: BytesMut,
}

impl Deframer {
    /// `limit` is of the bytes of a message; what is malformed fails with the code `malformed`.
    pub fn new(limit: usize, malformed: Code, charge: Charge) -> Self {
        Deframer { limit, malformed, charge, whole: Bytes::new(), joined: BytesMut::new() }
    }

    fn held(&self) -> &[u8] {
        if self.joined.is_empty() { &self.whole } else { &self.joined }
    }

    pub fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    /// Bytes that have come and belong to no message that was returned.
    pub fn len(&self) -> usize {
        self.held().len()
    }

    pub fn push(&mut self, piece: Bytes) -> Result<(), Failure> {
        if !self.charge.grow(piece.len()) {
            return Err(no_room());
        }
        if self.is_empty() {
            self.whole = piece;
            return Ok(());
        }
        if self.joined.is_empty() {
            self.joined.extend_from_slice(&std::mem::take(&mut self.whole));
        }
        if let Some((_, size)) = prefix(&self.joined) {
            let missing = (PREFIX + size.min(self.limit)).saturating_sub(self.joined.len());
            self.joined.reserve(missing.min(FIRST_STEP.max(self.joined.len())).max(piece.len()));
        }
        self.joined.extend_from_slice(&piece);
        Ok(())
    }

    /// The next message that is whole.
    pub fn next_message(&mut self) -> Result<Option<Message>, Failure> {
        let held = self.held();
        let Some((flag, size)) = prefix(held) else { return Ok(None) };
        if flag > 1 {
            return Err(Failure::new(
                self.malformed,
                format!("the first byte of a message's frame is 0 or 1; got {flag}"),
            ));
        }
        check_received(size, self.limit)?;
        let end = PREFIX + size;
        if held.len() < end {
            return Ok(None);
        }
        let frame = if self.joined.is_empty() { self.whole.split_to(end) } else { self.joined.split_to(end).freeze() };
        Ok(Some(Message { frame, compressed: flag == 1, malformed: self.malformed, charge: self.charge.split(end) }))
    }
}

fn prefix(bytes: &[u8]) -> Option<(u8, usize)> {
    let [flag, a, b, c, d, ..] = bytes else { return None };
    Some((*flag, u32::from_be_bytes([*a, *b, *c, *d]) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::encoding::at_once;
    use std::io::Write;
    use std::sync::Arc;

    fn budget() -> Arc<Budget> {
        Budget::new(1 << 20)
    }

    fn frame(message: &[u8]) -> Bytes {
        let built = Frame::build(message.len(), Charge::new(&budget()), |place| {
            place.copy_from_slice(message);
            Ok::<(), Failure>(())
        });
        built.unwrap().bytes().clone()
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let messages: [&[u8]; 4] = [b"one", b"", b"three and more", &[7; 300]];
        let all = messages.map(frame).concat();
        for step in 1..all.len() {
            let budget = budget();
            let mut deframer = Deframer::new(300, Code::INTERNAL, Charge::new(&budget));
            let mut found = vec![];
            for piece in all.chunks(step) {
                deframer.push(Bytes::copy_from_slice(piece)).unwrap();
                while let Some(message) = deframer.next_message().unwrap() {
                    found.push(at_once(message.unpack(&Encoding::Identity, 300, async || {})).unwrap());
                }
            }
            assert!(deframer.is_empty());
            assert_eq!(found.iter().map(Frame::message).collect::<Vec<_>>(), messages);
            assert_eq!(budget.used(), all.len());
            drop((found, deframer));
            assert_eq!(budget.used(), 0);
        }
    }

    #[test]
    fn a_message_in_one_piece_is_not_copied() {
        let piece = frame(b"whole");
        let mut deframer = Deframer::new(10, Code::INTERNAL, Charge::new(&budget()));
        deframer.push(piece.clone()).unwrap();
        let message = deframer.next_message().unwrap().unwrap();
        let message = at_once(message.unpack(&Encoding::Identity, 10, async || {})).unwrap();
        assert_eq!(message.bytes().as_ptr(), piece.as_ptr());
    }

    #[test]
    fn a_message_over_the_limit_is_refused_by_its_prefix_alone() {
        let mut deframer = Deframer::new(4, Code::INTERNAL, Charge::new(&budget()));
        deframer.push(frame(b"large").slice(..PREFIX)).unwrap();
        let refused = deframer.next_message().unwrap_err();
        assert_eq!(refused.code, Code::RESOURCE_EXHAUSTED);
        assert_eq!(refused.message, "Received message larger than max (5 vs. 4)");
    }

    #[test]
    fn what_is_no_frame_fails() {
        let mut deframer = Deframer::new(4, Code::INTERNAL, Charge::new(&budget()));
        deframer.push(Bytes::from_static(b"<html>")).unwrap();
        assert_eq!(deframer.next_message().unwrap_err().code, Code::INTERNAL);
    }

    #[test]
    fn a_message_that_the_budget_has_no_room_for_is_refused() {
        let budget = Budget::new(100);
        let mut deframer = Deframer::new(1000, Code::INTERNAL, Charge::new(&budget));
        deframer.push(Bytes::from(vec![0; 90])).unwrap();
        assert_eq!(deframer.push(Bytes::from(vec![0; 11])).unwrap_err().code, Code::RESOURCE_EXHAUSTED);
        drop(deframer);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_compressed_message_uses_the_budget_for_what_it_unpacks_to() {
        let budget = budget();
        let mut packing = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::best());
        packing.write_all(&[7; 1000]).unwrap();
        let packed = packing.finish().unwrap();
        let mut whole = BytesMut::from(&[1, 0, 0, 0, packed.len() as u8][..]);
        whole.extend_from_slice(&packed);
        let mut deframer = Deframer::new(1000, Code::INTERNAL, Charge::new(&budget));
        deframer.push(whole.freeze()).unwrap();
        let message = deframer.next_message().unwrap().unwrap();
        let frame = at_once(message.unpack(&Encoding::Deflate, 1000, async || {})).unwrap();
        assert_eq!((frame.size(), budget.used()), (1000, PREFIX + 1000));
    }
}
