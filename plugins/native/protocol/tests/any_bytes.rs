//! Bytes that a peer may send: good ones, changed at random in a few places.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // it is a test, helpers included

mod invariants;

use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;

/// A xorshift generator, so that each run has the same bytes.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % most.max(1) as u64) as usize
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
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
}

fn seeds() -> Vec<Vec<u8>> {
    let mut packing = GzEncoder::new(Vec::new(), Compression::default());
    packing.write_all(&[7; 5000]).unwrap();
    let packed = packing.finish().unwrap();
    let mut frame = invariants::frame_of(&packed).to_vec();
    frame[0] = 1;
    let block = [&[0x41, 14][..], b"tmp%2Fa.socket", &[0x40, 5], b":path", &[2], b"/a"].concat();
    let headers = [&[0, 0, block.len() as u8, 1, 4, 0, 0, 0, 1][..], &block].concat();
    let padded = [&[0, 0, block.len() as u8 + 9, 1, 0x2c, 0, 0, 0, 3, 3, 0, 0, 0, 1, 9][..], &block, &[0; 3]].concat();
    vec![
        [invariants::frame_of(b"one"), invariants::frame_of(b"")].concat(),
        frame,
        packed,
        b"te=trailers\nx-request-id=7\nx-bin=AAE=,/w\ngrpc-timeout=1S".to_vec(),
        b"grpc-status=5\ngrpc-message=no%20such%20%E2%80%9Cmodel%E2%80%9D\ngrpc-status-details-bin=AA".to_vec(),
        b"grpc-status=0\nx=y".to_vec(),
        b"99999999m".to_vec(),
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0], &headers, &padded].concat(),
    ]
}

#[test]
fn what_holds_of_good_bytes_holds_of_damaged_ones() {
    let seeds = seeds();
    let good = seeds.iter().map(|bytes| invariants::check(bytes)).sum::<usize>();
    assert!(good >= 5, "{good}");
    let (mut random, mut taken) = (Random(7), 0);
    for _ in 0..50_000 {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..random.below(4) {
            random.change(&mut bytes);
        }
        taken += invariants::check(&bytes);
    }
    assert!(taken > 10_000, "{taken}: few were good enough to be read");
}
