//! The guest runner itself, with a device of QEMU's own: what every other guest test takes for granted.

use std::time::Duration;

use backplane_tests::failure::Failure;
use backplane_tests::guest::Guest;
use backplane_tests::{lab, virtio};
use serde_json::json;

#[test]
fn a_guest_boots_talks_and_ends() -> Result<(), Failure> {
    let Some(lab) = lab::require("a_guest_boots_talks_and_ends") else { return Ok(()) };
    let mut guest = Guest::new(&lab)
        .device("virtio-rng-pci")
        .script(
            "tell boot\nask name\necho got $answer\nask again\ntell echo $answer\nhead -c 100 /dev/hwrng | wc -c; exit 7\n",
        )
        .start()?;
    guest.wait_told("name", 1)?;
    guest.answer("a line of several words")?;
    guest.wait_told("again", 1)?;
    let status = guest.qmp("query-status", &json!({}))?;
    assert_eq!(status["status"], "running");
    guest.answer("the second")?;
    let outcome = guest.wait()?;
    assert_eq!(outcome.code, 7);
    assert_eq!(outcome.told("echo"), Some("the second"));
    assert!(outcome.console.contains("\ngot a line of several words\n"), "{}", outcome.console);
    assert!(outcome.console.contains("\n100\n"), "{}", outcome.console);
    let devices = outcome.devices();
    assert_eq!(devices.len(), 1);
    assert_eq!((devices[0].id, devices[0].driver.as_str()), (virtio::RNG, "virtio_rng"));
    assert_eq!(devices[0].status, virtio::RUNNING);
    assert!(devices[0].has(virtio::VERSION_1));
    assert!(outcome.success().is_err());
    Ok(())
}

#[test]
fn a_guest_reboots_inside_one_qemu() -> Result<(), Failure> {
    let Some(lab) = lab::require("a_guest_reboots_inside_one_qemu") else { return Ok(()) };
    let mut guest = Guest::new(&lab)
        .reboots()
        .script("ask up\n[ \"$answer\" = again ] && { reboot -f; sleep 100; }\nexit 0\n")
        .start()?;
    guest.wait_told("up", 1)?;
    guest.answer("again")?;
    guest.wait_told("up", 2)?;
    guest.answer("enough")?;
    guest.wait()?.success()?;
    Ok(())
}

#[test]
fn the_guests_tools_can_run() -> Result<(), Failure> {
    let Some(lab) = lab::require("the_guests_tools_can_run") else { return Ok(()) };
    // The shell answers 127 for a program that is not there, and the loader for a library that is not.
    let script = "for p in rngtest fio mkfs.ext4 lsblk socat iperf3 i2cdetect gpiodetect candump cansend aplay amixer \
                  sg_inq sg_raw spi-config evtest modetest phc_ctl ethtool ping vsock dd ip\n\
                  do $p --help </dev/null >/tmp/out 2>&1; c=$?\n\
                  if [ $c = 127 ] || [ $c = 126 ]; then tail -n 2 /tmp/out; fail \"$p: $c\"; fi; done\n";
    Guest::new(&lab).archive(&lab.fio).script(script).run()?.success()?;
    Ok(())
}

#[test]
fn a_guest_that_hangs_is_ended_and_shown() -> Result<(), Failure> {
    let Some(lab) = lab::require("a_guest_that_hangs_is_ended_and_shown") else { return Ok(()) };
    let mut guest = Guest::new(&lab).script("tell now it hangs\nsleep 1000\n").start()?;
    let path = format!("/proc/{}", guest.id());
    guest.wait_told("now", 1)?;
    guest.limit(Duration::from_secs(1));
    let reason = guest.wait().expect_err("it never ends").to_string();
    assert!(reason.contains("after 1 s"), "{reason}");
    assert!(reason.contains("now it hangs"), "{reason}");
    assert!(!std::fs::exists(path).expect("proc"), "QEMU was left behind");
    Ok(())
}
