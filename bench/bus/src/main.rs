//! Dispatch in one process: our buses beside a bare sorted array and rust-vmm's `vm-device` 0.1.0, in one run.
//!
//! Also registers of virtio beside a bare `match`.
//!
//! `cargo xtask bench bus`; `-- --quick`: short tables, to see that it runs; `-- --registers`, `--dispatch`, `--threads`,
//! `--registering`: only these tables. All times but those of registration are the CPU time of the thread that accesses, so that
//! other programs on the machine count little.
mod registering;
mod threads;
mod variants;
mod virtio;

use rustix::time::{ClockId, clock_gettime};

use variants::{Access, Addresses};

/// CPU time of this thread in nanoseconds.
fn thread_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Half the range that the middle half of the rounds is within, in percent of the median.
fn spread(values: &mut [f64]) -> f64 {
    let middle = median(values);
    let quarter = values.len() / 4;
    (values[values.len() - 1 - quarter] - values[quarter]) / 2.0 / middle * 100.0
}

/// Median, and the spread in brackets.
fn shown(values: &mut [f64]) -> String {
    format!("{:6.1} ({:.0} %)", median(values), spread(values))
}

/// The median of the rounds' ratios.
fn ratio(ours: &[f64], other: &[f64]) -> f64 {
    median(&mut ours.iter().zip(other).map(|(ours, other)| ours / other).collect::<Vec<_>>())
}

/// How much of everything.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Fresh memory so many times.
    sets: usize,
    /// In each, everybody takes turns so many times.
    rounds: usize,
    /// Accesses each time.
    accesses: usize,
}

/// Nanoseconds of an access.
fn lap(variant: &mut dyn Access, addresses: &Addresses, accesses: usize) -> f64 {
    let begin = thread_time();
    variant.run(addresses, accesses);
    (thread_time() - begin) / accesses as f64
}

const TARGET: f64 = 1.4;

fn dispatch(effort: Effort) -> usize {
    println!(
        "\nnanoseconds of a write of 4 bytes: median of {} alternating rounds (spread of their middle half).",
        effort.sets * effort.rounds
    );
    println!(
        "A device stores the bytes in an atomic. Accessed: a random range each time, or always the same."
    );
    println!(
        "ratio: ours with a vCPU's handle to the array, median of the rounds' ratios; target {TARGET}, ! if missed\n"
    );
    let head = ["ranges", "sorted array", "ours, handle", "ours, shared", "vm-device", "in a Mutex"];
    println!("| {} | ratio  |", head.map(|head| format!("{head:<13}")).join(" | "));
    println!("|{}--------|", format!("{:-<15}|", "").repeat(head.len()));
    let mut missed = 0;
    let cases = [1, 10, 100, 1000].into_iter().flat_map(|ranges| [(ranges, false), (ranges, true)]).skip(1);
    for (ranges, same) in cases {
        let mut times: [Vec<f64>; 5] = Default::default();
        for set in 0..effort.sets {
            // Where allocations come to lie decides which of them share places in the cache.
            let displaced = vec![0u8; set * 1040];
            let addresses = if same { Addresses::one(ranges / 2) } else { Addresses::new(ranges) };
            let mut variants = variants::all(ranges);
            std::hint::black_box(&displaced);
            for variant in &mut variants {
                lap(variant.as_mut(), &addresses, effort.accesses);
            }
            for round in 0..effort.rounds {
                for i in 0..variants.len() {
                    // Who comes first takes turns, too.
                    let i = (i + round) % variants.len();
                    times[i].push(lap(variants[i].as_mut(), &addresses, effort.accesses));
                }
            }
        }
        let name = format!("{ranges:<4} {}", if same { "the same" } else { "random" });
        let ratio = ratio(&times[1], &times[0]);
        let met = ratio <= TARGET;
        missed += usize::from(!met);
        let cells: Vec<String> = times.iter_mut().map(|times| format!("{:<13}", shown(times))).collect();
        println!("| {name:<13} | {} | {ratio:.2}{} |", cells.join(" | "), if met { "  " } else { " !" });
    }
    missed
}

/// The argument that asks for it, and what prints it and says how many of its lines miss their target.
type Table = (&'static str, fn(Effort) -> usize);

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let effort = match quick {
        true => Effort { sets: 2, rounds: 5, accesses: 5_000 },
        false => Effort { sets: 8, rounds: 15, accesses: 50_000 },
    };
    let tables: [Table; 4] = [
        ("--registers", virtio::table),
        ("--dispatch", dispatch),
        ("--threads", threads::table),
        ("--registering", registering::table),
    ];
    let asked = |(name, _): &Table| std::env::args().any(|argument| argument == *name);
    let all = !tables.iter().any(asked);
    let missed: usize =
        tables.iter().filter(|table| all || asked(table)).map(|(_, table)| table(effort)).sum();
    println!("\n{missed} above target");
}
