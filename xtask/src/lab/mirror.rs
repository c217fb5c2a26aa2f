//! Finds the Debian mirror that this machine already uses, from apt's own lists of sources (both of their forms).
//!
//! No mirror is named in this project: a machine behind a company's mirror keeps using that.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// The mirror from `/etc/apt`.
pub(crate) fn of_this_machine() -> Result<String> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    for file in &files {
        let Ok(text) = fs::read_to_string(file) else { continue };
        let mirror = match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => in_stanzas(&text),
            Some("list") => in_lines(&text),
            _ => None,
        };
        if let Some(mirror) = mirror {
            return Ok(mirror);
        }
    }
    Err(Error::new(
        "cannot tell which Debian mirror to use",
        "no source in /etc/apt/sources.list and /etc/apt/sources.list.d is a Debian archive",
    )
    .fix("name one: cargo xtask lab --debian-mirror http://HOST/debian"))
}

/// One-line form: `deb [options] URI SUITE COMPONENT...`.
fn in_lines(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb")?;
        let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        archive(rest.split_whitespace().next()?)
    })
}

/// Stanza form (deb822): fields `Types`, `URIs`, `Enabled`; a field goes on in lines that start with a blank.
fn in_stanzas(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let field = |wanted: &str| -> Option<Vec<&str>> {
            let (at, value) = stanza.iter().enumerate().find_map(|(at, line)| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(wanted).then_some((at, value))
            })?;
            let more = stanza[at + 1..].iter().take_while(|line| line.starts_with([' ', '\t']));
            Some(value.split_whitespace().chain(more.flat_map(|line| line.split_whitespace())).collect())
        };
        let off = field("Enabled").is_some_and(|v| v.first().is_some_and(|v| v.eq_ignore_ascii_case("no")));
        if off || !field("Types")?.contains(&"deb") {
            return None;
        }
        field("URIs")?.into_iter().find_map(archive)
    })
}

/// Takes an address that looks like a whole Debian archive (not the security one, and not another distribution's).
fn archive(address: &str) -> Option<String> {
    let bare = address.trim_end_matches('/');
    let last = bare.rsplit('/').next()?;
    let whole = last == "debian" || last == "debian.list" || bare.contains("/archive/debian/");
    (whole && bare.contains(':')).then(|| bare.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let text = "# deb http://a.example/debian x main\ndeb-src http://b.example/debian x main\n\
                    deb http://sec.example/debian-security x main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://c.example/debian/ x main\n";
        assert_eq!(in_lines(text).as_deref(), Some("http://c.example/debian"));
        assert_eq!(in_lines("deb http://u.example/ubuntu noble main"), None);
        assert_eq!(in_lines("debian"), None);
    }

    #[test]
    fn stanza_sources() {
        let text = "Types: deb\nURIs: http://off.example/debian\nEnabled: no\nSuites: x\n\n\
                    Types: deb-src\nURIs: http://src.example/debian\n\n\
                    Types: deb deb-src\n# a remark\nURIs:\n http://sec.example/debian-security\n http://d.example/debian\n";
        assert_eq!(in_stanzas(text).as_deref(), Some("http://d.example/debian"));
        assert_eq!(in_stanzas("Types: deb\nURIs: http://n.example/node_20.x\n"), None);
    }
}
