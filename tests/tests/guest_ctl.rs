//! `vhost-ctl` watches two Linux guests that read from one `vhost-device-rng`.

use std::process::{Command, Stdio};

use backplane_tests::daemon::{Daemon, find};
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;
use backplane_tests::scratch::Scratch;

const SCRIPT: &str = "
cat /dev/hwrng >/dev/null &
ask reading
kill $!
";

#[test]
fn ctl_top_shows_what_two_guests_do() -> Result<(), Failure> {
    let Some(lab) = lab::require("ctl_top_shows_what_two_guests_do") else { return Ok(()) };
    let program = find("vhost-ctl")?;
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let control = scratch.join("rng.ctl");
    let arguments = ["--socket-count".into(), "2".into(), "--control-socket".into(), control.clone()];
    let mut daemon = Daemon::new("vhost-device-rng")?.args(arguments);
    daemon.start()?;
    let start = |number| {
        let guest = Guest::new(&lab).cpus(1).vhost_user("vhost-user-rng-pci", &daemon.socket_of(number));
        guest.script(SCRIPT).start()
    };
    let mut guests = [start(0)?, start(1)?];
    for guest in &mut guests {
        guest.wait_told("reading", 1)?;
    }
    let top = Command::new(program)
        .arg("--socket")
        .arg(&control)
        .args(["top", "--count", "2"])
        .stdin(Stdio::null())
        .output()
        .map_err(Failure::io("run vhost-ctl"))?;
    let text = String::from_utf8_lossy(&top.stdout);
    print!("{text}");
    assert!(top.status.success(), "{}", String::from_utf8_lossy(&top.stderr));
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.contains("requestq"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows.len(), 4, "two tables of two guests");
    for row in rows {
        // Guest, state, queue and its name, requests a second.
        assert!(
            matches!(row.as_slice(), [_, "connected", "0", "requestq", rate, ..] if *rate != "0"),
            "{row:?}"
        );
    }
    for mut guest in guests {
        guest.answer("enough")?;
        guest.wait().and_then(Outcome::success)?;
    }
    daemon.stop()?;
    Ok(())
}
