//! Ten thousand connections: what a quiet one costs in memory, what one that is busy feels of the others, and whether
//! those that are busy at once get the same.
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio_testkit::TestRam;
use virtio_testkit::load::sockets::{ECHO, SINK, SocketSession};

use crate::daemon::{Daemon, client};
use crate::one::beside;
use crate::{Contender, Failed, Row, Table};

/// By which it is chosen.
pub(crate) const NAME: &str = "10000 connections";

const QUIET: usize = 10_000;
const BUSY: usize = 16;
const ROUND: Duration = Duration::from_millis(500);

const MEMORY: Row = Row::less("10000 connections: bytes of each", 0);
const OPENING: Row = Row::more("10000 connections: opened (1000/s)", 1);
const ROUND_TRIP: Row = Row::less("10000 connections: round trip (us)", 1);
const TO_GUEST: Row = Row::more("10000 connections: to guest 64 KiB (GB/s)", 2);
const FAIRNESS: Row = Row::more("10000 connections: least of 16 / mean", 2);

/// Once for each contender: thousands of connections are rounds enough.
pub(crate) fn round(contenders: &[Contender], table: &mut Table) -> Result<(), Failed> {
    // Both ends of each; a daemon inherits it.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    if maximum.is_some_and(|most| most < 2 * QUIET as u64) {
        println!("SKIP {NAME}: only {maximum:?} descriptors are allowed (ulimit -H -n)");
        return Ok(());
    }
    for (column, contender) in contenders.iter().enumerate() {
        if let Err(error) = measure(contender, column, table) {
            eprintln!("{}, {NAME}: {error}", contender.name);
        }
    }
    Ok(())
}

fn measure(contender: &Contender, column: usize, table: &mut Table) -> Result<(), Failed> {
    let daemon = Daemon::start(&contender.program)?;
    let ram = TestRam::new(&[(0, 64 << 20)]);
    let mut session = daemon.guest(&ram, contender.layout, 64)?;
    let path = daemon.path();
    let mut add = |row, figure| table.add(row, column, figure);

    let mut echo = beside(&mut session, || client(&path, ECHO))?;
    let before = session.resident_kib()?;
    let begun = Instant::now();
    let quiet =
        beside(&mut session, || (0..QUIET).map(|_| client(&path, SINK)).collect::<Result<Vec<_>, _>>())?;
    add(OPENING, QUIET as f64 / begun.elapsed().as_secs_f64() / 1e3);
    add(MEMORY, session.resident_kib()?.saturating_sub(before) as f64 * 1024.0 / QUIET as f64);

    add(ROUND_TRIP, beside(&mut session, || round_trip(&mut echo))?);
    let rates = busy(&mut session, quiet.get(..1).unwrap_or_default())?;
    add(TO_GUEST, rates.iter().sum());
    let rates = busy(&mut session, quiet.get(..BUSY).unwrap_or_default())?;
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    add(FAIRNESS, rates.iter().copied().fold(f64::INFINITY, f64::min) / mean);
    Ok(())
}

/// The median in microseconds.
fn round_trip(stream: &mut UnixStream) -> Result<f64, Failed> {
    let (begun, mut all, mut part) = (Instant::now(), Vec::new(), [0x5a; 64]);
    while begun.elapsed() < ROUND {
        let sent = Instant::now();
        stream.write_all(&part)?;
        stream.read_exact(&mut part)?;
        all.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    crate::median(all).ok_or_else(|| "no round trip".into())
}

/// GB/s of each, all of which are written to whenever they take something.
fn busy(session: &mut SocketSession<'_>, streams: &[UnixStream]) -> Result<Vec<f64>, Failed> {
    beside(session, || {
        let part = vec![0x5a; 64 << 10];
        let mut total = vec![0usize; streams.len()];
        streams.iter().try_for_each(|stream| stream.set_nonblocking(true))?;
        let begun = Instant::now();
        while begun.elapsed() < ROUND {
            let mut some = false;
            for (mut stream, total) in streams.iter().zip(&mut total) {
                match stream.write(&part) {
                    Ok(count) => (*total, some) = (*total + count, true),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if !some {
                let mut files: Vec<_> =
                    streams.iter().map(|file| PollFd::new(file, PollFlags::OUT)).collect();
                poll(&mut files, None)?;
            }
        }
        let time = begun.elapsed().as_secs_f64();
        Ok(total.into_iter().map(|bytes| bytes as f64 / time / 1e9).collect())
    })
}
