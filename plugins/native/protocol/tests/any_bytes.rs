//! Bytes that a peer may send: good ones, changed at random in a few places.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // it is a test, helpers included

#[path = "../../wire/tests/damage/mod.rs"]
mod damage;
mod invariants;

use damage::Random;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;

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
        taken += invariants::check(&random.damaged(&seeds));
    }
    assert!(taken > 10_000, "{taken}: few were good enough to be read");
}
