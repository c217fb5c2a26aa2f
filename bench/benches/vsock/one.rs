//! One connection at a time: how much it carries, how long a round trip takes, how many come and go in a second.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_testkit::TestRam;
use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::pin_current_thread;
use virtio_testkit::load::sockets::{ECHO, FLOOD, SINK, SocketSession};

use crate::daemon::{Daemon, client};
use crate::relay::Relay;
use crate::{Contender, Failed, Row, Table};

const ROUND: Duration = Duration::from_millis(200);

/// What is measured: bytes or counts in a second, or microseconds.
#[derive(Clone, Copy, Debug)]
enum What {
    ToHost(u32),
    ToGuest(u32),
    RoundTrip,
    Connections,
}

/// Each with its row, and that of the daemon's CPU time.
const CASES: [(What, Row, Option<Row>); 6] = [
    (What::ToHost(4096), Row::more("to host 4 KiB (GB/s)", 2), None),
    (What::ToHost(65536), Row::more("to host 64 KiB (GB/s)", 2), None),
    (What::ToGuest(4096), Row::more("to guest 4 KiB (GB/s)", 2), None),
    (What::ToGuest(65536), Row::more("to guest 64 KiB (GB/s)", 2), None),
    (
        What::RoundTrip,
        Row::less("round trip 64 B (us)", 1),
        Some(Row::less("round trip 64 B, daemon's CPU (us)", 1)),
    ),
    (
        What::Connections,
        Row::more("connections (1000/s)", 1),
        Some(Row::less("connections, daemon's CPU (us)", 1)),
    ),
];

/// One turn of each contender in each case.
pub(crate) fn round(
    contenders: &[Contender],
    is_chosen: &dyn Fn(&str) -> bool,
    table: &mut Table,
) -> Result<(), Failed> {
    for (what, row, cpu) in CASES.into_iter().filter(|(_, row, _)| is_chosen(row.name)) {
        for (column, contender) in contenders.iter().enumerate() {
            match measure(what, contender) {
                Ok((figure, used)) => {
                    table.add(row, column, figure);
                    if let Some(row) = cpu {
                        table.add(row, column, used);
                    }
                }
                Err(error) => eprintln!("{}, {}: {error}", contender.name, row.name),
            }
        }
        if let What::RoundTrip | What::Connections = what {
            let (figure, used) = relay(what)?;
            table.add(row, contenders.len(), figure);
            if let Some(row) = cpu {
                table.add(row, contenders.len(), used);
            }
        }
        table.add(row, contenders.len() + 1, bare(what)?);
    }
    Ok(())
}

fn reads(stream: &mut UnixStream) -> Result<f64, Failed> {
    let mut part = vec![0; 256 << 10];
    let (begun, mut total) = (Instant::now(), 0);
    while begun.elapsed() < ROUND {
        total += stream.read(&mut part)?;
    }
    Ok(total as f64 / begun.elapsed().as_secs_f64() / 1e9)
}

fn writes(stream: &mut UnixStream, size: u32) -> Result<f64, Failed> {
    let part = vec![0x5a; size as usize];
    let (begun, mut total) = (Instant::now(), 0);
    while begun.elapsed() < ROUND {
        stream.write_all(&part)?;
        total += part.len();
    }
    Ok(total as f64 / begun.elapsed().as_secs_f64() / 1e9)
}

/// The median in microseconds, and how many there were.
fn round_trips(stream: &mut UnixStream) -> Result<(f64, u64), Failed> {
    let mut part = [0x5a; 64];
    let (begun, mut all) = (Instant::now(), Vec::new());
    while begun.elapsed() < ROUND {
        let sent = Instant::now();
        stream.write_all(&part)?;
        stream.read_exact(&mut part)?;
        all.push(sent.elapsed());
    }
    all.sort_unstable();
    Ok((all[all.len() / 2].as_secs_f64() * 1e6, all.len() as u64))
}

/// The figure, and microseconds of the daemon for each round trip or connection.
fn measure(what: What, contender: &Contender) -> Result<(f64, f64), Failed> {
    let payload = if let What::ToHost(size) = what { size } else { 64 };
    let daemon = Daemon::start(&contender.program)?;
    let ram = TestRam::new(&[(0, 64 << 20)]);
    let mut session = daemon.guest(&ram, contender.layout, payload)?;
    let path = daemon.path();
    let cpu = session.backend_cpu()?;
    let (figure, count) = beside(&mut session, || clients(what, &path))?;
    let used = session.backend_cpu()?.saturating_sub(cpu).as_secs_f64() * 1e6;
    Ok((figure, used / count as f64))
}

/// The same of the relay.
fn relay(what: What) -> Result<(f64, f64), Failed> {
    let relay = Relay::start()?;
    let (path, cpu) = (relay.daemon.path(), relay.daemon.cpu_time()?);
    let (figure, count) = beside_guest(|enough| relay.answer(enough), || clients(what, &path))?;
    let used = relay.daemon.cpu_time()?.saturating_sub(cpu).as_secs_f64() * 1e6;
    Ok((figure, used / count as f64))
}

/// The figure, as clients find it, and of how many round trips or connections.
fn clients(what: What, path: &Path) -> Result<(f64, u64), Failed> {
    Ok(match what {
        What::ToHost(_) => (reads(&mut client(path, FLOOD)?)?, 1),
        What::ToGuest(size) => (writes(&mut client(path, SINK)?, size)?, 1),
        What::RoundTrip => round_trips(&mut client(path, ECHO)?)?,
        What::Connections => {
            let (begun, mut count) = (Instant::now(), 0u64);
            while begun.elapsed() < ROUND {
                drop(client(path, SINK)?);
                count += 1;
            }
            (count as f64 / begun.elapsed().as_secs_f64() / 1e3, count)
        }
    })
}

/// What a thread with clients finds, while the guest keeps up with them.
pub(crate) fn beside<T: Send>(
    session: &mut SocketSession<'_>,
    clients: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    beside_guest(|enough| Ok(session.run(enough)?), clients)
}

/// The same beside any guest: what keeps up until it is enough.
fn beside_guest<T: Send>(
    guest: impl FnOnce(&dyn Fn() -> bool) -> Result<(), Failed>,
    clients: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<T, Failed> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let result = pin_current_thread().map_err(Failed::from).and_then(|()| clients());
            done.store(true, Ordering::SeqCst);
            result
        });
        let served = guest(&|| done.load(Ordering::SeqCst));
        let result = clients.join().map_err(|_| "a client panicked")?;
        served?;
        result
    })
}

/// Two ends of a socket, without anything between them.
fn bare(what: What) -> Result<f64, Failed> {
    pin_current_thread()?;
    let (mut one, mut other) = UnixStream::pair()?;
    let dir = TempDir::new();
    Ok(match what {
        What::ToHost(size) | What::ToGuest(size) => std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let part = vec![0x5a; size as usize];
                while other.write_all(&part).is_ok() {}
            });
            let figure = reads(&mut one);
            drop(one);
            writer.join().map_err(|_| "a writer panicked")?;
            figure
        })?,
        What::RoundTrip => std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut part = [0; 64];
                while other.read_exact(&mut part).is_ok() && other.write_all(&part).is_ok() {}
            });
            let figure = round_trips(&mut one).map(|(figure, _)| figure);
            drop(one);
            figure
        })?,
        What::Connections => {
            let listener = UnixListener::bind(dir.join("s"))?;
            let (begun, mut count) = (Instant::now(), 0u64);
            while begun.elapsed() < ROUND {
                let client = UnixStream::connect(dir.join("s"))?;
                drop((listener.accept()?, client));
                count += 1;
            }
            count as f64 / begun.elapsed().as_secs_f64() / 1e3
        }
    })
}
