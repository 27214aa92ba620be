//! The body of an answer: one gRPC message, checked as it comes.

use crate::bodies::PREFIX;

/// Follows the bytes of one answer, and keeps none of them.
pub struct Answer<'a> {
    prefix: [u8; PREFIX],
    received: usize,
    expected: Option<&'a [u8]>,
    same: bool,
}

impl<'a> Answer<'a> {
    /// With `expected`, its bytes are compared.
    pub fn new(expected: Option<&'a [u8]>) -> Self {
        Answer { prefix: [0; PREFIX], received: 0, expected, same: true }
    }

    pub fn take(&mut self, mut chunk: &[u8]) {
        if let Some(missing) = PREFIX.checked_sub(self.received) {
            let (head, rest) = chunk.split_at(missing.min(chunk.len()));
            self.prefix[self.received..self.received + head.len()].copy_from_slice(head);
            self.received += head.len();
            chunk = rest;
        }
        if chunk.is_empty() {
            return;
        }
        if let Some(expected) = self.expected {
            let at = self.received - PREFIX;
            self.same &= expected.get(at..at + chunk.len()) == Some(chunk);
        }
        self.received += chunk.len();
    }

    /// Whether the message is the expected one, or nothing was expected. `Err` says why it is not one message.
    pub fn finish(self) -> Result<bool, String> {
        let [compressed, length @ ..] = self.prefix;
        let length = u32::from_be_bytes(length) as usize;
        match self.received.checked_sub(PREFIX) {
            None => Err(format!("an OK answer has {} bytes; expected a message", self.received)),
            Some(_) if compressed != 0 => Err("an answer is compressed, which was not asked for".into()),
            Some(received) if received != length => {
                Err(format!("an answer has {received} bytes after its prefix, which says {length}"))
            }
            Some(_) => Ok(self.same && self.expected.is_none_or(|expected| expected.len() == length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bodies::framed;

    fn finish(bytes: &[u8], chunk: usize, expected: Option<&[u8]>) -> Result<bool, String> {
        let mut answer = Answer::new(expected);
        bytes.chunks(chunk).for_each(|chunk| answer.take(chunk));
        answer.finish()
    }

    #[test]
    fn a_message_is_compared_however_it_is_cut() {
        let bytes = framed(b"the answer");
        for chunk in 1..=bytes.len() {
            assert_eq!(finish(&bytes, chunk, None), Ok(true));
            assert_eq!(finish(&bytes, chunk, Some(b"the answer")), Ok(true));
            for other in [&b"the answeR"[..], b"The answer", b"the answer ", b"the", b""] {
                assert_eq!(finish(&bytes, chunk, Some(other)), Ok(false), "{other:?} by {chunk}");
            }
        }
    }

    #[test]
    fn an_empty_message_is_a_message() {
        assert_eq!(finish(&framed(b""), 1, Some(b"")), Ok(true));
        assert_eq!(finish(&framed(b""), 1, Some(b"x")), Ok(false));
    }

    #[test]
    fn what_is_not_one_message_is_an_error() {
        for bytes in [&b""[..], b"\0\0\0", b"\0\0\0\0\x02a", b"\0\0\0\0\x01ab", b"\x01\0\0\0\x01a"] {
            for chunk in [1, 16] {
                assert!(finish(bytes, chunk, None).is_err(), "{bytes:?}");
            }
        }
    }
}
