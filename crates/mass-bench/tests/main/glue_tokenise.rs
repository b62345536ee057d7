//! WordPiece tokenisation: against values computed elsewhere, and what is refused.

use std::path::Path;

use mass_bench::glue::{GlueError, sample, tokenize::TextTokenizer};

fn words(more: &[&str]) -> Vec<String> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    special
        .iter()
        .chain(more)
        .map(|w| (*w).to_owned())
        .collect()
}

#[test]
fn words_are_split_into_the_longest_pieces() {
    let vocabulary = words(&["un", "##aff", "##able", "the", "!", "naive"]);
    let tokenizer = TextTokenizer::from_vocabulary(&vocabulary, true, 32).unwrap();
    let encoded = tokenizer.encode("The UNaffable naïve!", None).unwrap();
    assert_eq!(encoded.ids, [2, 8, 5, 6, 7, 10, 9, 3]);
    assert_eq!(encoded.types, [0; 8]);
    // A word without pieces is unknown as a whole, and special tokens in the text are themselves.
    let encoded = tokenizer.encode("unx [SEP]", Some("the")).unwrap();
    assert_eq!(encoded.ids, [2, 1, 3, 3, 8, 3]);
    assert_eq!(encoded.types, [0, 0, 0, 0, 1, 1]);
    assert_eq!(tokenizer.encode("", None).unwrap().ids, [2, 3]);
    assert_eq!(tokenizer.vocabulary_size(), vocabulary.len());
    let cased = TextTokenizer::from_vocabulary(&vocabulary, false, 32).unwrap();
    assert_eq!(cased.encode("The the", None).unwrap().ids, [2, 1, 8, 3]);
}

#[test]
fn of_a_pair_the_longer_text_is_cut_first() {
    let vocabulary = words(&["a", "b"]);
    let tokenizer = TextTokenizer::from_vocabulary(&vocabulary, true, 9).unwrap();
    let pair = |a: usize, b: usize| {
        let text = |word: &str, n| vec![word; n].join(" ");
        let encoded = tokenizer
            .encode(&text("a", a), Some(&text("b", b)))
            .unwrap();
        assert_eq!(encoded.ids.len(), encoded.types.len());
        let count = |id| encoded.ids.iter().filter(|&&i| i == id).count();
        (count(5), count(6))
    };
    // Six places beside [CLS] and two [SEP].
    assert_eq!(pair(2, 3), (2, 3));
    assert_eq!(pair(2, 9), (2, 4));
    assert_eq!(pair(9, 1), (5, 1));
    assert_eq!(pair(9, 9), (3, 3));
    let single = tokenizer.encode(&["a"; 20].join(" "), None).unwrap();
    assert_eq!(single.ids.len(), 9);
    assert_eq!((single.ids[0], single.ids[8]), (2, 3));
}

#[test]
fn a_vocabulary_file_with_and_without_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let encode = |text: &str| {
        let tokenizer = TextTokenizer::open(dir.path(), 16).unwrap();
        tokenizer.encode(text, None).unwrap().ids
    };
    write("vocab.txt", &words(&["the", "rain"]).join("\n"));
    assert_eq!(encode("The rain"), [2, 5, 6, 3]);
    write("tokenizer_config.json", r#"{"do_lower_case": false}"#);
    assert_eq!(encode("The rain"), [2, 1, 6, 3]);
    write("tokenizer_config.json", r#"{"model_max_length": 512}"#);
    assert_eq!(encode("The rain"), [2, 5, 6, 3]);
    // A capital letter in the vocabulary: it is cased.
    write("vocab.txt", &words(&["the", "rain", "The"]).join("\n"));
    assert_eq!(encode("The rain"), [2, 7, 6, 3]);
}

/// The flags of a tokenizer_config.json, with a vocabulary alone and with a tokenizer.json that says otherwise. The ids are those of
/// transformers' `BertTokenizer` and `BertTokenizerFast`.
#[test]
fn case_accents_and_chinese_characters_are_as_configured() {
    let vocabulary = words(&["mochte", "möchte", "任", "任务", "Möchte", "##务"]);
    let (mochte, moechte, one, both, capital, second) = (5, 6, 7, 8, 9, 10);
    let cases: [(&str, &str, &[u32]); 16] = [
        (r#"{"do_lower_case": true}"#, "Möchte", &[mochte]),
        (
            r#"{"do_lower_case": true, "strip_accents": null}"#,
            "Möchte",
            &[mochte],
        ),
        (
            r#"{"do_lower_case": true, "strip_accents": true}"#,
            "Möchte",
            &[mochte],
        ),
        (
            r#"{"do_lower_case": true, "strip_accents": false}"#,
            "Möchte",
            &[moechte],
        ),
        (r#"{"do_lower_case": false}"#, "Möchte", &[capital]),
        (
            r#"{"do_lower_case": false, "strip_accents": null}"#,
            "Möchte",
            &[capital],
        ),
        (
            r#"{"do_lower_case": false, "strip_accents": false}"#,
            "Möchte",
            &[capital],
        ),
        (
            r#"{"do_lower_case": false, "strip_accents": true}"#,
            "möchte",
            &[mochte],
        ),
        (
            r#"{"do_lower_case": false, "strip_accents": true}"#,
            "Möchte",
            &[1],
        ),
        (r#"{"do_lower_case": true}"#, "任务", &[one, 1]),
        (
            r#"{"do_lower_case": true, "tokenize_chinese_chars": null}"#,
            "任务",
            &[one, 1],
        ),
        (
            r#"{"do_lower_case": true, "tokenize_chinese_chars": true}"#,
            "任务",
            &[one, 1],
        ),
        (
            r#"{"do_lower_case": true, "tokenize_chinese_chars": false}"#,
            "任务",
            &[both],
        ),
        (
            r#"{"do_lower_case": true, "tokenize_chinese_chars": false}"#,
            "任务务",
            &[both, second],
        ),
        (
            r#"{"do_lower_case": true, "tokenize_chinese_chars": false, "strip_accents": false}"#,
            "möchte 任 MÖCHTE",
            &[moechte, one, moechte],
        ),
        (
            r#"{"do_lower_case": true, "never_split": null, "do_basic_tokenize": true}"#,
            "[MASK] Möchte",
            &[4, mochte],
        ),
    ];
    // A file that lower-cases, strips no accents and leaves Chinese words whole, unless the configuration says otherwise.
    let vocab: serde_json::Map<String, serde_json::Value> = vocabulary
        .iter()
        .enumerate()
        .map(|(i, w)| (w.clone(), i.into()))
        .collect();
    let token = |name: &str, id: usize| {
        serde_json::json!({ "id": id, "content": name, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true })
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [token("[CLS]", 2), token("[SEP]", 3), token("[MASK]", 4)],
        "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": false,
            "strip_accents": false, "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2] },
        "decoder": null,
        "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab },
    });
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let encode = |text: &str| {
        let tokenizer = TextTokenizer::open(dir.path(), 16).unwrap();
        let ids = tokenizer.encode(text, None).unwrap().ids;
        assert_eq!((ids[0], ids[ids.len() - 1]), (2, 3));
        ids[1..ids.len() - 1].to_vec()
    };
    write("vocab.txt", &vocabulary.join("\n"));
    for (config, text, ids) in cases {
        write("tokenizer_config.json", config);
        assert_eq!(encode(text), ids, "{config} {text}");
    }
    write("tokenizer.json", &json.to_string());
    for (config, text, ids) in cases {
        // What the configuration leaves open the file says.
        let open = match text {
            "任务" => {
                !config.contains("chinese_chars\": true") && !config.contains("chars\": false")
            }
            _ => !config.contains("strip_accents"),
        };
        if !open {
            write("tokenizer_config.json", config);
            assert_eq!(encode(text), ids, "{config} {text}");
        }
    }
    write("tokenizer_config.json", "{}");
    assert_eq!(encode("MÖCHTE 任务"), [moechte, both]);
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(encode("MÖCHTE 任务"), [moechte, both]);
    write("tokenizer_config.json", r#"{"do_lower_case": false}"#);
    assert_eq!(encode("Möchte 任务"), [capital, both]);
}

/// Of whatever blanks a line consists, it is a word with a number; only line feeds and carriage returns end it.
#[test]
fn every_line_of_a_vocabulary_has_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let ids = |vocabulary: &str, text: &str| {
        std::fs::write(dir.path().join("vocab.txt"), vocabulary).unwrap();
        let tokenizer = TextTokenizer::open(dir.path(), 16).unwrap();
        tokenizer.encode(text, None).unwrap().ids
    };
    let special = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
    for odd in [
        "",
        "\u{2028}",
        "\u{2029}",
        "\u{85}",
        "\u{a0}",
        "\u{3000}",
        "\u{b}",
        "\u{c}",
        " ",
        "\t",
        "x ",
        " x",
        "\u{1c}",
        "\u{feff}",
        "a\u{2028}b",
    ] {
        for end in ["", "\n"] {
            let vocabulary = format!("{special}{odd}\nthe\nrain{end}");
            assert_eq!(ids(&vocabulary, "the rain"), [2, 6, 7, 3], "{odd:?}");
            let two = format!("{special}the\n{odd}\n\n\nrain{end}");
            assert_eq!(ids(&two, "the rain"), [2, 5, 9, 3], "{odd:?}");
        }
    }
    // As Python reads text.
    let crlf = format!("{special}\nthe\nrain\n").replace('\n', "\r\n");
    assert_eq!(ids(&crlf, "the rain"), [2, 6, 7, 3]);
    let cr = format!("{special}the\rrain\n");
    assert_eq!(ids(&cr, "the rain"), [2, 5, 6, 3]);
    // A blank line at the end is a word too: what a model's vocabulary must hold.
    let words = |end: &str| format!("{special}the{end}");
    for (end, size) in [("", 6), ("\n", 6), ("\n\n", 7)] {
        std::fs::write(dir.path().join("vocab.txt"), words(end)).unwrap();
        let tokenizer = TextTokenizer::open(dir.path(), 16).unwrap();
        assert_eq!(tokenizer.vocabulary_size(), size);
    }
}

#[test]
fn what_is_no_bert_tokenizer_is_refused() {
    let refused = |result: Result<TextTokenizer, GlueError>, part: &str| {
        let message = result.expect_err("an error").to_string();
        assert!(message.contains(part), "no `{part}` in: {message}");
    };
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let write = |name: &str, text: &[u8]| std::fs::write(at.join(name), text).unwrap();
    refused(
        TextTokenizer::open(at, 16),
        "neither tokenizer.json nor vocab.txt",
    );
    refused(TextTokenizer::open(Path::new("/nowhere"), 16), "/nowhere");
    write("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\nthe\n");
    refused(TextTokenizer::open(at, 16), "`[UNK]` is missing");
    write("vocab.txt", b"[UNK]\n[SEP]\nthe\n");
    refused(TextTokenizer::open(at, 16), "`[CLS]` is missing");
    write("vocab.txt", b"[UNK]\n[CLS]\n[SEP]\nthe\nthe\n");
    refused(TextTokenizer::open(at, 16), "line 5");
    write("vocab.txt", b"[UNK]\n[CLS]\n[SEP]\n\xff\n");
    refused(TextTokenizer::open(at, 16), "vocab.txt");
    write("vocab.txt", b"[UNK]\n[CLS]\n[SEP]\nthe\n");
    refused(TextTokenizer::open(at, 4), "too short");
    for config in [
        "{",
        "[]",
        r#"{"do_lower_case": "yes"}"#,
        r#"{"strip_accents": 0}"#,
        r#"{"tokenize_chinese_chars": "no"}"#,
        r#"{"never_split": ["the"]}"#,
        r#"{"do_basic_tokenize": false}"#,
    ] {
        write("tokenizer_config.json", config.as_bytes());
        refused(TextTokenizer::open(at, 16), "tokenizer_config.json");
    }
    for json in ["", "{", "[]", r#"{"version": "1.0"}"#] {
        write("tokenizer.json", json.as_bytes());
        refused(TextTokenizer::open(at, 16), "tokenizer.json");
    }
    // A tokenizer, but not one that puts [CLS] and [SEP] around the text.
    let bare = r###"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, "model": {"type": "WordPiece",
        "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "b": 2}}}"###;
    write("tokenizer.json", bare.as_bytes());
    refused(TextTokenizer::open(at, 16), "no BERT tokenizer");
    // More special tokens than there is room for.
    let template = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "s", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "s": { "id": "s", "ids": vec![1; 20], "tokens": vec!["a"; 20] } },
    });
    let many = bare.replace(
        r#""post_processor": null"#,
        &format!(r#""post_processor": {template}"#),
    );
    write("tokenizer.json", many.as_bytes());
    refused(TextTokenizer::open(at, 16), "20 special tokens");
    // In each of these places the library panics.
    for (sound, damaged) in [
        (r#""decoder": null"#, r#""decoder": }"#),
        (r#""decoder": null"#, r#""decoder": {"type": "#),
        (
            r#""normalizer": null"#,
            r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}"#,
        ),
    ] {
        write("tokenizer.json", bare.replace(sound, damaged).as_bytes());
        refused(TextTokenizer::open(at, 16), "tokenizer.json");
    }
}

#[test]
fn the_built_in_vocabulary_knows_every_letter_of_the_sample() {
    let vocabulary = sample::vocabulary();
    let tokenizer = TextTokenizer::from_vocabulary(&vocabulary, true, 32).unwrap();
    let mut pieces = 0;
    for task in mass_bench::glue::task::Task::ALL {
        let data = sample::dataset(task);
        for encoded in tokenizer.encode_all(&data.train).unwrap() {
            assert!(!encoded.ids.contains(&1), "an unknown word in {task}");
            let continued = |id: &&u32| vocabulary[**id as usize].starts_with("##");
            pieces += encoded.ids.iter().filter(continued).count();
        }
    }
    assert!(pieces > 0, "no word was split");
}
