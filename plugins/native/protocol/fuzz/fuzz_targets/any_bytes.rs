//! Any bytes, held against what holds of all: `cargo fuzz run -s none any_bytes` on a stable toolchain.
#![no_main]

#[path = "../../tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    invariants::check(bytes);
});
