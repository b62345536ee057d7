//! libFuzzer on the reader of checkpoints: `SEEDS=/tmp/seeds cargo fuzz run -s none checkpoint /tmp/seeds`, in the folder of the
//! crate. Into the folder SEEDS, if there is one, the valid files are written before libFuzzer reads it.
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

fn write_seeds() {
    let Some(folder) = std::env::var_os("SEEDS").map(std::path::PathBuf::from) else {
        return;
    };
    std::fs::create_dir_all(&folder).expect("a folder for seeds");
    HARNESS.with_borrow(|harness| {
        for (which, sealed) in
            (0..harness.names().len()).flat_map(|w| [(w, 0), (w, checkpoint::SEALED)])
        {
            let selector = which as u8 | sealed;
            let input = [&[selector], harness.file(which)].concat();
            std::fs::write(folder.join(format!("seed-{selector}")), input)
                .expect("room for a seed");
        }
    });
}

fuzz_target!(init: write_seeds(), |input: &[u8]| {
    HARNESS.with_borrow_mut(|harness| {
        harness.run(input);
    });
});
