//! `--print-capabilities`: the JSON object of QEMU's back-end program conventions (`vhost-user.json`,
//! `VHostUserBackendCapabilities`).
//!
//! The schema lets a member `features` appear only for types that define some, so it is left out when there are none.
//! Device types that the schema does not know yet use a name of our own.
use std::fmt::Write;

use crate::Identity;

/// The object, with a newline at its end.
pub(crate) fn to_json(identity: &Identity) -> String {
    let mut json = String::from("{\n  \"type\": ");
    push_string(&mut json, identity.kind);
    if !identity.capabilities.is_empty() {
        json.push_str(",\n  \"features\": [");
        for (i, feature) in identity.capabilities.iter().enumerate() {
            json.push_str(if i == 0 { "\n    " } else { ",\n    " });
            push_string(&mut json, feature);
        }
        json.push_str("\n  ]");
    }
    json.push_str("\n}\n");
    json
}

/// A JSON string (RFC 8259, section 7).
fn push_string(json: &mut String, text: &str) {
    json.push('"');
    for c in text.chars() {
        match c {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            // Writing to a String cannot fail.
            c if c < ' ' => drop(write!(json, "\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(kind: &'static str, capabilities: &'static [&'static str]) -> Identity {
        Identity { capabilities, ..Identity::new("vhost-device-test", kind, "1.0") }
    }

    #[test]
    fn a_type_without_features_has_no_features_member() {
        assert_eq!(to_json(&identity("rng", &[])), "{\n  \"type\": \"rng\"\n}\n");
    }

    #[test]
    fn features_are_listed() {
        let json = to_json(&identity("block", &["read-only", "blk-file"]));
        assert_eq!(
            json,
            "{\n  \"type\": \"block\",\n  \"features\": [\n    \"read-only\",\n    \"blk-file\"\n  ]\n}\n"
        );
    }

    #[test]
    fn strings_are_escaped() {
        let json = to_json(&identity("a\"b\\c\n", &[]));
        assert_eq!(json, "{\n  \"type\": \"a\\\"b\\\\c\\u000a\"\n}\n");
    }
}
