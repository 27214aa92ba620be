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

/// Has `write` fill `out`, which has its `size`.
pub fn fill(out: &mut [u8], write: impl Fn(&mut Writer<'_>)) {
    let mut writer = Writer { out: Some(out), at: 0 };
    write(&mut writer);
}

fn varint_size(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

/// Writes a varint at `at`; where it ends.
#[inline]
fn put_varint(out: &mut [u8], mut at: usize, mut value: u64) -> usize {
    while value >= 0x80 {
        out[at] = value as u8 | 0x80;
        value >>= 7;
        at += 1;
    }
    out[at] = value as u8;
    at + 1
}

impl Writer<'_> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        if let Some(out) = &mut self.out {
            out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
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
        match &mut self.out {
            None => self.at += size,
            Some(out) => {
                fill(&mut out[self.at..self.at + size], write);
                self.at += size;
            }
        }
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
        let values = || bytes.chunks_exact(N).map(|chunk| value(chunk.try_into().unwrap()));
        let size = values().map(varint_size).sum();
        self.header(number, size);
        if let Some(out) = &mut self.out {
            values().fold(self.at, |at, value| put_varint(out, at, value));
        }
        self.at += size;
    }

    /// The numbers of `bytes`, of `N` bytes each, as packed doubles, even if there are none.
    pub fn doubles<const N: usize>(&mut self, number: u32, bytes: &[u8], double: impl Fn([u8; N]) -> f64) {
        self.header(number, bytes.len() / N * 8);
        if self.out.is_none() {
            self.at += bytes.len() / N * 8;
            return;
        }
        for chunk in bytes.chunks_exact(N) {
            self.put(&double(chunk.try_into().unwrap()).to_le_bytes());
        }
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
