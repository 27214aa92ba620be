//! Maps by the ids that this process counts.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

pub type ById<T> = HashMap<u64, T, BuildHasherDefault<IdHasher>>;

/// Nobody else chooses an id, so no hash that withstands an attack is needed: SipHash takes ten times as long.
#[derive(Default)]
pub struct IdHasher(u64);

/// 2⁶⁴ divided by the golden ratio: ids that follow one another come to lie far apart (Knuth, volume 3, section 6.4).
const FAR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(self.0 ^ u64::from(*byte)));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = id.wrapping_mul(FAR);
    }
}
