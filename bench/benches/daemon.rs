//! What a daemon costs beside its requests: time until it listens, resident memory with a guest attached, wake-ups when
//! idle. The figures of README.md, "Speed"; repeat them with `cargo xtask bench daemon`.
//!
//! The floor of the start is `/bin/true`, started and waited for in the same way.

use backplane_tests::daemon::Daemon;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

const ROUNDS: usize = 20;
const IDLE: Duration = Duration::from_secs(5);
const REQUESTS: usize = 1000;

type Failed = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match figures() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench daemon: {error}");
            ExitCode::FAILURE
        }
    }
}

fn figures() -> Result<(), Failed> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--package", "virtio-rng"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()?;
    if !built.success() {
        return Err("the daemon cannot be built".into());
    }

    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut daemon = Daemon::new("vhost-device-rng")?;
        daemon.start()?;
        ours.push(daemon.ready_after);
        daemon.stop()?;
        let began = Instant::now();
        Command::new("/bin/true").stdin(Stdio::null()).status()?;
        floor.push(began.elapsed());
    }
    println!("vhost-device-rng, medians of {ROUNDS} alternating rounds (smallest to largest)");
    println!("  listening after start      {}", spread(&mut ours));
    println!("  /bin/true, start to end    {}", spread(&mut floor));

    for layout in RingLayout::ALL {
        let mut daemon = Daemon::new("vhost-device-rng")?;
        daemon.start()?;
        let pid = daemon.id().ok_or("the daemon is gone")?;
        let mut driver = VhostUserDriver::connect(daemon.socket(), VhostUserOptions::new(layout))?;
        for _ in 0..REQUESTS {
            let buffer = driver.ram().writable(64);
            driver.ring(0).add(&[buffer]);
            driver.kick(0);
            driver.wait_used(0, Duration::from_secs(5)).ok_or("no answer")?;
            driver.ram().free(buffer.addr);
        }
        let resident = daemon.resident_kib().ok_or("no memory figures")?;
        // The last request's own traces settle first.
        std::thread::sleep(Duration::from_millis(100));
        let before = switches(pid)?;
        std::thread::sleep(IDLE);
        let wakes = switches(pid)?.saturating_sub(before);
        println!("with a guest attached ({layout:?} ring), after {REQUESTS} requests");
        println!("  resident memory            {:.1} MiB", resident as f64 / 1024.0);
        println!("  wake-ups in {} s idle       {wakes}", IDLE.as_secs());
        driver.stop()?;
        daemon.stop()?;
    }
    Ok(())
}

fn spread(times: &mut [Duration]) -> String {
    times.sort();
    let ms = |at: usize| times.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    format!("{:.1} ms ({:.1} to {:.1})", ms(times.len() / 2), ms(0), ms(times.len().saturating_sub(1)))
}

/// Times that any thread of the process went to sleep and was woken, or was moved aside.
fn switches(pid: u32) -> Result<u64, Failed> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        for line in status.lines().filter(|line| line.contains("ctxt_switches")) {
            sum += line.rsplit('\t').next().unwrap_or("0").trim().parse::<u64>()?;
        }
    }
    Ok(sum)
}
