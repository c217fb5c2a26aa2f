//! Linux uses disks of `vhost-device-block`: a file system filled and verified by fio over a daemon that is killed under
//! load, trimmed, found again after a reboot; what sysfs and the usual tools say of the disk; a qcow2 image that QEMU's own
//! tools find whole afterwards. Each test boots as few guests as it can and prints what it verified.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::{self, Lab};
use backplane_tests::running::Running;
use backplane_tests::scratch::Scratch;
use backplane_tests::skip;
use backplane_tests::virtio::{self, Device};

const DAEMON: &str = "vhost-device-block";
const MIB: u64 = 1 << 20;

/// Functions of every script here. `counter FILE` writes a number that grows to one place, past all caches, and reads it
/// back each time: a write that is lost, or done again after a later one, shows. `load FILE` has fio write 8 MiB in random order with
/// 64 requests in flight and read them all back, again and again until /tmp/stop is there.
const FUNCTIONS: &str = r#"
counter() {
	n=0
	while [ ! -e /tmp/stop ]; do
		n=$((n + 1))
		printf '%-512s' $n >/tmp/number
		dd if=/tmp/number of=$1 bs=512 count=1 seek=2048 oflag=direct conv=notrunc 2>/tmp/dd || { echo "write $n: $(cat /tmp/dd)" >/tmp/bad; return; }
		seen=$(dd if=$1 bs=512 count=1 skip=2048 iflag=direct 2>/dev/null | cut -d' ' -f1)
		[ "$seen" = $n ] || { echo "$seen after $n" >/tmp/bad; return; }
		echo $n >/tmp/counted
	done
}
load() {
	rounds=0
	while [ ! -e /tmp/stop ]; do
		fio --name=load --filename=$1 --rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16 --numjobs=4 \
			--offset=2M --offset_increment=2M --size=2M --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal >/tmp/fio 2>&1 || return 1
		rounds=$((rounds + 1))
		echo $rounds >/tmp/rounds
	done
}
under_load() {
	counter $1 & counter=$!
	load $2 & load=$!
	for kill in $3; do ask kill; done
	touch /tmp/stop
	wait $load || fail "fio: $(tail -n 3 /tmp/fio)"
	wait $counter
	[ ! -e /tmp/bad ] || fail "counter: $(cat /tmp/bad)"
	tell counted $(cat /tmp/counted)
	tell rounds $(cat /tmp/rounds)
}
sum() {
	md5sum $1 | cut -d' ' -f1
}
"#;

fn script(text: &str) -> String {
    format!("{FUNCTIONS}{text}")
}

/// An image of zeros that takes no room.
fn image(path: &Path, bytes: u64) -> Result<(), Failure> {
    let file = File::create(path).and_then(|file| file.set_len(bytes));
    file.map_err(Failure::io(format_args!("make {}", path.display())))
}

/// Room that a file takes on the host.
fn allocated(path: &Path) -> Result<u64, Failure> {
    let stat = fs::metadata(path).map_err(Failure::io("look at the image"))?;
    Ok(stat.blocks() * 512)
}

/// A disk of the guest: QEMU comes back by itself to a daemon that was killed.
fn disk(guest: Guest, id: &str, socket: &Path, properties: &str) -> Guest {
    let chardev = format!("socket,id={id},path={},reconnect-ms=100", socket.display());
    guest.args(["-chardev", &chardev]).device(&format!("vhost-user-blk-pci,chardev={id},{properties}"))
}

/// Waits for what the script tells; with the daemon's words if that does not come.
fn told(guest: &mut Running, key: &str, nth: usize, daemon: &Daemon) -> Result<String, Failure> {
    guest.wait_told(key, nth).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))
}

fn devices(outcome: &Outcome) -> Vec<Device> {
    let all = outcome.devices().into_iter().filter(|device| device.id == virtio::BLOCK);
    all.inspect(|device| assert_eq!((device.driver.as_str(), device.status), ("virtio_blk", virtio::RUNNING)))
        .collect()
}

/// One request at the daemon's control socket.
fn control(socket: &Path, request: &serde_json::Value) -> Result<serde_json::Value, Failure> {
    let mut stream = UnixStream::connect(socket).map_err(Failure::io("connect to the control socket"))?;
    writeln!(stream, "{request}").map_err(Failure::io("ask at the control socket"))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(Failure::io("read from the control socket"))?;
    serde_json::from_str(&line).map_err(|e| Failure::new(format!("{line:?}: {e}")))
}

/// Counted writes and rounds of fio.
fn load_of(outcome: &Outcome) -> (u64, u64) {
    let number = |key| outcome.told(key).and_then(|count| count.parse().ok()).unwrap_or(0);
    let (counted, rounds) = (number("counted"), number("rounds"));
    assert!(counted > 0 && rounds > 0, "{counted} counted writes, {rounds} rounds of fio");
    (counted, rounds)
}

/// What is on the disk is found whole by the host's own checker, where there is one.
fn check_ext4(path: &Path) {
    let check = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(path).stdin(Stdio::null()).output();
    match check {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => {
            println!("e2fsck is not on this machine ({error}): the guest's own mount was the check")
        }
    }
}

/// A file system in a raw image with a packed ring and a queue for each of four CPUs, and beside it a disk that is read only,
/// with a split ring: one guest with two boots, its daemon killed twice under load.
#[test]
fn block_file_system_lives_through_kills_trims_and_reboots() -> Result<(), Failure> {
    let test = "block_file_system_lives_through_kills_trims_and_reboots";
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let (raw, fixed) = (scratch.join("disk.raw"), scratch.join("fixed.raw"));
    image(&raw, 128 * MIB)?;
    fs::write(&fixed, b"as it was".repeat(1024)).map_err(Failure::io("write a disk"))?;
    let before = fs::read(&fixed).map_err(Failure::io("read a disk"))?;
    let socket = scratch.join("control");
    let mut main =
        Daemon::new(DAEMON)?.args(["--num-queues", "4", "--serial", "backplane-0001", "--blk-file"]);
    main = main.args([raw.as_os_str(), "--control-socket".as_ref(), socket.as_os_str()]);
    main.start()?;
    let mut other =
        Daemon::new(DAEMON)?.args(["--read-only".as_ref(), "--blk-file".as_ref(), fixed.as_os_str()]);
    other.start()?;
    let text = script(
        r#"
	mkdir -p /mnt
	if ! mount -t ext4 /dev/vda /mnt 2>/dev/null; then
		# The first boot.
		[ $(ls /sys/block/vda/mq | wc -l) = 4 ] || fail "queues: $(ls /sys/block/vda/mq)"
		[ "$(cat /sys/block/vda/serial)" = backplane-0001 ] || fail "serial '$(cat /sys/block/vda/serial)'"
		[ "$(cat /sys/block/vda/cache_type)" = "write back" ] || fail "cache $(cat /sys/block/vda/cache_type)"
		[ $(cat /sys/block/vda/queue/discard_max_bytes) -gt 0 ] || fail "no discard"
		[ $(cat /sys/block/vda/queue/write_zeroes_max_bytes) -gt 0 ] || fail "no zeroes"
		[ $(blockdev --getro /dev/vdb) = 1 ] || fail "vdb can be written"
		dd if=/dev/zero of=/dev/vdb bs=512 count=1 oflag=direct 2>/dev/null && fail "vdb was written"
		for cache in "write through" "write back"; do
			echo "$cache" >/sys/block/vda/cache_type
			[ "$(cat /sys/block/vda/cache_type)" = "$cache" ] || fail "cache stays $(cat /sys/block/vda/cache_type)"
			printf '%-512s' "$cache" >/tmp/cache
			dd if=/tmp/cache of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null || fail "write with $cache"
			dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | cmp - /tmp/cache || fail "read with $cache"
			ask cache $cache
		done
		mkfs.ext4 -q -F -O ^has_journal /dev/vda 64M || fail mkfs
		mount -t ext4 /dev/vda /mnt || fail mount
		dd if=/dev/zero of=/mnt/counter bs=64k count=32 2>/dev/null
		truncate -s 12M /mnt/load; sync
		under_load /mnt/counter /mnt/load "1 2"
		# Room that was given back.
		dd if=/dev/urandom of=/mnt/waste bs=1M count=24 2>/dev/null; sync
		ask full
		rm /mnt/waste; sync
		fstrim -v /mnt || fail fstrim
		ask trimmed
		sum /mnt/load >/mnt/sum; tell sum $(cat /mnt/sum)
		umount /mnt
		mount -t ext4 /dev/vda /mnt || fail "mount again"
		[ "$(sum /mnt/load)" = "$(cat /mnt/sum)" ] || fail "contents after a mount"
		umount /mnt; sync
		ask reboot
		reboot -f; sleep 100
	fi
	[ -s /mnt/sum ] || fail "no sum after the reboot"
	[ "$(sum /mnt/load)" = "$(cat /mnt/sum)" ] || fail "contents after the reboot"
	umount /mnt
	ask check
	ask resize
	n=0; while ! lsblk /dev/vda | grep -q ' 192M '; do
		n=$((n + 1)); [ $n -lt 600 ] || fail "lsblk says $(lsblk /dev/vda)"; sleep 0.1; done
	dd if=/lab.sh of=/dev/vda bs=512 count=1 seek=393215 oflag=direct conv=sync 2>/dev/null || fail "the new last sector"
	tell resized $(cat /sys/block/vda/size)
	dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct 2>/dev/null || fail "fill before the discard"
	ask filled
	blkdiscard /dev/vda || fail blkdiscard
	ask discarded
	virtio_devices
"#,
    );
    let guest = Guest::new(&lab).cpus(4).reboots().archive(&lab.fio).limit(Duration::from_secs(400));
    let guest = disk(guest, "main", &main.socket(), "num-queues=4,packed=on,queue-size=256");
    let guest = disk(guest, "other", &other.socket(), "num-queues=1");
    let mut guest = guest.script(&text).start()?;
    for (nth, on) in [(1, false), (2, true)] {
        told(&mut guest, "cache", nth, &main)?;
        let get = serde_json::json!({ "request": "get", "property": "writeback" });
        let reply = control(&socket, &get)?;
        assert_eq!(reply["ok"]["value"], on, "{reply}");
        guest.answer("seen")?;
    }
    for nth in 1..=2 {
        told(&mut guest, "kill", nth, &main)?;
        std::thread::sleep(Duration::from_millis(700));
        main.kill()?;
        // Long enough for the guest to ask the dead daemon.
        std::thread::sleep(Duration::from_millis(200));
        main.start()?;
        guest.answer("again")?;
    }
    told(&mut guest, "full", 1, &main)?;
    let full = allocated(&raw)?;
    guest.answer("trim")?;
    told(&mut guest, "trimmed", 1, &main)?;
    let trimmed = allocated(&raw)?;
    assert!(trimmed + 20 * MIB < full, "{full} bytes before the trim, {trimmed} after");
    guest.answer("go")?;
    told(&mut guest, "reboot", 1, &main)?;
    guest.answer("go")?;
    told(&mut guest, "check", 1, &main)?;
    check_ext4(&raw);
    guest.answer("good")?;
    told(&mut guest, "resize", 1, &main)?;
    let resize =
        serde_json::json!({ "request": "run", "command": "resize", "arguments": { "bytes": 192 * MIB } });
    let reply = control(&socket, &resize)?;
    assert!(reply["ok"].is_object(), "{reply}");
    guest.answer("resized")?;
    told(&mut guest, "filled", 1, &main)?;
    let filled = allocated(&raw)?;
    guest.answer("discard")?;
    told(&mut guest, "discarded", 1, &main)?;
    let discarded = allocated(&raw)?;
    assert!(discarded < filled && discarded < MIB, "{filled} bytes before blkdiscard, {discarded} after");
    guest.answer("go")?;
    let outcome = guest.wait().and_then(Outcome::success).map_err(|e| e.with_log(DAEMON, &main.stderr()))?;
    let devices = devices(&outcome);
    assert_eq!(devices.len(), 2);
    assert!(devices.iter().any(|device| device.has(virtio::RING_PACKED)), "{devices:?}");
    assert!(devices.iter().any(|device| !device.has(virtio::RING_PACKED)), "{devices:?}");
    let (counted, rounds) = load_of(&outcome);
    assert_eq!(fs::read(&fixed).map_err(Failure::io("read a disk"))?, before, "the read-only disk");
    println!(
        "{test}: fio's 8 MiB verified {rounds} times over 2 kills, their md5 after a remount and after a reboot; {counted} \
         counted writes in order; {} MiB trimmed, {} MiB discarded; resized to 192 MiB; {:.1} s",
        (full - trimmed) / MIB,
        (filled - discarded) / MIB,
        outcome.time.as_secs_f64()
    );
    main.stop()?;
    other.stop()?;
    Ok(())
}

/// A tool of QEMU's, where the machine has it.
fn tool(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn run(program: &Path, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(Failure::io(format_args!("run {}", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("{} {arguments:?}: {text}{errors}", program.display())))
}

/// A qcow2 image over a raw one, written under load while its daemon is killed, trimmed: QEMU finds it whole, and in it what
/// the guest saw.
#[test]
fn block_qcow2_is_whole_for_qemu_after_load_and_kills() -> Result<(), Failure> {
    let test = "block_qcow2_is_whole_for_qemu_after_load_and_kills";
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let Some(qemu_img) = tool("qemu-img") else {
        skip::tell(test, "qemu-img is not on this machine (Debian: qemu-utils)");
        return Ok(());
    };
    qcow2(test, &lab, &qemu_img)
}

fn qcow2(test: &str, lab: &Lab, qemu_img: &Path) -> Result<(), Failure> {
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let (base, top, copy) = (path("base.raw"), path("top.qcow2"), path("copy.raw"));
    fs::write(&base, b"from below\n".repeat(95326)).map_err(Failure::io("write a disk"))?;
    let made = ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top, "64M"];
    run(qemu_img, &made)?;
    let folder = scratch.path().display().to_string();
    let arguments = ["--format", "qcow2", "--backing-dir", &folder, "--num-queues", "2", "--blk-file", &top];
    let mut daemon = Daemon::new(DAEMON)?.args(arguments);
    daemon.start()?;
    let text = script(
        r#"
	[ "$(dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 10)" = "from below" ] || fail "the file behind it"
	under_load /dev/vda /dev/vda 1
	blkdiscard -o $((32 * 1048576)) -l $((8 * 1048576)) /dev/vda || fail blkdiscard
	dd if=/dev/vda bs=1M skip=32 count=8 2>/dev/null | tr -d '\0' | wc -c | grep -qx 0 || fail "discarded ranges read as zeros"
	dd if=/dev/urandom of=/dev/vda bs=1M seek=36 count=2 conv=notrunc 2>/dev/null; sync
	blockdev --flushbufs /dev/vda
	tell sum $(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1)
	virtio_devices
"#,
    );
    let guest = Guest::new(lab).archive(&lab.fio).limit(Duration::from_secs(300));
    let mut guest = disk(guest, "disk", &daemon.socket(), "num-queues=2").script(&text).start()?;
    told(&mut guest, "kill", 1, &daemon)?;
    std::thread::sleep(Duration::from_millis(700));
    daemon.kill()?;
    std::thread::sleep(Duration::from_millis(200));
    daemon.start()?;
    guest.answer("again")?;
    let outcome =
        guest.wait().and_then(Outcome::success).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
    assert_eq!(devices(&outcome).len(), 1);
    let (counted, rounds) = load_of(&outcome);
    daemon.stop()?;
    let check = run(qemu_img, &["check", "-f", "qcow2", &top])?;
    run(qemu_img, &["convert", "-f", "qcow2", "-O", "raw", &top, &copy])?;
    run(qemu_img, &["compare", "-f", "qcow2", "-F", "raw", &top, &copy])?;
    let sum = run(Path::new("md5sum"), &[&copy])?;
    let sum = sum.split_whitespace().next();
    assert_eq!(outcome.told("sum"), sum, "what QEMU reads is what the guest saw");
    println!(
        "{test}: {}; fio's 8 MiB verified {rounds} times and {counted} counted writes in order over a kill; what the \
         guest saw is what qemu-img reads; {:.1} s",
        check.lines().next().unwrap_or_default(),
        outcome.time.as_secs_f64()
    );
    Ok(())
}
