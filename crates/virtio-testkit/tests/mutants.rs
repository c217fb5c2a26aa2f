//! Each line of the conformance suite finds what it looks for: there is a back-end that breaks just this rule, and the
//! line fails on it. The same back-end without a fault passes every line.
mod reference;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reference::{ECHO, Reference};
use virtio_testkit::conformance::{Line, Outcome, PATIENCE, SocketBench, SocketOptions, check};

fn bench(backend: &Reference, patience: Duration) -> SocketBench {
    let mut options = SocketOptions::new(backend.socket());
    options.patience = patience;
    options.quiet = Duration::from_millis(20);
    SocketBench::new(options)
}

#[test]
fn the_right_back_end_passes_every_line() {
    let backend = Reference::start("");
    let patience = PATIENCE;
    let report = check(&mut bench(&backend, patience), Some(&ECHO), patience);
    report.assert_passed();
    assert_eq!(report.not_applicable(), [""; 0]);
}

/// Ids are what mutants are named after.
#[test]
fn lines_have_names_of_their_own() {
    let mut names: Vec<_> = Line::all().iter().map(|line| line.id).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
}

/// A line without a mutant passes here, and that fails this test.
#[test]
fn each_line_fails_on_its_mutant() {
    let lines = Line::all();
    let next = AtomicUsize::new(0);
    // Most of the time is spent waiting for answers that do not come.
    let patience = Duration::from_millis(500);
    let try_all = || {
        let mut survivors = Vec::new();
        while let Some(line) = lines.get(next.fetch_add(1, Ordering::SeqCst)) {
            let backend = Reference::start(line.id);
            match line.run(&mut bench(&backend, patience), Some(&ECHO), patience) {
                Outcome::Fail(why) => println!("{}: {why}", line.id),
                other => survivors.push(format!("{}: {other:?}", line.id)),
            }
        }
        survivors
    };
    let survivors: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(try_all)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(
        survivors.is_empty(),
        "lines that see nothing wrong with their mutant:\n{}",
        survivors.join("\n")
    );
}
