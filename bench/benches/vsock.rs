//! The socket daemon beside rust-vmm's and beside Unix sockets themselves: throughput, round trips, connections.
//!
//! `cargo xtask bench vsock`. The guest is a driver in this process ([`SocketSession`]), clients are threads of it; all of them
//! and the daemon are on one CPU (*same*), so a figure is the sum of all software paths. Contenders take turns; the median
//! of the rounds counts.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::sockets::{ECHO, FLOOD, SINK, SocketSession};
use virtio_testkit::load::{Placement, Target, pin_current_thread};
use virtio_testkit::{RingLayout, TestRam};

type Failed = Box<dyn std::error::Error + Send + Sync>;

const ROUND: Duration = Duration::from_millis(200);
const ROUNDS: usize = 6;
const SIZES: [u32; 2] = [4096, 65536];

/// Ends with its owner.
struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(program: &Path) -> Result<Daemon, Failed> {
        let dir = TempDir::new();
        let child = Command::new(program)
            .args(["--guest-cid", "3", "--socket"])
            .arg(dir.join("vhost"))
            .arg("--uds-path")
            .arg(dir.join("vm"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let daemon = Daemon { child, dir };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !daemon.dir.join("vhost").exists() || !daemon.dir.join("vm").exists() {
            if Instant::now() > deadline {
                return Err(format!("{} does not listen", program.display()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }
}

/// A client with the guest's consent.
fn client(path: &Path, port: u32) -> Result<UnixStream, Failed> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = [0; 32];
    let mut have = 0;
    while have == 0 || line[have - 1] != b'\n' {
        match stream.read(&mut line[have..have + 1])? {
            0 => return Err("no OK".into()),
            n => have += n,
        }
    }
    Ok(stream)
}

/// The four things that are measured; bytes or counts in a second, or microseconds.
#[derive(Clone, Copy, Debug)]
enum What {
    ToHost(u32),
    ToGuest(u32),
    RoundTrip,
    Connections,
}

const ALL: [What; 6] = [
    What::ToHost(SIZES[0]),
    What::ToHost(SIZES[1]),
    What::ToGuest(SIZES[0]),
    What::ToGuest(SIZES[1]),
    What::RoundTrip,
    What::Connections,
];

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

/// The median.
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

/// A figure, and microseconds of the daemon for each round trip or connection.
type Figure = (f64, f64);

fn measure(what: What, daemon: &Daemon, session: &mut SocketSession<'_>) -> Result<Figure, Failed> {
    session.pin()?;
    let (path, done) = (daemon.dir.join("vm"), AtomicBool::new(false));
    let cpu = session.backend_cpu()?;
    let (figure, count) = std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let run = || -> Result<(f64, u64), Failed> {
                pin_current_thread()?;
                Ok(match what {
                    What::ToHost(_) => (reads(&mut client(&path, FLOOD)?)?, 1),
                    What::ToGuest(size) => (writes(&mut client(&path, SINK)?, size)?, 1),
                    What::RoundTrip => round_trips(&mut client(&path, ECHO)?)?,
                    What::Connections => {
                        let (begun, mut count) = (Instant::now(), 0u64);
                        while begun.elapsed() < ROUND {
                            drop(client(&path, SINK)?);
                            count += 1;
                        }
                        (count as f64 / begun.elapsed().as_secs_f64() / 1e3, count)
                    }
                })
            };
            let result = run();
            done.store(true, Ordering::SeqCst);
            result
        });
        let served = session.run(|| done.load(Ordering::SeqCst));
        let result = clients.join().map_err(|_| "a client panicked")?;
        served?;
        result
    })?;
    let used = session.backend_cpu()?.saturating_sub(cpu).as_secs_f64() * 1e6;
    // What is left of the last connection.
    let settled = Instant::now();
    session.run(|| settled.elapsed() > Duration::from_millis(30))?;
    Ok((figure, used / count as f64))
}

/// Two ends of a socket, without anything between them.
fn bare(what: What) -> Result<Figure, Failed> {
    pin_current_thread()?;
    let (mut one, mut other) = UnixStream::pair()?;
    let dir = TempDir::new();
    let figure = match what {
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
            let listener = std::os::unix::net::UnixListener::bind(dir.join("s"))?;
            let (begun, mut count) = (Instant::now(), 0u64);
            while begun.elapsed() < ROUND {
                let client = UnixStream::connect(dir.join("s"))?;
                drop((listener.accept()?, client));
                count += 1;
            }
            count as f64 / begun.elapsed().as_secs_f64() / 1e3
        }
    };
    Ok((figure, 0.0))
}

fn median(mut all: Vec<Figure>) -> Option<Figure> {
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all.get(all.len() / 2).copied()
}

fn contenders() -> Vec<(String, PathBuf, RingLayout)> {
    let mut found = Vec::new();
    for word in std::env::args().skip(1) {
        let Some((name, program)) = word.split_once('=') else { continue };
        let program = PathBuf::from(program);
        found.push((name.to_owned(), program.clone(), RingLayout::Split));
        if name == "ours" {
            found.push(("ours, packed".to_owned(), program, RingLayout::Packed));
        }
    }
    found
}

fn figures() -> Result<(), Failed> {
    let all = contenders();
    println!(
        "same CPU, medians of {ROUNDS} rounds of {} ms, in turns; GB/s, us (daemon's us), thousands/s (daemon's us)",
        ROUND.as_millis()
    );
    println!(
        "{:24} {:>12} {:>12} {:>12} {:>12} {:>16} {:>18}",
        "", "to host 4K", "64K", "to guest 4K", "64K", "64 B round trip", "connections"
    );
    let mut table = vec![vec![Vec::new(); ALL.len()]; all.len() + 1];
    for _ in 0..ROUNDS {
        for (row, (name, program, layout)) in all.iter().enumerate() {
            for (at, what) in ALL.into_iter().enumerate() {
                let payload = if let What::ToHost(size) = what { size } else { 64 };
                let daemon = Daemon::start(program)?;
                let ram = TestRam::new(&[(0, 64 << 20)]);
                let target = Target::Path(daemon.dir.join("vhost"));
                let figure = SocketSession::open(target, &ram, *layout, payload, Placement::Same)
                    .map_err(Failed::from)
                    .and_then(|mut session| measure(what, &daemon, &mut session));
                match figure {
                    Ok(figure) => table[row][at].push(figure),
                    Err(error) => eprintln!("{name}, {what:?}: {error}"),
                }
            }
        }
        for (at, what) in ALL.into_iter().enumerate() {
            table[all.len()][at].push(bare(what)?);
        }
    }
    let names = all.iter().map(|(name, ..)| name.clone()).chain(["AF_UNIX itself".to_owned()]);
    for (name, row) in names.zip(table) {
        print!("{name:24}");
        for (at, cell) in row.into_iter().enumerate() {
            let width = [12, 12, 12, 12, 16, 18][at];
            let text = match median(cell) {
                None => "failed".to_owned(),
                Some((figure, _)) if at < 4 => format!("{figure:.2}"),
                Some((figure, used)) => format!("{figure:.1} ({used:.1})"),
            };
            print!(" {text:>width$}");
        }
        println!();
    }
    Ok(())
}

fn main() -> ExitCode {
    match figures() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench vsock: {error}");
            ExitCode::FAILURE
        }
    }
}
