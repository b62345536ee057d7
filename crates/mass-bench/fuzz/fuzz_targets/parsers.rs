//! libFuzzer on a reader of outside files: `PARSER=glue SEEDS=/tmp/glue cargo fuzz run -s none parsers /tmp/glue`, in the folder of
//! the crate. Others are tokenizer, image, folder, safetensors, results and norms. The first byte of an input says which file it
//! stands for. Into the folder SEEDS, if there is one, the valid files are written before libFuzzer reads it.
#![no_main]

#[path = "../../tests/fuzz/parsers.rs"]
mod parsers;

use libfuzzer_sys::fuzz_target;

thread_local! {
    static PARSER: parsers::Parser = {
        let name = std::env::var("PARSER").expect("the name of a parser in PARSER");
        let mut all = parsers::parsers().into_iter();
        all.find(|parser| parser.name == name).expect("a parser of that name")
    };
}

fn write_seeds() {
    let Some(folder) = std::env::var_os("SEEDS").map(std::path::PathBuf::from) else {
        return;
    };
    std::fs::create_dir_all(&folder).expect("a folder for seeds");
    PARSER.with(|parser| {
        for (sample, which) in parser.samples.iter().zip(0u8..) {
            let input = [&[which], &sample[..]].concat();
            std::fs::write(folder.join(format!("seed-{which}")), input).expect("room for a seed");
        }
    });
}

fuzz_target!(init: write_seeds(), |input: &[u8]| {
    if let Some((&which, bytes)) = input.split_first() {
        PARSER.with(|parser| parser.run(usize::from(which), bytes));
    }
});
