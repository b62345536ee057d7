//! Random damage to a checkpoint: an error or a valid model, never a panic. More of it: `--example fuzz_checkpoint`.

use checkpoint::{Harness, Outcome};

#[path = "../fuzz/checkpoint.rs"]
mod checkpoint;
#[path = "../fuzz/mutate.rs"]
mod mutate;

#[test]
fn damaged_files_are_read_or_refused_and_nothing_else() {
    let mut harness = Harness::new();
    let (mut read, mut refused) = (0, 0);
    for number in 0..8000 {
        let input = checkpoint::input(&harness, number);
        match harness.run(&input) {
            Outcome::Read => read += 1,
            Outcome::Refused => refused += 1,
        }
    }
    // Both ways are taken, or the inputs would be of no use.
    assert!(read > 80, "{read} were read");
    assert!(refused > 800, "{refused} were refused");
    for which in 0..harness.names().len() {
        let mut input = vec![which as u8];
        input.extend_from_slice(harness.file(which));
        assert_eq!(harness.run(&input), Outcome::Read);
    }
    assert_eq!(harness.run(&[]), Outcome::Refused);
}
