//! `vhost-ctl top`: rates, from the difference of two looks at the counters.
//!
//! On a terminal each table replaces the one before; elsewhere they follow each other, an empty line between two.
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use vhost_device::control::report::{GuestStats, QueueStats, Stats};

use crate::Failure;
use crate::daemons::Daemons;
use crate::stats::{collect, quantile};
use crate::table::{Table, bytes, count};

/// The cursor to the first line.
const HOME: &str = "\x1b[H";
/// The rest of the line, or of the screen, becomes empty.
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_SCREEN: &str = "\x1b[J";

struct Look {
    at: Instant,
    stats: Vec<(String, Stats)>,
}

pub(crate) fn show(
    daemons: &mut Daemons,
    interval: Duration,
    tables: Option<u64>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let live = std::io::stdout().is_terminal();
    let mut before = look(daemons)?;
    let mut shown = 0;
    while tables.is_none_or(|tables| shown < tables) {
        std::thread::sleep((before.at + interval).saturating_duration_since(Instant::now()));
        let now = look(daemons)?;
        let lines = lines(&before, &now);
        if live {
            let rows = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(24, |size| size.ws_row);
            write!(out, "{HOME}")?;
            for line in lines.iter().take(usize::from(rows.max(2)) - 1) {
                writeln!(out, "{line}{REST_OF_LINE}")?;
            }
            write!(out, "{REST_OF_SCREEN}")?;
        } else {
            if shown > 0 {
                writeln!(out)?;
            }
            lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        }
        out.flush()?;
        before = now;
        shown += 1;
    }
    Ok(())
}

fn look(daemons: &mut Daemons) -> Result<Look, Failure> {
    let stats = collect(daemons)?;
    Ok(Look { at: Instant::now(), stats })
}

fn lines(before: &Look, now: &Look) -> Vec<String> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-9);
    let mut lines = Vec::new();
    let several = now.stats.len() > 1;
    for ((socket, stats), (_, earlier)) in now.stats.iter().zip(&before.stats) {
        if several && !lines.is_empty() {
            lines.push(String::new());
        }
        let resident = stats.process.resident_bytes.unwrap_or(0);
        lines.push(format!(
            "{} {} at {socket}: {} guests, {}B resident, log lines suppressed: {}",
            stats.version.name,
            stats.version.version,
            stats.guests.len(),
            bytes(resident as f64),
            stats.process.log_lines_suppressed
        ));
        lines.extend(table(stats, earlier, seconds).lines());
    }
    lines
}

fn table(stats: &Stats, earlier: &Stats, seconds: f64) -> Table {
    let mut table = Table::new(&[
        "GUEST",
        "<STATE",
        "<QUEUE",
        "REQ/S",
        "READ B/S",
        "WRITE B/S",
        "KICKS/S",
        "IRQS/S",
        "OUT",
        "P50",
        "P99",
        "ERRORS",
    ]);
    for guest in &stats.guests {
        let before = earlier.guests.iter().find(|before| before.guest == guest.guest);
        for queue in &guest.queues {
            let before =
                before.and_then(|guest| guest.queues.iter().find(|before| before.queue == queue.queue));
            let nothing = QueueStats::default();
            let before = before.unwrap_or(&nothing);
            let rate = |of: fn(&QueueStats) -> u64| of(queue).saturating_sub(of(before)) as f64 / seconds;
            let latency = queue.latency.since(&before.latency);
            table.row([
                guest.guest.to_string(),
                state(guest).to_owned(),
                format!("{} {}", queue.queue, queue.name),
                count(rate(|queue| queue.completed).round()),
                bytes(rate(|queue| queue.bytes_read).round()),
                bytes(rate(|queue| queue.bytes_written).round()),
                count(rate(|queue| queue.kicks).round()),
                count(rate(|queue| queue.interrupts).round()),
                queue.out.to_string(),
                quantile(&latency, 0.5),
                quantile(&latency, 0.99),
                queue.errors.by_name().iter().map(|(_, count)| count).sum::<u64>().to_string(),
            ]);
        }
    }
    table
}

fn state(guest: &GuestStats) -> &'static str {
    match (guest.needs_reset, guest.connected) {
        (true, _) => "needs reset",
        (false, true) => "connected",
        (false, false) => "alone",
    }
}
