//! `cargo xtask fuzz`: looks for bytes that break a promise, with libFuzzer and the address sanitizer.
//!
//! What is fed with bytes is the plain crate in `fuzz/`; here it is built for the fuzzer, which needs a nightly compiler or one
//! that is told to act like it. Everything that this makes is below the target folder.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use backplane_tests::process::Owned;

use crate::command;
use crate::error::{Error, Result};
use crate::progress::{Step, note};
use crate::workspace::{Workspace, without_cargos_settings};

/// The version of cargo-fuzz that this was written for.
const CARGO_FUZZ: &str = "0.13.2";

/// Longer inputs find nothing that shorter ones do not, and are slower.
const LIMITS: [&str; 4] = ["-max_len=1024", "-len_control=0", "-timeout=60", "-rss_limit_mb=3000"];

/// Runs one target or all, one after the other, so many seconds each. Whether nothing was found.
pub(crate) fn run(wanted: Option<&str>, seconds: u64) -> Result<bool> {
    let workspace = Workspace::read()?;
    let folder = workspace.path("fuzz/libfuzzer");
    let mut targets = targets(&folder.join("targets"))?;
    if let Some(wanted) = wanted {
        let all = targets.join(", ");
        targets.retain(|target| target == wanted);
        if targets.is_empty() {
            return Err(Error::new(
                format!("there is no fuzz target `{wanted}`"),
                format!("there are {all}"),
            ));
        }
    }
    ensure_cargo_fuzz()?;
    let work = workspace.target().join("fuzz");
    let programs = build(&folder, &work, wanted)?;
    let mut failed = Vec::new();
    for target in &targets {
        let (corpus, found) = (work.join("corpus").join(target), work.join("found"));
        for folder in [&corpus, &found] {
            fs::create_dir_all(folder).map_err(|e| Error::file("make", folder, &e))?;
        }
        note(&format!("{target}: {seconds} s, its inputs are kept in {}", corpus.display()));
        let mut fuzzer = Command::new(programs.join(target));
        fuzzer.args(LIMITS).arg(format!("-max_total_time={seconds}"));
        fuzzer.arg(format!("-artifact_prefix={}/{target}-", found.display()));
        fuzzer.arg(corpus).arg(workspace.path("fuzz/corpus").join(target));
        if !wait(&mut fuzzer)? {
            failed.push(target.as_str());
            note(&format!("{target}: FOUND something, see {}/{target}-*", found.display()));
        }
    }
    match failed.as_slice() {
        [] => note(&format!("nothing was found in {seconds} s each: {}", targets.join(", "))),
        failed => note(&format!("something was found: {}", failed.join(", "))),
    }
    Ok(failed.is_empty())
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::file("read", folder, &e))?;
    let names = entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some());
    let mut names: Vec<String> =
        names.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// The cargo on the search path, which may be told which compiler to use; not the one that runs us.
fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    without_cargos_settings(&mut cargo);
    cargo.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC");
    cargo
}

fn ensure_cargo_fuzz() -> Result<()> {
    let mut ask = cargo();
    ask.args(["fuzz", "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if ask.status().is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let mut step =
        Step::start("cargo-fuzz", &format!("installing cargo-fuzz {CARGO_FUZZ} from the package registry"));
    let mut install = cargo();
    install.args(["install", "cargo-fuzz", "--locked", "--version", &format!("={CARGO_FUZZ}")]);
    command::quiet(&mut install, &mut step)?;
    step.done(&format!("installed cargo-fuzz {CARGO_FUZZ}"));
    Ok(())
}

/// Builds for the fuzzer, and gives the folder of the programs.
fn build(folder: &Path, work: &Path, wanted: Option<&str>) -> Result<PathBuf> {
    let mut list = Command::new("rustup");
    let nightly = command::output(list.args(["toolchain", "list"])).ok();
    let nightly = nightly.is_some_and(|list| list.lines().any(|line| line.starts_with("nightly-")));
    let with = if nightly {
        "the nightly compiler"
    } else {
        "this compiler with RUSTC_BOOTSTRAP=1: there is no nightly"
    };
    let mut build = cargo();
    match nightly {
        true => build.env("RUSTUP_TOOLCHAIN", "nightly"),
        false => build.env("RUSTC_BOOTSTRAP", "1"),
    };
    build.args(["fuzz", "build", "--fuzz-dir"]).arg(folder).arg("--target-dir").arg(work.join("build"));
    build.args(wanted);
    let mut step = Step::start("fuzz", &format!("building with {with}"));
    command::run(
        &mut build,
        &mut step,
        |step, line| {
            if let Some(what) = line.trim_start().strip_prefix("Compiling ") {
                step.detail(what);
            }
        },
        |_| (),
    )?;
    step.done(&format!("built with {with}"));
    // One folder is named for the machine that was built for.
    let built = fs::read_dir(work.join("build")).map_err(|e| Error::file("read", work, &e))?;
    let programs = built.flatten().map(|entry| entry.path().join("release")).filter(|path| {
        path.is_dir() && path.parent().and_then(Path::file_name).is_some_and(|name| name != "release")
    });
    programs.max().ok_or_else(|| Error::new("cannot find what was built", work.display().to_string()))
}

fn wait(fuzzer: &mut Command) -> Result<bool> {
    let shown = fuzzer.get_program().display().to_string();
    let failed = |e: std::io::Error| Error::new(format!("cannot run `{shown}`"), e.to_string());
    let mut child = Owned::spawn(fuzzer.stdin(Stdio::null())).map_err(failed)?;
    loop {
        command::stop_if_interrupted()?;
        if let Some(status) = child.wait_for(Duration::from_millis(200)).map_err(failed)? {
            return Ok(status.success());
        }
    }
}
