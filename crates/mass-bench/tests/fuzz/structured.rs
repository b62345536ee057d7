//! Damage to files of a known form: another value in a place of a JSON document, another cell in a table.

use ndarray_rand::rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Cells that readers stumble over.
const CELLS: [&str; 14] = [
    "",
    "NaN",
    "inf",
    "-inf",
    "-0",
    "1e400",
    "1e-320",
    "0",
    "-1",
    "99999999999999999999",
    "0.5",
    "\u{feff}",
    "\"",
    "é",
];

/// Changes one thing, if the file is of a known form.
pub(super) fn damage(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) -> bool {
    if let Ok(mut value) = serde_json::from_slice::<Value>(bytes) {
        let count = nodes(&value);
        change(&mut value, &mut rng.random_range(0..count), rng);
        *bytes = value.to_string().into_bytes();
        return true;
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let mark = match (text.contains('\t'), text.contains(','), text.contains('/')) {
        (true, ..) => '\t',
        (_, true, _) => ',',
        (.., true) => '/',
        _ => return false,
    };
    let mut lines: Vec<Vec<String>> = text
        .lines()
        .map(|line| line.split(mark).map(str::to_owned).collect())
        .collect();
    let line = rng.random_range(0..lines.len());
    let cell = rng.random_range(0..lines[line].len());
    match rng.random_range(0..8) {
        0 => drop(lines[line].remove(cell)),
        1 => {
            let again = lines[line][cell].clone();
            lines[line].insert(cell, again);
        }
        2 => drop(lines.remove(line)),
        3 => {
            let again = lines[line].clone();
            lines.push(again);
        }
        4 => {
            let other = rng.random_range(0..lines.len());
            lines.swap(line, other);
        }
        _ => lines[line][cell] = CELLS[rng.random_range(0..CELLS.len())].to_owned(),
    }
    let lines: Vec<String> = lines
        .iter()
        .map(|line| line.join(&mark.to_string()))
        .collect();
    *bytes = lines.join("\n").into_bytes();
    true
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(nodes).sum(),
        Value::Object(all) => all.values().map(nodes).sum(),
        _ => 0,
    }
}

/// Changes the node of a number, counted down from the root.
fn change(value: &mut Value, number: &mut usize, rng: &mut ChaCha8Rng) {
    if *number == 0 {
        *number = usize::MAX;
        *value = another(value, rng);
        return;
    }
    *number -= 1;
    let below: Vec<&mut Value> = match value {
        Value::Array(all) => all.iter_mut().collect(),
        Value::Object(all) => all.values_mut().collect(),
        _ => Vec::new(),
    };
    for value in below {
        let count = nodes(value);
        if *number < count {
            return change(value, number, rng);
        }
        *number -= count;
    }
}

fn another(value: &Value, rng: &mut ChaCha8Rng) -> Value {
    match rng.random_range(0..14) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(u64::MAX),
        5 => json!(1e308),
        6 => json!(-1e-320),
        7 => json!("<script>alert(1)</script>"),
        8 => json!("\u{0}\u{202e}/../..\n"),
        9 => json!([]),
        10 => json!({}),
        11 => json!([value, value]),
        12 => json!({ "value": value }),
        _ => match value {
            Value::Array(all) if !all.is_empty() => Value::Array([&all[..], &all[..1]].concat()),
            Value::Number(n) => json!(n.as_f64().unwrap_or(0.0) * -1000.0),
            Value::String(text) => json!(text.repeat(3)),
            other => json!([other]),
        },
    }
}
