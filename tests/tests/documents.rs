//! The documents keep up with the tree: what they link to is there, and what managers read about the daemons is true.

use std::fs;
use std::path::{Path, PathBuf};

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned();
    let mut found = Vec::new();
    let mut folders = vec![(root, 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the tree").flatten() {
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            if path.is_dir() && depth < 2 && !hidden && !path.ends_with("target") {
                folders.push((path, depth + 1));
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn links_lead_to_files_of_the_tree() {
    let mut broken = Vec::new();
    let mut links = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).expect("a document");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or(link);
            if target.is_empty() || target.contains("://") {
                continue;
            }
            links += 1;
            if !document.parent().expect("a folder").join(target).exists() {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(links > 10, "only {links} links: the documents were not found");
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
}

/// `VHostUserBackendType` of QEMU 11.1's `vhost-user.json`. A type that is not in it has no description file.
const TYPES: [&str; 15] = [
    "9p",
    "balloon",
    "block",
    "caif",
    "console",
    "crypto",
    "gpu",
    "input",
    "net",
    "rng",
    "rpmsg",
    "rproc-serial",
    "scsi",
    "vsock",
    "fs",
];

/// The text between the next two quotation marks, and what is behind them.
fn quoted(text: &str) -> Option<(&str, &str)> {
    text.split_once('"')?.1.split_once('"')
}

/// vhost-user, "Backend program conventions": "Each back-end installed on a host system should come with at least one
/// JSON file that conforms to the vhost-user.json schema." With the name and type that the daemon itself has.
#[test]
fn qemu_back_end_conventions_each_daemon_has_its_description_file() {
    let devices = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("devices");
    let mut daemons = 0;
    for device in fs::read_dir(devices).expect("devices").flatten().map(|entry| entry.path()) {
        let Ok(main) = fs::read_to_string(device.join("src/main.rs")) else { continue };
        let identity = main.split_once("Identity::new(").expect("a daemon has an identity").1;
        let (name, rest) = quoted(identity).expect("a name");
        let (kind, _) = quoted(rest).expect("a type");
        if !TYPES.contains(&kind) {
            continue;
        }
        daemons += 1;
        let file = device.join(format!("50-{name}.json"));
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let members: Vec<_> = json.as_object().expect("an object").keys().map(String::as_str).collect();
        assert!(members.iter().all(|member| ["binary", "description", "tags", "type"].contains(member)));
        assert_eq!(json["type"], kind, "{}", file.display());
        let binary = Path::new(json["binary"].as_str().expect("a path"));
        assert!(binary.is_absolute() && binary.ends_with(name), "{}", file.display());
        assert!(!json["description"].as_str().expect("words").is_empty());
    }
    assert!(daemons >= 4, "only {daemons} daemons were found");
}
