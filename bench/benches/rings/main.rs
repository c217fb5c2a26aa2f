//! Rings in one process: our queue beside a bare loop and rust-vmm's `virtio-queue`, in one run.
//!
//! `cargo bench -p backplane-bench --bench rings`: criterion's statistics of each cell, then a table of medians and
//! ratios from rounds in which the variants take turns. `-- --quick`: a short table only, to see that it runs.
//! `-- --table`: the table only. `-- --fastest`: each cell's fastest laps, for a busy machine, and in-flight tracking;
//! `-- --fastest packed cycle 8`: of that row, with eight regions.
//! `-- --one split cycle 8 ours`: one cell over and over, for a profiler; `tracked` is ours with in-flight tracking.
#![allow(missing_docs, reason = "a benchmark has no interface")]
#![allow(unreachable_pub, reason = "a benchmark has no interface")]
mod bare;
mod guest;
mod ours;
mod peer;
mod rows;

use std::time::Duration;

use bare::{BarePacked, BareSplit};
use criterion::{BenchmarkId, Criterion};
use guest::Guest;
use ours::Ours;
use peer::Peer;
use rows::{Bench, ROWS, Row, Run};

const REGIONS: [u64; 2] = [1, 8];

/// Our queue and what it is compared with, for one row, layout and number of regions.
fn variants(row: &'static Row, packed: bool, regions: u64) -> Vec<(&'static str, Box<dyn Run>)> {
    let guest = || Guest::new(regions, row.shape, packed);
    fn boxed<D: rows::Device + 'static>(
        guest: Guest,
        device: impl FnOnce(&Guest) -> D,
        row: &'static Row,
    ) -> Box<dyn Run> {
        let device = device(&guest);
        Box::new(Bench::new(guest, device, row))
    }
    let ours = ("ours", boxed(guest(), Ours::new, row));
    if packed {
        vec![("bare", boxed(guest(), BarePacked::new, row)), ours]
    } else {
        let peer = ("virtio-queue", boxed(guest(), Peer::new, row));
        vec![("bare", boxed(guest(), BareSplit::new, row)), ours, peer]
    }
}

/// The bare loop, our queue, and our queue with in-flight tracking.
fn with_tracked(row: &'static Row, packed: bool, regions: u64) -> Vec<(&'static str, Box<dyn Run>)> {
    let mut variants = variants(row, packed, regions);
    variants.truncate(2);
    let guest = Guest::new(regions, row.shape, packed);
    let tracked = Ours::tracked(&guest);
    variants.push(("tracked", Box::new(Bench::new(guest, tracked, row))));
    variants
}

fn nanoseconds((time, chains): (Duration, u64)) -> f64 {
    time.as_nanos() as f64 / chains as f64
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

/// How much of everything: `sets` of fresh memory, `rounds` in each.
struct Effort {
    sets: usize,
    rounds: usize,
    chains: u64,
}

fn table(effort: &Effort) {
    println!(
        "\nnanoseconds a chain: median of {} alternating rounds (spread of their middle half)",
        effort.rounds
    );
    println!("ratio: ours to the bare loop, median of the rounds' ratios; target in brackets, ! if missed\n");
    let head = ["row", "layout", "regions", "bare", "ours", "virtio-queue", "ratio"];
    println!(
        "| {:<31} | {:<6} | {:<7} | {:<13} | {:<13} | {:<13} | {:<14} |",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6]
    );
    println!("|{:-<33}|{:-<8}|{:-<9}|{:-<15}|{:-<15}|{:-<15}|{:-<16}|", "", "", "", "", "", "", "");
    let mut missed = 0;
    for packed in [false, true] {
        for row in &ROWS {
            for (at, regions) in REGIONS.into_iter().enumerate() {
                let target = row.targets[if packed { 2 } else { at }];
                missed += usize::from(!cell(row, packed, regions, target, effort));
            }
        }
    }
    println!("\n{missed} above target");
}

fn cell(row: &'static Row, packed: bool, regions: u64, target: f64, effort: &Effort) -> bool {
    let mut times: [Vec<f64>; 3] = Default::default();
    for set in 0..effort.sets {
        // Where allocations come to lie decides which of them share places in the cache: a set of variants may be
        // twice as slow as the next. So there are several, displaced against each other.
        let displaced = vec![0u8; set * 1040];
        let mut variants = variants(row, packed, regions);
        std::hint::black_box(&displaced);
        for (_, variant) in &mut variants {
            variant.run(effort.chains);
        }
        for round in 0..effort.rounds {
            for i in 0..variants.len() {
                // Who comes first takes turns, too.
                let i = (i + round) % variants.len();
                times[i].push(nanoseconds(variants[i].1.run(effort.chains)));
            }
        }
    }
    let mut ratios: Vec<f64> = times[1].iter().zip(&times[0]).map(|(ours, bare)| ours / bare).collect();
    let ratio = median(&mut ratios);
    let text: Vec<String> = times
        .iter_mut()
        .map(|times| match times.len() {
            0 => String::from("-"),
            _ => format!("{:6.1} ({:.0} %)", median(times), spread(times)),
        })
        .collect();
    let met = ratio <= target;
    println!(
        "| {:<31} | {:<6} | {:<7} | {:<13} | {:<13} | {:<13} | {:<14} |",
        row.name,
        if packed { "packed" } else { "split" },
        regions,
        text[0],
        text[1],
        text[2],
        format!("{ratio:.2} ({target}){}", if met { "" } else { " !" }),
    );
    met
}

fn statistics() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20)
        .without_plots();
    for packed in [false, true] {
        for row in &ROWS {
            let layout = if packed { "packed" } else { "split" };
            let mut group = criterion.benchmark_group(format!("{layout}/{}", row.id));
            for regions in REGIONS {
                for (name, mut variant) in variants(row, packed, regions) {
                    group.bench_function(BenchmarkId::new(name, format!("{regions} regions")), |bencher| {
                        bencher.iter_custom(|chains| {
                            let (time, done) = variant.run(chains);
                            time.mul_f64(chains as f64 / done as f64)
                        });
                    });
                }
            }
            group.finish();
        }
    }
}

/// One cell until it has run for a few seconds.
fn one(arguments: &[String]) {
    let [layout, id, regions, name] = arguments else { panic!("--one LAYOUT ROW REGIONS VARIANT") };
    let row = ROWS.iter().find(|row| row.id == id).expect("a row");
    let regions = regions.parse().expect("a number");
    let mut variants = with_tracked(row, layout == "packed", regions);
    let (_, variant) = variants.iter_mut().find(|(known, _)| known == name).expect("a variant");
    let (mut time, mut chains) = (Duration::ZERO, 0);
    while time < Duration::from_secs(3) {
        let (lap, done) = variant.run(100_000);
        time += lap;
        chains += done;
    }
    println!("{:.2} ns", nanoseconds((time, chains)));
}

/// The fastest laps of all rows, with what in-flight tracking adds to ours: medians of several sets of memory.
fn fastest(wanted: &[String]) {
    let regions = if wanted.iter().any(|wanted| wanted == "8") { 8 } else { 1 };
    println!(
        "nanoseconds a chain, fastest laps, {regions} regions: bare, ours, ours with in-flight tracking\n"
    );
    for packed in [false, true] {
        for row in &ROWS {
            let layout = if packed { "packed" } else { "split" };
            if !wanted.iter().all(|wanted| [row.id, layout, "8"].contains(&wanted.as_str())) {
                continue;
            }
            let mut found: [Vec<f64>; 3] = Default::default();
            for set in 0..8 {
                let displaced = vec![0u8; set * 1040];
                let mut variants = with_tracked(row, packed, regions);
                std::hint::black_box(&displaced);
                let mut least = [f64::INFINITY; 3];
                for _ in 0..20 {
                    for (least, (_, variant)) in least.iter_mut().zip(&mut variants) {
                        *least = least.min(variant.fastest(100));
                    }
                }
                found.iter_mut().zip(least).for_each(|(found, least)| found.push(least));
            }
            let [bare, ours, tracked] = found.map(|mut values| median(&mut values));
            println!(
                "| {:<31} | {layout:<6} | {bare:6.1} | {ours:6.1} ({:.2}) | {tracked:6.1} (+{:.1}) |",
                row.name,
                ours / bare,
                tracked - ours
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--one") {
        let end = (at + 5).min(arguments.len());
        return one(&arguments[at + 1..end]);
    }
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    if has("--quick") {
        table(&Effort { sets: 2, rounds: 5, chains: 2_000 });
        return;
    }
    if let Some(at) = arguments.iter().position(|argument| argument == "--fastest") {
        // The last one is cargo's.
        let wanted = arguments.iter().skip(at + 1).filter(|argument| *argument != "--bench").cloned();
        return fastest(&wanted.collect::<Vec<_>>());
    }
    if !has("--table") {
        statistics();
    }
    table(&Effort { sets: 8, rounds: 9, chains: 20_000 });
}
