//! The socket daemon beside rust-vmm's, a floor, and Unix sockets themselves: throughput, round trips, connections, and
//! what holds with ten thousand of them.
//!
//! `cargo xtask bench vsock`. The guest is a driver in this process ([`SocketSession`]), clients are threads of it; all of them
//! and the daemon are on one CPU (*same*), so a figure is the sum of all software paths. Contenders take turns; the median
//! of the rounds counts.
//!
//! | file | what for |
//! |---|---|
//! | `main.rs` | contenders, cases, the table |
//! | `one.rs` | cases with one connection at a time |
//! | `many.rs` | ten thousand connections |
//! | `daemon.rs` | a daemon and its clients |
//! | `relay.rs` | the floor of a daemon: the same wake-ups and nothing else |
mod daemon;
mod many;
mod one;
mod relay;

use std::path::PathBuf;
use std::process::ExitCode;

use virtio_testkit::RingLayout;

type Failed = Box<dyn std::error::Error + Send + Sync>;

const ROUNDS: usize = 6;

/// A daemon as it is measured.
struct Contender {
    name: String,
    program: PathBuf,
    layout: RingLayout,
}

/// What is in a row of the table.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    /// Digits behind the point.
    digits: usize,
    /// Whether more is better.
    more: bool,
}

impl Row {
    const fn more(name: &'static str, digits: usize) -> Row {
        Row { name, digits, more: true }
    }

    const fn less(name: &'static str, digits: usize) -> Row {
        Row { name, digits, more: false }
    }

    /// How good `ours` is beside `other`: 1 is as good, more is better.
    fn quality(self, ours: f64, other: f64) -> f64 {
        if self.more { ours / other } else { other / ours }
    }
}

/// Of each contender, then of the floor and of Unix sockets themselves: what was measured in each round.
struct Table {
    names: Vec<String>,
    rows: Vec<(Row, Vec<Vec<f64>>)>,
}

impl Table {
    fn new(contenders: &[Contender]) -> Table {
        let names = contenders.iter().map(|contender| contender.name.clone());
        Table { names: names.chain(["floor", "AF_UNIX"].map(str::to_owned)).collect(), rows: Vec::new() }
    }

    fn add(&mut self, row: Row, column: usize, figure: f64) {
        let at = self.rows.iter().position(|(known, _)| known.name == row.name).unwrap_or_else(|| {
            self.rows.push((row, vec![Vec::new(); self.names.len()]));
            self.rows.len() - 1
        });
        self.rows[at].1[column].push(figure);
    }

    fn print(self) {
        print!("{:40}", "");
        self.names.iter().for_each(|name| print!(" {name:>12}"));
        println!(" {:>14} {:>14} {:>14}", "of rust-vmm's", "of the floor", "of AF_UNIX");
        let column = |name: &str| self.names.iter().position(|known| known == name);
        for (row, columns) in self.rows {
            let medians: Vec<Option<f64>> = columns.into_iter().map(median).collect();
            let of = |name: &str| column(name).and_then(|at| medians[at]);
            print!("{:40}", row.name);
            for figure in &medians {
                let text = figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.*}", row.digits));
                print!(" {text:>12}");
            }
            for other in ["rust-vmm", "floor", "AF_UNIX"] {
                let quality = of("ours").zip(of(other)).map(|(ours, other)| row.quality(ours, other));
                print!(" {:>14}", quality.map_or_else(|| "-".to_owned(), |quality| format!("{quality:.2}")));
            }
            println!();
        }
    }
}

fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

/// `name=program` is a contender; any other word chooses the cases whose name it is in.
fn arguments() -> (Vec<Contender>, Vec<String>) {
    let (mut found, mut chosen) = (Vec::new(), Vec::new());
    // Cargo says so to whatever it runs as a benchmark.
    for word in std::env::args().skip(1).filter(|word| word != "--bench") {
        let Some((name, program)) = word.split_once('=') else {
            chosen.push(word);
            continue;
        };
        let program = PathBuf::from(program);
        let contender =
            |name: &str, layout| Contender { name: name.to_owned(), program: program.clone(), layout };
        found.push(contender(name, RingLayout::Split));
        if name == "ours" {
            found.push(contender("ours, packed", RingLayout::Packed));
        }
    }
    (found, chosen)
}

fn figures() -> Result<(), Failed> {
    let (contenders, chosen) = arguments();
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|word| name.contains(word.as_str()));
    println!("same CPU, medians of {ROUNDS} rounds in turns; ratios: more is better");
    let mut table = Table::new(&contenders);
    for _ in 0..ROUNDS {
        one::round(&contenders, &is_chosen, &mut table)?;
    }
    if is_chosen(many::NAME) {
        many::round(&contenders, &mut table)?;
    }
    table.print();
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let done = match arguments.as_slice() {
        [_, first, path] if first == relay::ARGUMENT => relay::main(path),
        _ => figures(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench vsock: {error}");
            ExitCode::FAILURE
        }
    }
}
