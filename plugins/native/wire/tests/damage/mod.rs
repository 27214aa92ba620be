//! Damage at random, for the tests with any bytes; the protocol crate's test includes this file, too.
#![allow(clippy::indexing_slicing)] // it is part of tests

/// xorshift64*: the same bytes in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as usize % most
    }

    /// One of `seeds`, changed in up to three places: cut off, longer by a byte, another byte, or a piece twice.
    pub fn damaged(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.below(256) as u8),
                2 if at < bytes.len() => bytes[at] = self.below(256) as u8,
                _ => {
                    let piece = bytes[self.below(at + 1)..at].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        bytes
    }
}
