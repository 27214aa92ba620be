//! Steps over the fields of a protobuf message.

/// The reference decides: the bytes are malformed, or not written in the usual way.
#[derive(Debug, PartialEq, Eq)]
pub struct NotPlain;

pub type Plain<T> = Result<T, NotPlain>;

const LONGEST_VARINT: usize = 10;
/// Bytes of a tag, at most; protobuf takes longer lengths, but no longer tags.
const LONGEST_TAG: usize = 5;
/// Bytes of a tag and of a length that are plain: the reference steps over such fields by itself.
const PLAIN_TAG: usize = 2;
const PLAIN_LENGTH: usize = 4;
/// Groups in each other, at most: protobuf's limit for messages.
const DEPTH: usize = 100;

/// `dl_inference_core.wire.limits`: bytes of a message up to which its cost is not counted, bytes that any message may
/// cost, bytes that each byte of a message may cost, the most bytes that a message may cost, what an unknown field
/// costs, and what a packed varint costs.
pub const SMALL: usize = 4096;
pub const FREE: usize = 1_000_000;
pub const FACTOR: usize = 8;
pub const MOST: usize = 10_000_000;
pub const UNKNOWN_FIELD: usize = 16;
pub const PACKED_VARINT: usize = 8;

/// The varint at `at`, and where it ends. Bits above the 64th are dropped, as protobuf drops them.
#[inline]
pub fn varint(bytes: &[u8], at: usize) -> Plain<(u64, usize)> {
    let first = *bytes.get(at).ok_or(NotPlain)?;
    if first < 0x80 {
        return Ok((u64::from(first), at + 1));
    }
    let mut value = u64::from(first & 0x7f);
    for index in 1..LONGEST_VARINT {
        let byte = *bytes.get(at + index).ok_or(NotPlain)?;
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            return Ok((value, at + index + 1));
        }
    }
    Err(NotPlain)
}

/// A tag, and where it ends.
#[inline]
fn tag(bytes: &[u8], at: usize, longest: usize) -> Plain<(u64, usize)> {
    let (tag, end) = varint(bytes, at)?;
    if end - at > longest || tag > u64::from(u32::MAX) || tag < 8 { Err(NotPlain) } else { Ok((tag, end)) }
}

/// The bytes of the length-delimited value whose length is at `at`, and where they end.
#[inline]
fn delimited(bytes: &[u8], at: usize, longest: usize) -> Plain<(&[u8], usize)> {
    let (size, start) = varint(bytes, at)?;
    if start - at > longest || size > i32::MAX as u64 {
        return Err(NotPlain);
    }
    let end = start + size as usize;
    Ok((bytes.get(start..end).ok_or(NotPlain)?, end))
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Delimited(&'a [u8]),
    Fixed32(u32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Field<'a> {
    pub number: u32,
    pub value: Value<'a>,
}

/// The fields of one message, in order. A group is not plain.
pub struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
    count: usize,
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Fields { bytes, at: 0, count: 0 }
    }

    /// How many fields `next` has returned.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The next field; `None` at the end of the message.
    #[allow(clippy::should_implement_trait)] // an iterator of results would need two `?`s for each field
    #[inline]
    pub fn next(&mut self) -> Plain<Option<Field<'a>>> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let (tag, at) = tag(self.bytes, self.at, PLAIN_TAG)?;
        let (value, end) = match tag & 7 {
            0 => varint(self.bytes, at).map(|(value, end)| (Value::Varint(value), end))?,
            1 => (Value::Fixed64(u64::from_le_bytes(fixed(self.bytes, at)?)), at + 8),
            2 => delimited(self.bytes, at, PLAIN_LENGTH).map(|(value, end)| (Value::Delimited(value), end))?,
            5 => (Value::Fixed32(u32::from_le_bytes(fixed(self.bytes, at)?)), at + 4),
            _ => return Err(NotPlain),
        };
        self.at = end;
        self.count += 1;
        Ok(Some(Field { number: (tag >> 3) as u32, value }))
    }
}

#[inline]
fn fixed<const N: usize>(bytes: &[u8], at: usize) -> Plain<[u8; N]> {
    let found = bytes.get(at..at + N).ok_or(NotPlain)?;
    found.try_into().map_err(|_| NotPlain)
}

/// Keeps `value`, the only one of its field.
#[inline]
pub fn once<T>(place: &mut Option<T>, value: T) -> Plain<()> {
    if place.replace(value).is_some() { Err(NotPlain) } else { Ok(()) }
}

/// Values of one repeated field, at most: each takes many times its bytes here, before the cost of a message is known.
const MOST_VALUES: usize = 1024;

/// Keeps one more value of a repeated field.
#[inline]
pub fn push<T>(values: &mut Vec<T>, value: T) -> Plain<()> {
    if values.len() == MOST_VALUES {
        return Err(NotPlain);
    }
    values.push(value);
    Ok(())
}

/// A string field's value; protobuf refuses what is not UTF-8.
#[inline]
pub fn text(bytes: &[u8]) -> Plain<&str> {
    std::str::from_utf8(bytes).map_err(|_| NotPlain)
}

/// Whether `body` is a sequence of protobuf fields, and not an empty one: equal to `protocol.well_formed` of the core.
/// Only the top level is looked at, so unlike elsewhere a group is not left to the reference. They differ where a length
/// takes ten bytes and the tenth has bits above the 64th: above 4 KiB the reference refuses it, below it does not.
pub fn well_formed(body: &[u8]) -> bool {
    let (mut at, mut count) = (0, 0);
    while at < body.len() {
        match skip(body, at, 0, &mut count) {
            Ok((end, None)) => at = end,
            _ => return false,
        }
    }
    let most = (FACTOR * body.len() + FREE).min(MOST);
    !body.is_empty() && (body.len() <= SMALL || count <= FEW || count * UNKNOWN_FIELD <= most)
}

/// Fields of a message that the reference steps over without counting their cost.
const FEW: usize = 32;

/// Where the field at `at` ends, and the number of the group that it ends, if it is an end of a group. Adds to `count`
/// the fields that there are, in groups too.
fn skip(bytes: &[u8], at: usize, depth: usize, count: &mut usize) -> Plain<(usize, Option<u64>)> {
    let (tag, at) = tag(bytes, at, LONGEST_TAG)?;
    let number = tag >> 3;
    *count += 1;
    let end = match tag & 7 {
        0 => varint(bytes, at)?.1,
        1 => at + 8,
        2 => delimited(bytes, at, LONGEST_VARINT)?.1,
        3 if depth < DEPTH => {
            let mut inner = at;
            loop {
                match skip(bytes, inner, depth + 1, count)? {
                    (end, None) => inner = end,
                    (end, Some(ended)) if ended == number => break end,
                    _ => return Err(NotPlain),
                }
            }
        }
        4 => return Ok((at, Some(number))),
        5 => at + 4,
        _ => return Err(NotPlain),
    };
    if end > bytes.len() { Err(NotPlain) } else { Ok((end, None)) }
}
