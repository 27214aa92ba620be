//! Writes a protobuf message of a known size.

use crate::tensor::{Dtype, List};
use crate::walk::{NotPlain, Plain};

/// Writes a message, or counts its bytes only.
pub struct Writer<'a> {
    out: Option<&'a mut [u8]>,
    at: usize,
}

/// How many bytes `write` writes.
pub fn size(write: impl Fn(&mut Writer<'_>)) -> usize {
    let mut counter = Writer { out: None, at: 0 };
    write(&mut counter);
    counter.at
}

/// Has `write` fill `out`, which has its `size`. Bytes that `out` has no room for are dropped.
pub fn fill(out: &mut [u8], write: impl Fn(&mut Writer<'_>)) {
    let size = out.len();
    let mut writer = Writer { out: Some(out), at: 0 };
    write(&mut writer);
    debug_assert_eq!(writer.at, size);
}

fn varint_size(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

/// Writes a varint at `at`; where it ends.
#[inline]
fn put_varint(out: &mut [u8], mut at: usize, mut value: u64) -> usize {
    loop {
        let Some(place) = out.get_mut(at) else { return at };
        at += 1;
        if value < 0x80 {
            *place = value as u8;
            return at;
        }
        *place = value as u8 | 0x80;
        value >>= 7;
    }
}

impl Writer<'_> {
    /// Where the next `size` bytes go, if they are written.
    #[inline]
    fn place(&mut self, size: usize) -> Option<&mut [u8]> {
        self.out.as_mut()?.get_mut(self.at..self.at + size)
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        if let Some(place) = self.place(bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self.at += bytes.len();
    }

    #[inline]
    pub fn varint(&mut self, value: u64) {
        match &mut self.out {
            None => self.at += varint_size(value),
            Some(out) => self.at = put_varint(out, self.at, value),
        }
    }

    /// A varint field, even if it has its default value.
    pub fn number(&mut self, number: u32, value: u64) {
        self.varint(u64::from(number << 3));
        self.varint(value);
    }

    /// A double field, even if it has its default value.
    pub fn double(&mut self, number: u32, value: f64) {
        self.varint(u64::from(number << 3 | 1));
        self.put(&value.to_le_bytes());
    }

    /// A field of bytes or text, even if it is empty.
    pub fn bytes(&mut self, number: u32, value: &[u8]) {
        self.header(number, value.len());
        self.put(value);
    }

    /// A string field; an empty one is left out.
    pub fn text(&mut self, number: u32, value: &str) {
        if !value.is_empty() {
            self.bytes(number, value.as_bytes());
        }
    }

    /// A submessage, or packed varints.
    pub fn message(&mut self, number: u32, write: impl Fn(&mut Writer<'_>)) {
        let size = size(&write);
        self.header(number, size);
        if let Some(place) = self.place(size) {
            fill(place, write);
        }
        self.at += size;
    }

    fn header(&mut self, number: u32, size: usize) {
        self.varint(u64::from(number << 3 | 2));
        self.varint(size as u64);
    }

    /// The packed varints of a tensor's bytes.
    pub fn varints(&mut self, number: u32, dtype: Dtype, bytes: &[u8]) {
        use Dtype::*;
        match dtype {
            Bool | U8 => self.each(number, bytes, |[byte]: [u8; 1]| u64::from(byte)),
            I8 => self.each(number, bytes, |[byte]: [u8; 1]| byte as i8 as u64),
            U16 | F16 | Bf16 => self.each(number, bytes, |value| u64::from(u16::from_le_bytes(value))),
            I16 => self.each(number, bytes, |value| i16::from_le_bytes(value) as u64),
            U32 => self.each(number, bytes, |value| u64::from(u32::from_le_bytes(value))),
            I32 => self.each(number, bytes, |value| i32::from_le_bytes(value) as u64),
            _ => self.each(number, bytes, u64::from_le_bytes),
        }
    }

    fn each<const N: usize>(&mut self, number: u32, bytes: &[u8], value: impl Fn([u8; N]) -> u64) {
        let values = || bytes.as_chunks().0.iter().map(|number| value(*number));
        let size = values().map(varint_size).sum();
        self.header(number, size);
        if let Some(place) = self.place(size) {
            values().fold(0, |at, value| put_varint(place, at, value));
        }
        self.at += size;
    }

    /// The numbers of `bytes`, of `N` bytes each, as packed doubles, even if there are none.
    pub fn doubles<const N: usize>(&mut self, number: u32, bytes: &[u8], double: impl Fn([u8; N]) -> f64) {
        let (numbers, _) = bytes.as_chunks();
        let size = numbers.len() * 8;
        self.header(number, size);
        if let Some(place) = self.place(size) {
            for (place, number) in place.as_chunks_mut().0.iter_mut().zip(numbers) {
                *place = double(*number).to_le_bytes();
            }
        }
        self.at += size;
    }

    /// A tensor's values in the list in which they travel, if it is not empty.
    pub fn list(&mut self, number: u32, list: Option<List>, dtype: Dtype, bytes: &[u8]) {
        match list {
            _ if bytes.is_empty() => {}
            None => self.bytes(number, bytes),
            Some(_) => self.varints(number, dtype, bytes),
        }
    }
}

/// Refuses bools that are neither 0 nor 1, as a view of other memory can have them.
pub fn check_bools(dtype: Dtype, bytes: &[u8]) -> Plain<()> {
    if dtype == Dtype::Bool && bytes.iter().any(|&byte| byte > 1) { Err(NotPlain) } else { Ok(()) }
}
