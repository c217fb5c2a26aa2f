//! Runs other programs: their output goes past a callback line by line, progress stays alive while they are silent,
//! Ctrl-C ends them, and a failure shows the last lines that they said.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use backplane_tests::interrupt;
use backplane_tests::process::Owned;

use crate::error::{Error, Result};
use crate::progress::Step;

/// Lines of a failed program's output that are shown.
const SHOWN: usize = 15;
const TICK: Duration = Duration::from_millis(100);

/// Runs `command` to its end, giving each line of its output (both streams) to `line`, and calling `tick` often.
pub(crate) fn run(
    command: &mut Command,
    step: &mut Step,
    mut line: impl FnMut(&mut Step, &str),
    mut tick: impl FnMut(&mut Step),
) -> Result<()> {
    let shown = shown(command);
    let failed = |why: String| Error::new(format!("`{shown}` failed"), why);
    let (reader, writer) = io::pipe().map_err(|e| failed(e.to_string()))?;
    let second = writer.try_clone().map_err(|e| failed(e.to_string()))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = Owned::spawn(command).map_err(|e| not_started(command, &e))?;
    // The command keeps the writing ends until it is told to use others; the pipe has to end with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (lines_in, lines) = mpsc::channel();
    let pump = thread::spawn(move || {
        for text in BufReader::new(reader).split(b'\n').map_while(io::Result::ok) {
            if lines_in.send(String::from_utf8_lossy(&text).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let mut last = VecDeque::new();
    loop {
        stop_if_interrupted()?;
        match lines.recv_timeout(TICK) {
            Ok(text) => {
                line(step, &text);
                if !text.is_empty() {
                    last.push_back(text);
                }
                if last.len() > SHOWN {
                    last.pop_front();
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        step.tick();
        tick(step);
    }
    let _ = pump.join();
    let status = loop {
        stop_if_interrupted()?;
        match child.wait_for(TICK).map_err(|e| failed(e.to_string()))? {
            Some(status) => break status,
            None => step.tick(),
        }
    };
    if status.success() {
        return Ok(());
    }
    let said = last.into_iter().map(|l| format!("\n    | {l}")).collect::<String>();
    let error = failed(format!("{status}; it said last:{said}"));
    Err(if said.contains("No space left on device") {
        error.fix("make room on that disk, or put the lab on another one with BACKPLANE_LAB=FOLDER")
    } else {
        error
    })
}

/// [`run`] for a program whose output is only of interest when it fails.
pub(crate) fn quiet(command: &mut Command, step: &mut Step) -> Result<()> {
    run(command, step, |_, _| (), |_| ())
}

/// Runs a short program and gives what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let result = command.stdin(Stdio::null()).output().map_err(|e| not_started(command, &e))?;
    if result.status.success() {
        return Ok(String::from_utf8_lossy(&result.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&result.stderr).trim().replace('\n', "\n    | ");
    Err(Error::new(
        format!("`{}` failed", shown(command)),
        format!("{}; it said:\n    | {said}", result.status),
    ))
}

/// Whether a program of that name can be started from the search path.
pub(crate) fn found(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// The error that ends everything after Ctrl-C.
pub(crate) fn stop_if_interrupted() -> Result<()> {
    match interrupt::caught() {
        None => Ok(()),
        Some(signal) => {
            Err(Error::new("stopped", format!("signal {signal} came; what was half done is put away")))
        }
    }
}

fn not_started(command: &Command, error: &io::Error) -> Error {
    let program = Path::new(command.get_program()).display().to_string();
    Error::new(format!("cannot start `{program}`"), error.to_string())
        .fix(format!("install the program `{program}`, or put it on the PATH"))
}

/// The command line as a person would type it, cut to a readable length.
fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    match text.char_indices().nth(160) {
        Some((cut, _)) => format!("{} ...", &text[..cut]),
        None => text,
    }
}
