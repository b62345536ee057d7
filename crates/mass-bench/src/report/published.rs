//! Settings as they were written before methods were kept by name: results published with them can be gone on with.

use serde_json::{Value, json};

use crate::method::Method;

/// Settings as they are written now.
pub(super) fn renewed(settings: Value) -> Value {
    in_new_form(settings.clone()).unwrap_or(settings)
}

/// Settings of the older form as they are written now; `None` for others.
fn in_new_form(mut settings: Value) -> Option<Value> {
    let fields = settings.as_object_mut()?;
    let mut methods = match fields.remove("methods") {
        Some(Value::Array(methods)) => methods,
        Some(_) => return None,
        // The synthetic study had a list of its own.
        None => {
            let list = |value: Option<Value>| value.and_then(|v| v.as_array().cloned());
            let mut methods = list(fields.remove("mass"))?;
            let (from, to) = (
                fields.remove("experts_init")?,
                fields.remove("experts_max")?,
            );
            for mass in &mut methods {
                let mass = mass.as_object_mut()?;
                mass.insert("method".into(), json!("mass"));
                mass.insert("experts".into(), from.clone());
                mass.insert("experts_max".into(), to.clone());
            }
            let k = list(fields.remove("static_k"))?;
            for experts in list(fields.remove("static_experts"))? {
                let pools = k
                    .iter()
                    .map(|k| json!({ "method": "static", "experts": experts, "k": k }));
                methods.extend(pools);
            }
            methods
        }
    };
    for only_adds in ["vocabs", "checkpoint_every"] {
        fields.remove(only_adds);
    }
    for value in &mut methods {
        let fields = value.as_object_mut()?;
        // What it says of smoke's thresholds is said by rules now; smoke is never gone on with for its figures.
        if fields.get("loose") == Some(&json!(false)) {
            fields.remove("loose");
        }
        let dense = if value["method"] == "erm" {
            "erm"
        } else {
            "dense"
        };
        let method: Method = serde_json::from_value(value.clone()).ok()?;
        let mut run = method.run(0);
        if method == Method::Dense {
            dense.clone_into(&mut run.method);
        }
        settings["methods"][run.key().without_seed()] = json!(method);
    }
    Some(settings)
}
