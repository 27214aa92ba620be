//! Whether bytes are a protobuf message.

/// Groups inside each other, as many as protobuf's own parsers take.
const DEEPEST: usize = 100;

struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    /// A varint of at most `longest` bytes; its bits over 64 are dropped, as protobuf's own parsers do.
    fn varint(&mut self, longest: u32) -> Option<u64> {
        let mut value = 0;
        for shift in (0..7 * longest).step_by(7) {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if *byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn skip(&mut self, size: usize) -> Option<()> {
        self.rest = self.rest.get(size..)?;
        Some(())
    }

    fn are_well_formed(&mut self) -> Option<bool> {
        let mut groups = vec![];
        while !self.rest.is_empty() {
            let tag = u32::try_from(self.varint(5)?).ok()?;
            let number = tag >> 3;
            if number == 0 {
                return None;
            }
            match tag & 7 {
                0 => drop(self.varint(10)?),
                1 => self.skip(8)?,
                2 => {
                    let size = i32::try_from(self.varint(10)?).ok()?;
                    self.skip(usize::try_from(size).ok()?)?;
                }
                3 if groups.len() < DEEPEST => groups.push(number),
                4 if groups.pop() == Some(number) => {}
                5 => self.skip(4)?,
                _ => return None,
            }
        }
        Some(groups.is_empty())
    }
}

/// Whether `message` is a sequence of protobuf fields, and not an empty one. Looks at the top level only.
pub fn well_formed(message: &[u8]) -> bool {
    !message.is_empty() && Fields { rest: message }.are_well_formed() == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_each_kind_are_well_formed() {
        for good in [
            &b"\x0a\x05hello"[..],
            b"\x08\x01",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x09abcdefgh",
            b"\x0dabcd",
            b"\x0b\x08\x01\x0c",
            b"\xf8\xff\xff\xff\x0f\x00",
        ] {
            assert!(well_formed(good), "{good:?}");
        }
    }

    #[test]
    fn anything_else_is_not() {
        for bad in [
            &b""[..],
            b"\xff",
            b"\x00\x00",
            b"\x0a\x05ab",
            b"\x0a\xff\xff\xff\xff\x0f",
            b"\x0b",
            b"\x0c",
            b"\x0b\x14",
            b"\x0e\x00",
            b"\x0d\x01",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert!(!well_formed(bad), "{bad:?}");
        }
        assert!(well_formed(&[[0x0b; DEEPEST], [0x0c; DEEPEST]].concat()));
        assert!(!well_formed(&[[0x0b; DEEPEST + 1], [0x0c; DEEPEST + 1]].concat()));
    }
}
