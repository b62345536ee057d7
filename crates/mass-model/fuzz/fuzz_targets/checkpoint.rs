//! libFuzzer on the reader of checkpoints: `cargo +nightly fuzz run checkpoint`, in the folder of the crate.
#![no_main]

#[path = "../../tests/fuzz/checkpoint.rs"]
mod checkpoint;
#[path = "../../tests/fuzz/mutate.rs"]
#[allow(dead_code)]
mod mutate;

use std::cell::RefCell;

use checkpoint::Harness;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static HARNESS: RefCell<Harness> = RefCell::new(Harness::new());
}

fuzz_target!(|input: &[u8]| {
    HARNESS.with_borrow_mut(|harness| {
        harness.run(input);
    });
});
