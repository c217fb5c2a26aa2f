//! `vhost-ctl stats`.
use std::io::Write;

use serde_json::json;
use vhost_device::control::prometheus::{self, Source};
use vhost_device::control::protocol::Request;
use vhost_device::control::report::{Latency, Stats};

use crate::Failure;
use crate::daemons::Daemons;
use crate::table::{Table, bytes, count, micros};

pub(crate) fn show(
    daemons: &mut Daemons,
    as_json: bool,
    as_prometheus: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let all = collect(daemons)?;
    if as_json {
        let all: Vec<_> =
            all.iter().map(|(socket, stats)| json!({"socket": socket, "stats": stats})).collect();
        writeln!(out, "{}", json!(all))?;
    } else if as_prometheus {
        let sources: Vec<_> = all
            .iter()
            .map(|(socket, stats)| Source { labels: vec![("socket", socket.clone())], stats })
            .collect();
        out.write_all(prometheus::render(&sources).as_bytes())?;
    } else {
        table(&all, out)?;
    }
    Ok(())
}

/// Each daemon's socket and counters.
pub(crate) fn collect(daemons: &mut Daemons) -> Result<Vec<(String, Stats)>, Failure> {
    let guest = daemons.guest();
    let ask = |client: &mut crate::client::Client| {
        let stats = client.ask(&Request::Stats { guest })?;
        Ok((client.path.display().to_string(), stats))
    };
    daemons.clients.iter_mut().map(ask).collect()
}

fn table(all: &[(String, Stats)], out: &mut dyn Write) -> Result<(), Failure> {
    for (socket, stats) in all {
        writeln!(out, "{socket}: {} {}", stats.version.name, stats.version.version)?;
        let mut guests =
            Table::new(&["GUEST", "CONNECTS", "MESSAGES", "REFUSED", "TURNED AWAY", "<FAILURES"]);
        for guest in &stats.guests {
            let failures = guest.failures.by_name().into_iter().filter(|(_, count)| *count > 0);
            let failures: Vec<_> = failures.map(|(who, count)| format!("{who} {count}")).collect();
            guests.row([
                guest.guest.to_string(),
                guest.connects.to_string(),
                guest.messages.to_string(),
                guest.messages_refused.to_string(),
                guest.turned_away.to_string(),
                if failures.is_empty() { "none".into() } else { failures.join(", ") },
            ]);
        }
        write_table(&guests, out)?;
        let mut queues = Table::new(&[
            "GUEST",
            "<QUEUE",
            "REQUESTS",
            "DONE",
            "READ",
            "WRITTEN",
            "KICKS",
            "INTERRUPTS",
            "OUT",
            "MOST",
            "P50",
            "P99",
            "LONGEST",
            "<ERRORS",
        ]);
        for guest in &stats.guests {
            for queue in &guest.queues {
                let errors = queue.errors.by_name().into_iter().filter(|(_, count)| *count > 0);
                let errors: Vec<_> = errors.map(|(kind, count)| format!("{kind} {count}")).collect();
                queues.row([
                    guest.guest.to_string(),
                    format!("{} {}", queue.queue, queue.name),
                    count(queue.requests as f64),
                    count(queue.completed as f64),
                    bytes(queue.bytes_read as f64),
                    bytes(queue.bytes_written as f64),
                    count(queue.kicks as f64),
                    count(queue.interrupts as f64),
                    queue.out.to_string(),
                    queue.most_at_once.to_string(),
                    quantile(&queue.latency, 0.5),
                    quantile(&queue.latency, 0.99),
                    micros(queue.latency.max_ns / 1000),
                    errors.join(", "),
                ]);
            }
        }
        write_table(&queues, out)?;
    }
    Ok(())
}

fn write_table(table: &Table, out: &mut dyn Write) -> Result<(), Failure> {
    for line in table.lines() {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

/// The end of the bucket that this part of the requests is within.
pub(crate) fn quantile(latency: &Latency, part: f64) -> String {
    match (latency.quantile_us(part), latency.buckets.iter().any(|count| *count > 0)) {
        (Some(us), _) => format!("<{}", micros(us)),
        (None, true) => "longer".into(),
        (None, false) => "-".into(),
    }
}
