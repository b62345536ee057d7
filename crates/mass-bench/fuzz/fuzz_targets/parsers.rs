//! libFuzzer on a reader of outside files: `PARSER=glue cargo +nightly fuzz run parsers`, in the folder of the crate. Others are
//! tokenizer, image, folder, safetensors, results and norms. The first byte of an input says which file it stands for.
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

fuzz_target!(|input: &[u8]| {
    if let Some((&which, bytes)) = input.split_first() {
        PARSER.with(|parser| parser.run(usize::from(which), bytes));
    }
});
