//! Random damage to outside files: read or refused, never a panic. More of it: `--example fuzz`.

#[path = "../fuzz/parsers.rs"]
mod parsers;

#[test]
fn outside_files_are_read_or_refused_and_nothing_else() {
    for parser in parsers::parsers() {
        for (which, sample) in parser.samples.iter().enumerate() {
            assert!(
                parser.run(which, sample),
                "{}: sample {which} was refused",
                parser.name
            );
        }
        let inputs = if parser.name == "results" { 500 } else { 2000 };
        let mut read = 0;
        for number in 0..inputs {
            let (which, bytes) = parser.input(number);
            read += usize::from(parser.run(which, &bytes));
        }
        // Both ways are taken, or the inputs would be of no use.
        let refused = inputs as usize - read;
        assert!(
            read > 10 && refused > 10,
            "{}: {read} read, {refused} refused",
            parser.name
        );
        assert!(!parser.run(0, b""), "{}: nothing is no file", parser.name);
    }
}
