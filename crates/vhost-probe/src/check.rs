//! `vhost-probe check`: the conformance suite over a back-end, as a table.
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use virtio_testkit::conformance::{Line, Outcome, SocketBench, SocketOptions, Subject};

use crate::{Target, table};

/// How long to wait for somebody to listen.
const LISTENING: Duration = Duration::from_millis(500);

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,

    /// Only lines whose name begins with one of these, e.g. `fault-,reset-`
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    only: Vec<String>,

    /// Leave out lines whose name begins with one of these
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    skip: Vec<String>,

    /// Only list the lines
    #[arg(long)]
    list: bool,
}

impl Options {
    fn lines(&self) -> Vec<Line> {
        let begins =
            |line: &Line, with: &[String]| with.iter().any(|name| line.id.starts_with(name.as_str()));
        Line::all()
            .into_iter()
            .filter(|line| self.only.is_empty() || begins(line, &self.only))
            .filter(|line| !begins(line, &self.skip))
            .collect()
    }
}

/// Runs the lines. Fails if one is broken.
pub(crate) fn run(options: &Options) -> ExitCode {
    let target = &options.target;
    let lines = options.lines();
    if lines.is_empty() {
        eprintln!("vhost-probe: there is no such line; --list shows all");
        return ExitCode::FAILURE;
    }
    if options.list {
        list(&lines, target.json);
        return ExitCode::SUCCESS;
    }
    if let Err(error) = virtio_testkit::connect(&target.path, LISTENING) {
        eprintln!("vhost-probe: {}: {}", target.path.display(), crate::features::reason(&error));
        return ExitCode::FAILURE;
    }
    let subject =
        target.device.and_then(|device| device.names.iter().find_map(|name| Subject::by_name(name)));
    let mut socket = SocketOptions::new(&target.path);
    socket.patience = target.timeout;
    let mut host = SocketBench::new(socket);
    let mut outcomes = Vec::new();
    for line in lines {
        let outcome = line.run(&mut host, subject, target.timeout);
        outcomes.push((line, outcome));
    }
    let failed = outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Fail(_))).count();
    if target.json {
        let rows: Vec<_> = outcomes
            .iter()
            .map(|(line, outcome)| {
                let (result, reason) = words(outcome);
                json!({
                    "line": line.id,
                    "section": line.section,
                    "text": line.text,
                    "result": result,
                    "reason": reason.map(table::plain),
                })
            })
            .collect();
        println!("{:#}", json!({ "lines": rows, "failed": failed }));
    } else {
        let rows: Vec<_> = outcomes
            .iter()
            .map(|(line, outcome)| {
                let (result, reason) = words(outcome);
                let what = reason.map_or_else(|| line.text.to_owned(), table::plain);
                vec![line.id.to_owned(), line.section.to_owned(), result.to_owned(), what]
            })
            .collect();
        print!("{}", table::text(&["line", "section", "result", "rule, or what was seen"], &rows));
        let passed = outcomes.iter().filter(|(_, outcome)| *outcome == Outcome::Pass).count();
        println!("\n{passed} passed, {failed} failed, {} not applicable", outcomes.len() - passed - failed);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn words(outcome: &Outcome) -> (&'static str, Option<&str>) {
    match outcome {
        Outcome::Pass => ("pass", None),
        Outcome::Fail(why) => ("FAIL", Some(why)),
        Outcome::NotApplicable(why) => ("n/a", Some(why)),
    }
}

fn list(lines: &[Line], json: bool) {
    if json {
        let rows: Vec<_> = lines
            .iter()
            .map(|line| json!({ "line": line.id, "section": line.section, "text": line.text }))
            .collect();
        println!("{:#}", json!(rows));
        return;
    }
    let row = |line: &Line| vec![line.id.to_owned(), line.section.to_owned(), line.text.to_owned()];
    print!("{}", table::text(&["line", "section", "rule"], &lines.iter().map(row).collect::<Vec<_>>()));
}
