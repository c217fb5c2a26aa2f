//! `cargo xtask demo`: a Linux guest whose devices are served by our daemons, shown in a table.

use std::process::Command;
use std::time::{Duration, Instant};

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::Lab;
use backplane_tests::virtio::{self, Device};

use crate::command;
use crate::error::{Error, Result};
use crate::lab;
use crate::progress::{Step, clock};
use crate::workspace::Workspace;

const DAEMON: &str = "vhost-device-rng";
const QEMU_DEVICE: &str = "vhost-user-rng-pci";
/// Blocks of 20000 bits that rngtest looks at, and how many of them may look odd: a perfect source fails about one
/// in 1250, so that more than five in a thousand happen once in some hundred thousand demos.
const BLOCKS: u32 = 1000;
const ALLOWED: u32 = 5;
/// Bytes shown as they are.
const SAMPLE: usize = 16;

/// What the guest does; every loop in it ends by itself.
fn script() -> String {
    format!(
        "tell kernel $(uname -r)\n\
         tell source $(cat /sys/class/misc/hw_random/rng_current)\n\
         tell booted $(uptime_s)\n\
         tell sample $(timeout 20 head -c {SAMPLE} /dev/hwrng | hexdump -v -e '1/1 \"%02x \"')\n\
         timeout 120 rngtest -c {BLOCKS} </dev/hwrng 2>/tmp/rngtest\n\
         status=$?\n\
         tell tested $(uptime_s)\n\
         cat /tmp/rngtest\n\
         [ $status -le 1 ] || fail \"rngtest ended with $status\"\n\
         tell bits $(sed -n 's/.*bits received from input: //p' /tmp/rngtest)\n\
         tell good $(sed -n 's/.*FIPS 140-2 successes: //p' /tmp/rngtest)\n\
         tell bad $(sed -n 's/.*FIPS 140-2 failures: //p' /tmp/rngtest)\n"
    )
}

/// Runs it; whether the device did well.
pub(crate) fn run() -> Result<bool> {
    let begun = Instant::now();
    let lab = lab::ensure(&lab::Options::default())?;
    let workspace = Workspace::read()?;
    let programs = workspace.build(&[DAEMON.to_owned()])?;
    let mut step = Step::start("guest", "booting Linux and testing its /dev/hwrng");
    let mut daemon = Daemon::of(DAEMON, programs.join(DAEMON)).map_err(failed)?;
    daemon.start().map_err(failed)?;
    let ready = daemon.ready_after;
    let outcome = boot(&lab, &daemon, &mut step).map_err(|e| failed(e.with_log(DAEMON, &daemon.stderr())))?;
    let peak = daemon.peak_kib();
    let socket = daemon.socket();
    daemon.stop().map_err(failed)?;
    if socket.exists() {
        return Err(Error::new(format!("{DAEMON} left its socket behind"), socket.display().to_string()));
    }
    step.done("booted, tested and powered off");

    let found = outcome.devices().into_iter().find(|device| device.id == virtio::RNG);
    let device =
        found.ok_or_else(|| Error::new("the guest has no entropy device", "its kernel lists none"))?;
    let seen = Seen::read(&outcome)?;
    let qemu = command::output(Command::new(&lab.qemu).arg("--version"))?;
    let qemu = qemu.lines().next().and_then(|l| l.split("version ").nth(1)).unwrap_or("?").to_owned();
    let qemu = qemu.split(' ').next().unwrap_or("?").to_owned();
    println!("\nLinux {} under QEMU {qemu}, software emulation\n", seen.kernel);
    let daemon_state = format!(
        "{DAEMON}, listening after {:.1} ms{}",
        ready.as_secs_f64() * 1e3,
        peak.map_or(String::new(), |kib| format!(", at most {:.1} MiB resident", kib as f64 / 1024.0))
    );
    let good = seen.bad <= ALLOWED && seen.good + seen.bad == BLOCKS;
    print(&[
        ("device", "entropy (virtio type 4)".to_owned()),
        ("state", state(&device, &seen.source)),
        ("attached", format!("vhost-user: QEMU's {QEMU_DEVICE} on a Unix socket")),
        ("served by", daemon_state),
        ("features", device.feature_names().join(" ")),
        ("ring", if device.has(virtio::RING_PACKED) { "packed" } else { "split" }.to_owned()),
        ("bytes read", format!("{} from /dev/hwrng", grouped(seen.bits / 8 + SAMPLE as u64))),
        ("sample", seen.sample.clone()),
        (
            "rngtest",
            format!("{} of {BLOCKS} blocks passed, {} failed (at most {ALLOWED} may)", seen.good, seen.bad),
        ),
        (
            "time",
            format!(
                "boot {:.1} s, test {:.1} s ({:.0} kB/s), all {}",
                seen.booted,
                seen.testing,
                seen.bits as f64 / 8e3 / seen.testing.max(0.01),
                clock(begun.elapsed())
            ),
        ),
    ]);
    if !good {
        eprintln!("error: the guest's random bytes did not pass the test");
    }
    Ok(good)
}

fn boot(lab: &Lab, daemon: &Daemon, step: &mut Step) -> std::result::Result<Outcome, Failure> {
    let guest = Guest::new(lab)
        .vhost_user(QEMU_DEVICE, &daemon.socket())
        .limit(Duration::from_secs(200))
        .script(&script())
        .start()?;
    guest.wait_while(|| step.tick())?.success()
}

/// What the script told.
struct Seen {
    kernel: String,
    source: String,
    sample: String,
    bits: u64,
    good: u32,
    bad: u32,
    booted: f64,
    testing: f64,
}

impl Seen {
    fn read(outcome: &Outcome) -> Result<Self> {
        let told = |key: &str| outcome.told(key).unwrap_or_default().to_owned();
        fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T> {
            let why = || Error::new("cannot read the guest's report", format!("{name} is {text:?}"));
            text.parse().map_err(|_| why())
        }
        let booted: f64 = number("booted", &told("booted"))?;
        Ok(Self {
            kernel: told("kernel"),
            source: told("source"),
            sample: told("sample"),
            bits: number("bits", &told("bits"))?,
            good: number("good", &told("good"))?,
            bad: number("bad", &told("bad"))?,
            booted,
            testing: number::<f64>("tested", &told("tested"))? - booted,
        })
    }
}

fn state(device: &Device, source: &str) -> String {
    match device.status {
        virtio::RUNNING => {
            format!("running: {} of driver {}, /dev/hwrng is {source}", device.name, device.driver)
        }
        other => format!("not running: status {other:#x}, driver {:?}", device.driver),
    }
}

/// Names on the left, values on the right, between two rules.
fn print(rows: &[(&str, String)]) {
    let left = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let right = rows.iter().map(|(_, value)| value.chars().count()).max().unwrap_or(0);
    let rule = "-".repeat(left + right + 4);
    println!("{rule}");
    for (name, value) in rows {
        println!(" {name:left$}  {value}");
    }
    println!("{rule}");
}

/// 2500036 as "2 500 036".
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

fn failed(failure: Failure) -> Error {
    // Whoever pressed Ctrl-C does not want to read logs.
    if let Err(stopped) = command::stop_if_interrupted() {
        return stopped;
    }
    Error::new("the demo failed", failure.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_groups() {
        assert_eq!([grouped(0), grouped(999), grouped(2_500_036)], ["0", "999", "2 500 036"]);
    }
}
