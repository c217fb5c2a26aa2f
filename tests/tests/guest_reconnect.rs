//! QEMU's own `reconnect`: the daemon is killed under a running guest and started again, and QEMU comes back to it by
//! itself. QEMU 11.1 can do that for its block device, not for its entropy device (see `backplane_tests::relay`). It hands
//! over what was in flight, from which the daemon knows where the ring goes on: of a packed ring QEMU itself does not.

use std::path::PathBuf;
use std::time::Duration;

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;

#[test]
fn qemu_reconnects_to_a_daemon_that_was_killed_and_started_again() -> Result<(), Failure> {
    killed_under_a_reading_guest("qemu_reconnects_to_a_daemon_that_was_killed_and_started_again", "off")
}

#[test]
fn qemu_reconnects_with_a_packed_ring() -> Result<(), Failure> {
    killed_under_a_reading_guest("qemu_reconnects_with_a_packed_ring", "on")
}

fn killed_under_a_reading_guest(test: &str, packed: &str) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let program = PathBuf::from(env!("CARGO_BIN_EXE_test-disk"));
    let mut daemon = Daemon::of("test-disk", program)?.args(["--log-level", "debug"]);
    daemon.start()?;
    // The whole disk has to read as the daemon makes it: 512 bytes of 0, of 1, ... A request that was lost with the
    // daemon would leave the reader hanging; it is one process all the time.
    let text = "
		n=0; while [ $n -lt 2048 ]; do printf \"\\\\$(printf %03o $((n % 256)))\"; n=$((n + 1)); done >/tmp/bytes
		[ $(cat /sys/block/vda/size) = 2048 ] || fail \"size $(cat /sys/block/vda/size)\"
		disk() { dd if=/dev/vda bs=64k iflag=direct 2>/dev/null; }
		disk | hexdump -v -e '512/1 \"%02x\" \"\\n\"' | cut -c 1-2 >/tmp/first
		hexdump -v -e '1/1 \"%02x\\n\"' /tmp/bytes | cmp - /tmp/first || fail contents
		sum=$(disk | md5sum)
		tell sum $sum
		reader() { while [ ! -e /tmp/stop ]; do [ \"$(disk | md5sum)\" = \"$sum\" ] && echo good || echo bad; done; }
		for reader in 1 2; do reader >/tmp/rounds$reader & done
		for round in 1 2 3; do
			ask kill
			for reader in 1 2; do
				before=$(wc -l </tmp/rounds$reader)
				n=0; while [ $(wc -l </tmp/rounds$reader) -lt $((before + 1)) ]; do
					n=$((n + 1)); [ $n -lt 900 ] || fail \"round $round: reader $reader hangs\"; sleep 0.1; done
			done
		done
		touch /tmp/stop; wait
		grep -q bad /tmp/rounds? && fail \"contents after a restart\"
		tell rounds $(cat /tmp/rounds? | wc -l)
	";
    let chardev = format!("socket,id=disk,path={},reconnect-ms=100", daemon.socket().display());
    let mut guest = Guest::new(&lab)
        .args(["-chardev", &chardev])
        .device(&format!("vhost-user-blk-pci,chardev=disk,num-queues=1,packed={packed}"))
        .script(text)
        .limit(Duration::from_secs(300))
        .start()?;
    for round in 1..=3 {
        guest.wait_told("kill", round).map_err(|e| e.with_log("test-disk", &daemon.stderr()))?;
        daemon.kill()?;
        // Long enough for the guest to ask the dead daemon.
        std::thread::sleep(Duration::from_millis(200));
        daemon.start()?;
        guest.answer("again")?;
    }
    let outcome =
        guest.wait().and_then(Outcome::success).map_err(|e| e.with_log("test-disk", &daemon.stderr()))?;
    daemon.check()?;
    assert!(outcome.told("sum").is_some());
    // Each daemon got the buffer, and the first one made it.
    let count = |message: &str| daemon.stderr().matches(message).count();
    assert!(count("SetInflightFd") >= 4, "{}", daemon.stderr());
    assert!(count("GetInflightFd") < count("SetInflightFd"), "{}", daemon.stderr());
    daemon.stop()?;
    Ok(())
}
