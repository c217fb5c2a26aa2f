//! Linux reads entropy from `vhost-device-rng`: every ring layout, and what happens to guests and daemons in life.

use std::time::Duration;

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::{self, Lab};
use backplane_tests::relay::Relay;
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio::{self, Device};
use serde_json::json;

const DAEMON: &str = "vhost-device-rng";
const DEVICE: &str = "vhost-user-rng-pci";

/// Functions of every script here. `check N` reads bytes that have to differ, and lets rngtest look at N blocks of
/// 20000 bits. It takes one odd block in ten for granted, far more than a good source ever gives and far fewer than
/// a broken one.
const FUNCTIONS: &str = "
check() {
	[ \"$(cat /sys/class/misc/hw_random/rng_current)\" = virtio_rng.0 ] || fail \"no virtio_rng\"
	a=$(timeout 60 head -c 32 /dev/hwrng | hexdump -v -e '1/1 \"%02x\"')
	[ ${#a} = 64 ] || fail \"32 bytes from /dev/hwrng: '$a'\"
	b=$(timeout 60 head -c 32 /dev/hwrng | hexdump -v -e '1/1 \"%02x\"')
	[ ${#b} = 64 ] && [ $a != $b ] || fail \"the next 32 bytes: '$b' after '$a'\"
	timeout 120 rngtest -c $1 </dev/hwrng 2>/tmp/rngtest
	[ $? -le 1 ] || fail \"rngtest: $(tail -n 1 /tmp/rngtest)\"
	good=$(sed -n 's/.*successes: //p' /tmp/rngtest)
	[ $good -ge $(($1 * 9 / 10)) ] || fail \"rngtest: $good of $1\"
	tell good $good
}
";

fn script(text: &str) -> String {
    format!("{FUNCTIONS}{text}")
}

fn daemon(arguments: &[&str]) -> Result<Daemon, Failure> {
    let mut daemon = Daemon::new(DAEMON)?.args(arguments);
    daemon.start()?;
    Ok(daemon)
}

/// The guest's end, with the daemon's words if the guest failed; the daemon has to have lived through it.
fn succeed(outcome: Result<Outcome, Failure>, daemon: &mut Daemon) -> Result<Outcome, Failure> {
    let outcome = outcome.and_then(Outcome::success).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
    daemon.check()?;
    Ok(outcome)
}

fn device(outcome: &Outcome) -> Device {
    let device =
        outcome.devices().into_iter().find(|device| device.id == virtio::RNG).expect("an entropy device");
    assert_eq!((device.driver.as_str(), device.status), ("virtio_rng", virtio::RUNNING));
    assert!(device.has(virtio::VERSION_1));
    device
}

/// Boots with a daemon that withholds features, checks the bytes, and gives the features that were negotiated.
fn negotiated(test: &str, without: &[&str]) -> Result<Option<Device>, Failure> {
    let Some(lab) = lab::require(test) else { return Ok(None) };
    let withheld = without.join(",");
    let arguments = ["--without", &withheld];
    let mut daemon = daemon(if without.is_empty() { &[] } else { &arguments })?;
    let guest = Guest::new(&lab).vhost_user(DEVICE, &daemon.socket()).script(&script("check 20\n"));
    let outcome = succeed(guest.run(), &mut daemon)?;
    daemon.stop()?;
    Ok(Some(device(&outcome)))
}

#[test]
fn rng_split() -> Result<(), Failure> {
    let Some(device) = negotiated("rng_split", &["ring_packed"])? else { return Ok(()) };
    assert!(!device.has(virtio::RING_PACKED), "{:?}", device.feature_names());
    assert!(
        device.has(virtio::INDIRECT_DESC) && device.has(virtio::EVENT_IDX),
        "{:?}",
        device.feature_names()
    );
    Ok(())
}

#[test]
fn rng_packed() -> Result<(), Failure> {
    let Some(device) = negotiated("rng_packed", &[])? else { return Ok(()) };
    assert!(device.has(virtio::RING_PACKED), "{:?}", device.feature_names());
    Ok(())
}

#[test]
fn rng_without_indirect() -> Result<(), Failure> {
    let Some(device) = negotiated("rng_without_indirect", &["indirect_desc", "ring_packed"])? else {
        return Ok(());
    };
    assert!(
        !device.has(virtio::INDIRECT_DESC) && device.has(virtio::EVENT_IDX),
        "{:?}",
        device.feature_names()
    );
    Ok(())
}

#[test]
fn rng_without_event_index() -> Result<(), Failure> {
    let Some(device) = negotiated("rng_without_event_index", &["event_idx"])? else { return Ok(()) };
    assert!(
        !device.has(virtio::EVENT_IDX) && device.has(virtio::INDIRECT_DESC),
        "{:?}",
        device.feature_names()
    );
    Ok(())
}

#[test]
fn rng_split_without_event_index() -> Result<(), Failure> {
    let without = ["event_idx", "ring_packed", "in_order"];
    let Some(device) = negotiated("rng_split_without_event_index", &without)? else { return Ok(()) };
    for bit in [virtio::EVENT_IDX, virtio::RING_PACKED, virtio::IN_ORDER] {
        assert!(!device.has(bit), "{:?}", device.feature_names());
    }
    Ok(())
}

#[test]
fn rng_two_guests_on_one_daemon() -> Result<(), Failure> {
    two_guests("rng_two_guests_on_one_daemon", &["--socket-count", "2"])
}

/// One thread carries both devices.
#[test]
fn rng_two_guests_on_one_thread() -> Result<(), Failure> {
    two_guests("rng_two_guests_on_one_thread", &["--socket-count", "2", "--threads", "1"])
}

fn two_guests(test: &str, arguments: &[&str]) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let mut daemon = daemon(arguments)?;
    let text = script("ask ready\ncheck 20\nask done\n");
    let start =
        |number| Guest::new(&lab).cpus(1).vhost_user(DEVICE, &daemon.socket_of(number)).script(&text).start();
    let mut guests = [start(0)?, start(1)?];
    // Both read at the same time; then one leaves, and the other goes on.
    for guest in &mut guests {
        guest.wait_told("ready", 1)?;
    }
    for guest in &mut guests {
        guest.answer("go")?;
    }
    for guest in &mut guests {
        guest.wait_told("done", 1)?;
    }
    for mut guest in guests {
        guest.answer("end")?;
        let outcome = succeed(guest.wait(), &mut daemon)?;
        device(&outcome);
    }
    daemon.stop()?;
    Ok(())
}

#[test]
fn rng_guest_reboot() -> Result<(), Failure> {
    let Some(lab) = lab::require("rng_guest_reboot") else { return Ok(()) };
    let mut daemon = daemon(&[])?;
    // The guest goes down with a read under way, which nobody will ever take the answer of.
    let text = script(
        "check 10\nask up\nif [ \"$answer\" = again ]; then cat /dev/hwrng >/dev/null & sleep 0.2; reboot -f; sleep 100; fi\n",
    );
    let mut guest = Guest::new(&lab).reboots().vhost_user(DEVICE, &daemon.socket()).script(&text).start()?;
    for (boot, order) in [(1, "again"), (2, "again"), (3, "enough")] {
        guest.wait_told("up", boot).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
        guest.answer(order)?;
    }
    let outcome = succeed(guest.wait(), &mut daemon)?;
    device(&outcome);
    daemon.stop()?;
    Ok(())
}

#[test]
fn rng_driver_unbind_and_bind() -> Result<(), Failure> {
    let Some(lab) = lab::require("rng_driver_unbind_and_bind") else { return Ok(()) };
    let mut daemon = daemon(&[])?;
    let text = script(
        "check 10\n\
         for round in 1 2 3; do\n\
           echo virtio0 >/sys/bus/virtio/drivers/virtio_rng/unbind || fail unbind\n\
           [ \"$(cat /sys/class/misc/hw_random/rng_current)\" = virtio_rng.0 ] && fail still there\n\
           echo virtio0 >/sys/bus/virtio/drivers/virtio_rng/bind || fail bind\n\
           now=$(cat /sys/class/misc/hw_random/rng_current)\n\
           case $now in virtio_rng.*) ;; *) fail \"after binding: $now\";; esac\n\
           timeout 60 head -c 1000 /dev/hwrng | wc -c | grep -qx 1000 || fail \"no bytes in round $round\"\n\
         done\n\
         virtio_devices\n",
    );
    let guest = Guest::new(&lab).vhost_user(DEVICE, &daemon.socket()).script(&text);
    let outcome = succeed(guest.run(), &mut daemon)?;
    device(&outcome);
    daemon.stop()?;
    Ok(())
}

/// Kills the daemon three times while the guest reads, and starts it again; a request is outstanding all the time.
fn killed(lab: &Lab, arguments: &[&str]) -> Result<Outcome, Failure> {
    let mut daemon = daemon(arguments)?;
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let relay = Relay::start(&scratch.join("relay.sock"), &daemon.socket())?;
    // One reader for all the time: a request that the dead daemon had taken and not answered would leave it hanging.
    let text = script(
        "check 10\n\
         cat /dev/hwrng >/tmp/bytes &\n\
         reader=$!\n\
         for round in 1 2 3; do\n\
           ask kill\n\
           before=$(stat -c %s /tmp/bytes)\n\
           n=0; while [ $(stat -c %s /tmp/bytes) -lt $((before + 10000)) ]; do\n\
             n=$((n + 1)); [ $n -lt 600 ] || fail \"round $round: the reader hangs at $before bytes\"; sleep 0.1; done\n\
         done\n\
         kill $reader\n\
         check 10\n",
    );
    let mut guest = Guest::new(lab).vhost_user(DEVICE, relay.socket()).script(&text).start()?;
    for round in 1..=3 {
        guest.wait_told("kill", round).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
        daemon.kill()?;
        // Long enough for the guest to ask the dead daemon.
        std::thread::sleep(Duration::from_millis(200));
        daemon.start()?;
        guest.answer("again")?;
    }
    let outcome = succeed(guest.wait(), &mut daemon)?;
    assert_eq!(relay.reconnects(), 3);
    daemon.stop()?;
    Ok(outcome)
}

#[test]
fn rng_daemon_killed_and_started_again_packed() -> Result<(), Failure> {
    let Some(lab) = lab::require("rng_daemon_killed_and_started_again_packed") else { return Ok(()) };
    let outcome = killed(&lab, &[])?;
    assert!(device(&outcome).has(virtio::RING_PACKED));
    Ok(())
}

#[test]
fn rng_daemon_killed_and_started_again_split() -> Result<(), Failure> {
    let Some(lab) = lab::require("rng_daemon_killed_and_started_again_split") else { return Ok(()) };
    let outcome = killed(&lab, &["--without", "ring_packed"])?;
    assert!(!device(&outcome).has(virtio::RING_PACKED));
    Ok(())
}

/// Memory modules: half of them are there at the start, half are plugged in while the guest reads.
const MODULES: u32 = 64;
/// The smallest that Linux takes on x86. The host gives memory only for what is touched.
const MODULE_MIB: u32 = 128;

#[test]
fn rng_64_memory_slots() -> Result<(), Failure> {
    let Some(lab) = lab::require("rng_64_memory_slots") else { return Ok(()) };
    let mut daemon = daemon(&[])?;
    let base = 512;
    let total = base + MODULES * MODULE_MIB;
    let text = script(&format!(
        "online() {{ grep -l online /sys/devices/system/memory/memory*/state | wc -l; }}\n\
         tell before $(online)\n\
         check 10\n\
         cat /dev/hwrng >/tmp/bytes &\n\
         ask plug\n\
         n=0; while [ $(online) -lt {} ]; do\n\
           n=$((n + 1)); [ $n -lt 600 ] || fail \"only $(online) blocks of memory\"; sleep 0.1; done\n\
         tell after $(online)\n\
         before=$(stat -c %s /tmp/bytes)\n\
         n=0; while [ $(stat -c %s /tmp/bytes) -le $before ]; do\n\
           n=$((n + 1)); [ $n -lt 600 ] || fail \"the reader hangs at $before bytes\"; sleep 0.1; done\n\
         kill $!\n\
         dd if=/dev/zero of=/dev/shm/fill bs=1M count=600 2>/dev/null || fail \"the new memory cannot be used\"\n\
         check 10\n",
        total / MODULE_MIB,
    ));
    let mut guest =
        Guest::new(&lab).memory_mib(base).memory_slots(MODULES, total).limit(Duration::from_secs(240));
    for number in 0..MODULES / 2 {
        guest = guest
            .args(["-object", &format!("memory-backend-memfd,id=m{number},size={MODULE_MIB}M,share=on")]);
        guest = guest.device(&format!("pc-dimm,id=d{number},memdev=m{number}"));
    }
    let mut guest = guest.vhost_user(DEVICE, &daemon.socket()).script(&text).start()?;
    guest.wait_told("plug", 1).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
    for number in MODULES / 2..MODULES {
        let (memory, module) = (format!("m{number}"), format!("d{number}"));
        let size = u64::from(MODULE_MIB) << 20;
        let backend =
            json!({ "qom-type": "memory-backend-memfd", "id": memory, "size": size, "share": true });
        guest.qmp("object-add", &backend)?;
        guest.qmp("device_add", &json!({ "driver": "pc-dimm", "id": module, "memdev": memory }))?;
    }
    guest.answer("plugged")?;
    let outcome = succeed(guest.wait(), &mut daemon)?;
    device(&outcome);
    daemon.stop()?;
    Ok(())
}
