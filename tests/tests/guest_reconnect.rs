//! QEMU's own `reconnect`: the daemon is killed under a running guest and started again, and QEMU comes back to it by
//! itself. QEMU 11.1 can do that for its block device, not for its entropy device (see `backplane_tests::relay`).

use std::path::PathBuf;
use std::time::Duration;

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;

#[test]
fn qemu_reconnects_to_a_daemon_that_was_killed_and_started_again() -> Result<(), Failure> {
    let Some(lab) = lab::require("qemu_reconnects_to_a_daemon_that_was_killed_and_started_again") else {
        return Ok(());
    };
    let program = PathBuf::from(env!("CARGO_BIN_EXE_test-disk"));
    let mut daemon = Daemon::of("test-disk", program)?;
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
		( while [ ! -e /tmp/stop ]; do [ \"$(disk | md5sum)\" = \"$sum\" ] && echo good || echo bad; done >/tmp/rounds ) &
		for round in 1 2 3; do
			ask kill
			before=$(wc -l </tmp/rounds)
			n=0; while [ $(wc -l </tmp/rounds) -lt $((before + 3)) ]; do
				n=$((n + 1)); [ $n -lt 200 ] || fail \"round $round: the reader hangs\"; sleep 0.1; done
		done
		touch /tmp/stop; wait
		grep -q bad /tmp/rounds && fail \"contents after a restart\"
		tell rounds $(wc -l </tmp/rounds)
	";
    let chardev = format!("socket,id=disk,path={},reconnect-ms=100", daemon.socket().display());
    let mut guest = Guest::new(&lab)
        .args(["-chardev", &chardev])
        .device("vhost-user-blk-pci,chardev=disk,num-queues=1")
        .script(text)
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
    daemon.stop()?;
    Ok(())
}
