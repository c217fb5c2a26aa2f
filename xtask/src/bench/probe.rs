//! Runs of `vhost-probe bench`, and their figures beside the targets that a device has.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::wait;
use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// A built `vhost-probe`, and where figures go.
pub(super) struct Probe {
    program: PathBuf,
    figures: PathBuf,
}

impl Probe {
    /// `built`: the folder of built programs.
    pub(super) fn new(workspace: &Workspace, built: &Path) -> Result<Probe> {
        let figures = workspace.target().join("bench");
        fs::create_dir_all(&figures).map_err(|e| Error::file("make", &figures, &e))?;
        Ok(Probe { program: built.join("vhost-probe"), figures })
    }

    /// A file for figures.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.figures.join(name)
    }

    /// Runs one set of cases, whose tables go where our output does. Whether every back-end stood them, and the figures
    /// (nothing if it did not get that far).
    pub(super) fn run(&self, name: &str, arguments: &[String]) -> Result<(bool, Value)> {
        let json = self.file(&format!("{name}.json"));
        // Of an earlier run; it may not be there.
        let _ = fs::remove_file(&json);
        let mut probe = Command::new(&self.program);
        let stood = wait(probe.arg("bench").arg("--json").arg(&json).args(arguments))?;
        let Ok(text) = fs::read_to_string(&json) else { return Ok((stood, Value::Null)) };
        let figures = serde_json::from_str(&text);
        Ok((stood, figures.map_err(|e| Error::new("cannot read the figures", e.to_string()))?))
    }
}

/// What is compared of a case.
#[derive(Clone, Copy)]
pub(super) enum Figure {
    /// Requests a second.
    Rate,
    /// The median latency.
    Latency,
    /// CPU time of the back-end for each request.
    Cpu,
    /// That of driver and back-end: on one CPU the inverse of the rate, whoever else is on it.
    Both,
}

/// What one of ours has to reach beside the floor of the same run.
pub(super) struct Target {
    /// The case as the tables name it, and who of it.
    pub(super) case: &'static str,
    pub(super) who: &'static str,
    pub(super) floor: &'static str,
    pub(super) figure: Figure,
    /// The floor's figure and ours, as first measured and set: only their ratio counts.
    pub(super) set: (f64, f64),
}

impl Figure {
    fn name(self) -> &'static str {
        match self {
            Figure::Rate => "requests/s",
            Figure::Latency => "p50 us",
            Figure::Cpu => "BE us",
            Figure::Both => "CPU us",
        }
    }

    fn of(self, measured: &Value) -> Option<f64> {
        match self {
            Figure::Rate => measured["requests_per_second"]["median"].as_f64(),
            Figure::Latency => measured["latency_us"]["p50"].as_f64(),
            Figure::Cpu => measured["backend_cpu_us_per_request"]["median"].as_f64(),
            Figure::Both => measured["cpu_us_per_request"]["median"].as_f64(),
        }
    }

    /// How good `ours` is beside `floor`: 1 is as good, more is better.
    fn quality(self, ours: f64, floor: f64) -> f64 {
        match self {
            Figure::Rate => ours / floor,
            Figure::Latency | Figure::Cpu | Figure::Both => floor / ours,
        }
    }
}

/// The figures of who is called so in a case.
fn figures<'a>(runs: &'a [Value], case: &str, who: &str) -> Option<&'a Value> {
    let cases = runs.iter().filter_map(|run| run["cases"].as_array()).flatten();
    let mut cases = cases.filter(|found| found["case"] == case);
    cases.find_map(|found| {
        let contender = found["contenders"].as_array()?.iter().find(|contender| contender["name"] == who)?;
        contender.get("measured")
    })
}

/// A line for each target: ours, the floor, how ours is beside it, what was asked, and how near that is (1 or more is
/// reached).
pub(super) fn table(targets: &[Target], runs: &[Value]) -> String {
    let mut text = format!(
        "\n{:64} {:10} {:>10} {:>10} {:>8} {:>8} {:>8}\n",
        "beside the targets (best is 1.00 of the floor)", "", "ours", "floor", "of floor", "asked", "reached"
    );
    for Target { case, who, floor, figure, set } in targets {
        let find = |name| figures(runs, case, name).and_then(|measured| figure.of(measured));
        let title = format!("{case}: {who}");
        let (Some(ours), Some(least)) = (find(who), find(floor)) else {
            text.push_str(&format!("{title:64} {:10} not measured\n", figure.name()));
            continue;
        };
        let (is, asked) = (figure.quality(ours, least), figure.quality(set.1, set.0));
        text.push_str(&format!(
            "{title:64} {:10} {ours:>10.2} {least:>10.2} {is:>8.2} {asked:>8.2} {:>8.2}\n",
            figure.name(),
            is / asked
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_reached_by_ratio_in_either_direction() {
        let who = |name: &str, rate: f64, p50: f64| {
            serde_json::json!({ "name": name, "measured": {
                "requests_per_second": { "median": rate }, "latency_us": { "p50": p50 },
                "backend_cpu_us_per_request": { "median": p50 } } })
        };
        let cases = serde_json::json!([{ "case": "c", "contenders": [who("floor", 200.0, 4.0), who("ours", 100.0, 5.0)] }]);
        let runs = [Value::Null, serde_json::json!({ "cases": cases })];
        let target = |figure, set| Target { case: "c", who: "ours", floor: "floor", figure, set };
        let text = table(&[target(Figure::Rate, (4.0, 3.0)), target(Figure::Latency, (10.0, 20.0))], &runs);
        let last: Vec<_> = text.lines().skip(2).filter_map(|line| line.split_whitespace().last()).collect();
        // Half the rate where three quarters are asked; 0.8 of the latency's quality where half is.
        assert_eq!(last, ["0.67", "1.60"], "{text}");
        assert!(
            table(&[Target { who: "nobody", ..target(Figure::Cpu, (1.0, 1.0)) }], &runs)
                .contains("not measured")
        );
    }
}
