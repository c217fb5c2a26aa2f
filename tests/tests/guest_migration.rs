//! QEMU migrates a running guest from one QEMU to another on the same machine, while the guest reads through our daemon
//! host: the daemon marks what it writes in QEMU's log, or the guest finds old bytes at its destination.
//!
//! With the test-only disk, for QEMU 11.1 calls its `vhost-user-rng` unmigratable, whatever the back-end can do. A guest
//! that reads `/dev/hwrng` is migrated as one with passed-through devices is: the device is unplugged for the move.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::{self, Lab};
use backplane_tests::running::Running;
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio;
use serde_json::json;

/// The disk is read into the page cache over and over, by the device itself, and is then looked at without being read
/// again: what the log lacked would be old there.
const SCRIPT: &str = "
	sum=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum)
	again() { echo 1 >/proc/sys/vm/drop_caches; [ \"$(cat /dev/vda | md5sum)\" = \"$sum\" ] && echo good || echo bad; }
	( while [ ! -e /tmp/stop ]; do again; done >/tmp/rounds ) &
	n=0; while [ $(wc -l </tmp/rounds) -lt 3 ]; do n=$((n + 1)); [ $n -lt 600 ] || fail 'no rounds'; sleep 0.1; done
	ask move
	[ \"$(cat /dev/vda | md5sum)\" = \"$sum\" ] || fail 'what was read before is not what was there'
	before=$(wc -l </tmp/rounds)
	n=0; while [ $(wc -l </tmp/rounds) -lt $((before + 3)) ]; do
		n=$((n + 1)); [ $n -lt 900 ] || fail 'the reader hangs at the destination'; sleep 0.1; done
	touch /tmp/stop; wait
	grep -q bad /tmp/rounds && fail 'bad contents'
	tell rounds $before $(wc -l </tmp/rounds)
	virtio_devices
";

fn guest(lab: &Lab, daemon: &Daemon, number: usize, packed: bool) -> Guest {
    let layout = if packed { "on" } else { "off" };
    let chardev = format!("socket,id=disk,path={}", daemon.socket_of(number).display());
    Guest::new(lab)
        .memory_mib(256)
        .args(["-chardev", &chardev])
        .device(&format!("vhost-user-blk-pci,chardev=disk,num-queues=1,packed={layout}"))
        .script(SCRIPT)
        .limit(Duration::from_secs(300))
}

/// Migrates to who listens there.
fn move_it(source: &mut Running, uri: &str) -> Result<(), Failure> {
    // So that it takes a while, and the guest goes on meanwhile.
    source.qmp("migrate-set-parameters", &json!({ "max-bandwidth": 24 << 20 }))?;
    source.qmp("migrate", &json!({ "uri": uri }))?;
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let state = source.qmp("query-migrate", &json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(Failure::new(format!("the migration failed: {state}")));
            }
            _ if Instant::now() > deadline => return Err(Failure::new(format!("not migrated: {state}"))),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Reads while it is moved, with this layout of rings.
fn migrate(test: &str, packed: bool) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let program = PathBuf::from(env!("CARGO_BIN_EXE_test-disk"));
    let mut daemon = Daemon::of("test-disk", program)?.args(["--socket-count", "2", "--log-level", "debug"]);
    daemon.start()?;
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let uri = format!("unix:{}", scratch.join("migration").display());
    let mut source = guest(&lab, &daemon, 0, packed).start()?;
    let mut destination = guest(&lab, &daemon, 1, packed).args(["-incoming", &uri]).start()?;
    source.wait_told("move", 1).map_err(|e| e.with_log("test-disk", &daemon.stderr()))?;
    move_it(&mut source, &uri).map_err(|e| e.with_log("test-disk", &daemon.stderr()))?;
    drop(source);
    destination.answer("moved")?;
    let outcome = destination
        .wait()
        .and_then(Outcome::success)
        .map_err(|e| e.with_log("test-disk", &daemon.stderr()))?;
    daemon.check()?;
    assert!(outcome.told("rounds").is_some());
    let devices = outcome.devices();
    assert!(devices.iter().all(|device| device.has(virtio::RING_PACKED) == packed), "{devices:?}");
    assert_eq!(devices.len(), 1);
    assert!(daemon.stderr().contains("SetLogBase"), "the log was used");
    daemon.stop()?;
    Ok(())
}

#[test]
fn migration_of_a_guest_that_reads_split() -> Result<(), Failure> {
    migrate("migration_of_a_guest_that_reads_split", false)
}

#[test]
fn migration_of_a_guest_that_reads_packed() -> Result<(), Failure> {
    migrate("migration_of_a_guest_that_reads_packed", true)
}

/// One reader reads all the time. Without a device it is told so and tries again; nothing it gets is ever a repetition.
const HWRNG: &str = "
	( while [ ! -e /tmp/stop ]; do
		dd if=/dev/hwrng bs=64 count=1 2>/dev/null | hexdump -v -e '64/1 \"%02x\" \"\\n\"' >>/tmp/read || true
	done ) &
	reader=$!
	enough() {
		n=0; while [ $(wc -l </tmp/read) -lt $((${1:-0} + 20)) ]; do
			n=$((n + 1)); [ $n -lt 600 ] || fail \"the reader hangs $2\"; sleep 0.1; done
	}
	enough 0 'at the source'
	ask move
	kill -0 $reader || fail 'the reader was lost on the way'
	enough $(wc -l </tmp/read) 'at the destination'
	touch /tmp/stop; wait
	[ -z \"$(sort /tmp/read | uniq -d)\" ] || fail 'read twice'
	tell read $(wc -l </tmp/read)
	virtio_devices
";

#[test]
fn migration_of_a_guest_that_reads_hwrng() -> Result<(), Failure> {
    let Some(lab) = lab::require("migration_of_a_guest_that_reads_hwrng") else { return Ok(()) };
    let mut daemon = Daemon::new("vhost-device-rng")?.args(["--socket-count", "2"]);
    daemon.start()?;
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let uri = format!("unix:{}", scratch.join("migration").display());
    let guest = |number: usize| {
        let chardev = format!("socket,id=entropy,path={}", daemon.socket_of(number).display());
        Guest::new(&lab)
            .memory_mib(256)
            .args(["-chardev", &chardev])
            .device("pcie-root-port,id=root,chassis=1,slot=1")
            .script(HWRNG)
            .limit(Duration::from_secs(300))
    };
    let rng = json!({ "driver": "vhost-user-rng-pci", "id": "rng", "chardev": "entropy", "bus": "root" });
    let mut source = guest(0).device("vhost-user-rng-pci,id=rng,chardev=entropy,bus=root").start()?;
    let mut destination = guest(1).args(["-incoming", &uri]).start()?;
    source.wait_told("move", 1).map_err(|e| e.with_log("vhost-device-rng", &daemon.stderr()))?;
    source.qmp("device_del", &json!({ "id": "rng" }))?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while source
        .qmp("qom-list", &json!({ "path": "/machine/peripheral" }))?
        .as_array()
        .is_some_and(|there| there.iter().any(|one| one["name"] == "rng"))
    {
        if Instant::now() > deadline {
            return Err(Failure::new("the guest does not let go of its device".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    move_it(&mut source, &uri)?;
    drop(source);
    destination.qmp("device_add", &rng)?;
    destination.answer("moved")?;
    let outcome = destination
        .wait()
        .and_then(Outcome::success)
        .map_err(|e| e.with_log("vhost-device-rng", &daemon.stderr()))?;
    daemon.check()?;
    assert!(outcome.told("read").is_some());
    assert_eq!(outcome.devices().len(), 1);
    daemon.stop()?;
    Ok(())
}
