//! Shared memory regions (virtio 1.4, 2.10) through QEMU, a front-end that is not ours: its test device makes a PCI BAR of
//! the regions that a back-end has, and maps into them what the back-end asks it to.
//!
//! The guest looks at the regions in three ways: at their capabilities in configuration space, with a program that maps
//! the BAR, and with Linux' driver for persistent memory, which looks for region 0 by itself.
//!
//! QEMU 11.1 crashes when a device is reset while something is mapped, if any vhost-user back-end of the VM took
//! CONFIGURE_MEM_SLOTS: the mapping was one of that back-end's memory regions, which QEMU looks up once more when the
//! rings start again, to remove it, and by then it is gone. So the test of resets withholds that feature.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;
use backplane_tests::relay::Relay;
use backplane_tests::running::Running;
use backplane_tests::scratch::Scratch;
use reactor::Mail;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use vhost_device::{Daemon, DaemonOptions, Endpoint, Stopper};
use vm_virtio::device::{DeviceError, Lane, QueueSpec, VirtioDevice, Worker};
use vm_virtio::{
    ConfigSpace, DeviceType, Features, ShmRange, ShmRegion, UpcallError, UpcallId, UpcallResult,
};

/// For whatever should happen soon; long, because test machines are slow.
const SOON: Duration = Duration::from_secs(30);
const PAGE: u64 = 0x1000;
/// Persistent memory comes in pieces of 2 MiB.
const SIZE: u64 = 4 << 20;
/// That of persistent memory, and another one. No region has an id in between.
const REGIONS: [ShmRegion; 2] = [ShmRegion { id: FIRST, size: SIZE }, ShmRegion { id: OTHER, size: SIZE }];
const FIRST: u8 = 0;
const OTHER: u8 = 3;

const PMEM: DeviceType = DeviceType(27);

/// What a worker is to ask the front-end.
enum Wish {
    Map { to: ShmRange, file: File, offset: u64, writable: bool },
    Unmap(ShmRange),
}

/// Of the protocol's features: INFLIGHT_SHMFD, with which a daemon knows by itself where a ring goes on; and
/// CONFIGURE_MEM_SLOTS.
const WITHHELD: u64 = 1 << 12 | 1 << 15;

type Answer = Result<(), UpcallError>;

/// A device with shared memory, into which goes what the test wishes. Its driver is Linux' own for the type that it
/// claims to be of: persistent memory, which asks nothing of its ring here, or entropy, which begins to at once.
struct Window {
    of: DeviceType,
    mail: Sender<Mail<Wish>>,
    answers: Sender<Answer>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    requests: AtomicU32,
    resets: AtomicU32,
}

impl VirtioDevice for Window {
    type Worker = WindowWorker;

    fn device_type(&self) -> DeviceType {
        self.of
    }

    /// Of persistent memory: the range is shared memory region 0 (`VIRTIO_PMEM_F_SHMEM_REGION`, 5.19.3).
    fn features(&self) -> Features {
        if self.of == PMEM { Features::from_bits_retain(1 << 0) } else { Features::empty() }
    }

    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "requestq", max_size: 64, lane: 0 }]
    }

    /// Address and size of persistent memory, which are 0 with that feature.
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::new(vec![0; 16]))
    }

    fn shared_memory(&self) -> &[ShmRegion] {
        &REGIONS
    }

    fn workers(&mut self, mail: &[Mail<Wish>]) -> Result<Vec<WindowWorker>, DeviceError> {
        for mail in mail {
            self.mail.send(mail.clone()).map_err(|_| DeviceError::new("nobody wants the mailbox"))?;
        }
        Ok(vec![WindowWorker { answers: self.answers.clone(), counts: self.counts.clone() }])
    }

    fn reset(&mut self, _: &mut [WindowWorker]) {
        self.counts.resets.fetch_add(1, Ordering::SeqCst);
    }
}

struct WindowWorker {
    answers: Sender<Answer>,
    counts: Arc<Counts>,
}

impl WindowWorker {
    fn answer(&self, answer: Answer) -> Result<(), DeviceError> {
        self.answers.send(answer).map_err(|_| DeviceError::new("nobody wants the answer"))
    }
}

impl Worker for WindowWorker {
    type Msg = Wish;

    /// Zeros are fine: entropy that nobody uses, and the success of a flush.
    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(queue) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            self.counts.requests.fetch_add(1, Ordering::SeqCst);
            let written = {
                let mut writer = queue.writer(&chain);
                writer.write(&[0; 64]);
                writer.written()
            };
            queue.add_used(chain, written);
        }
        Ok(())
    }

    fn message(&mut self, wish: Wish, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let asked = match wish {
            Wish::Map { to, file, offset, writable } => lane.up.map(to, file.into(), offset, writable),
            Wish::Unmap(range) => lane.up.unmap(range),
        };
        asked.map(drop).or_else(|error| self.answer(Err(error)))
    }

    fn upcall_done(
        &mut self,
        _: UpcallId,
        result: UpcallResult,
        _: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        self.answer(result.map(drop))
    }
}

/// The test's way to a device.
struct Side {
    mail: Mail<Wish>,
    answers: Receiver<Answer>,
    counts: Arc<Counts>,
}

impl Side {
    fn wish(&self, wish: Wish) -> Answer {
        assert!(self.mail.send(wish).is_ok(), "there is a worker");
        self.answers.recv_timeout(SOON).expect("an answer")
    }

    fn map(&self, to: ShmRange, file: &File, first: u64, writable: bool) -> Answer {
        let file = file.try_clone().unwrap();
        self.wish(Wish::Map { to, file, offset: first * PAGE, writable })
    }

    fn unmap(&self, range: ShmRange) -> Answer {
        self.wish(Wish::Unmap(range))
    }

    fn resets(&self) -> u32 {
        self.counts.resets.load(Ordering::SeqCst)
    }
}

/// Such devices, served on a thread of the test.
struct Host {
    scratch: Scratch,
    stopper: Stopper,
    thread: JoinHandle<()>,
    sides: Vec<Side>,
}

impl Host {
    fn start(types: &'static [DeviceType]) -> Result<Host, Failure> {
        let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
        let socket = |at| Endpoint::Path(scratch.join(&format!("vhost{at}")));
        let endpoints = (0..types.len()).map(socket).collect();
        let mut ours = Vec::new();
        let mut devices = Vec::new();
        for of in types {
            let (give_mail, mail) = mpsc::channel();
            let (give_answers, answers) = mpsc::channel();
            let counts = Arc::new(Counts::default());
            devices.push(Window { of: *of, mail: give_mail, answers: give_answers, counts: counts.clone() });
            ours.push((mail, answers, counts));
        }
        let (give_stopper, stopper) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut devices = devices.into_iter();
            let daemon = Daemon::new(endpoints, DaemonOptions::default(), |_| {
                devices.next().ok_or_else(|| DeviceError::new("no such device"))
            });
            let daemon = daemon.expect("a daemon");
            give_stopper.send(daemon.stopper()).expect("a test");
            daemon.serve().expect("a daemon that ends in order");
        });
        let stopper = stopper.recv_timeout(SOON).expect("the daemon starts");
        let side = |(mail, answers, counts): (Receiver<_>, _, _)| Side {
            mail: mail.recv_timeout(SOON).expect("a worker's mailbox"),
            answers,
            counts,
        };
        let sides = ours.into_iter().map(side).collect();
        Ok(Host { scratch, stopper, thread, sides })
    }

    fn stop(self) {
        self.stopper.stop();
        self.thread.join().expect("the daemon ends in order");
        for side in self.sides {
            assert_eq!(side.answers.try_iter().count(), 0, "answers that nobody waits for");
        }
    }
}

fn pages(region: u8, first: u64, count: u64) -> ShmRange {
    ShmRange { region, offset: first * PAGE, len: count * PAGE }
}

/// A file of so many pages; page n is full of n + 1.
fn numbered(count: u8) -> File {
    let file = File::from(memfd_create("pages", MemfdFlags::CLOEXEC).unwrap());
    for n in 0..count {
        file.write_all_at(&[n + 1; PAGE as usize], u64::from(n) * PAGE).unwrap();
    }
    file
}

fn words(file: &File, at: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at).unwrap();
    u32::from_le_bytes(bytes)
}

/// What the guest saw, word by word; then it waits for an answer.
fn seen(guest: &mut Running, key: &str) -> Result<Vec<u32>, Failure> {
    let told = guest.wait_told(key, 1)?;
    let word = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16);
    told.split_whitespace().map(word).collect::<Result<_, _>>().map_err(|_| Failure::new(told.clone()))
}

/// `regions DEVICE` tells the capabilities (4.1.4.7) of a virtio device, and where to find its BAR and, in that, its last
/// region: `$resource` and `$other`. `peek PLACE` and `poke PLACE WORD` are for a place in the BAR that `open` was for.
const FUNCTIONS: &str = r#"
    regions() {
        pci=$(readlink -f /sys/bus/virtio/devices/$1/..)
        set -- $(hexdump -v -n 256 -e '1/1 "%u "' $pci/config)
        at=${53}
        while [ $at != 0 ]; do
            shift $at
            next=$2
            if [ $1 = 9 ] && [ $4 = 8 ]; then
                offset=$((${9} | ${10} << 8 | ${11} << 16 | ${12} << 24 | ${17} << 32))
                length=$((${13} | ${14} << 8 | ${15} << 16 | ${16} << 24 | ${21} << 32))
                tell region$6 $3 $offset $length
                resource=$pci/resource$5
                base=$(sed -n $(($5 + 1))p $pci/resource | cut -d ' ' -f 1)
                [ $6 = 0 ] || other=$offset
            fi
            at=$next
            set -- $(hexdump -v -n 256 -e '1/1 "%u "' $pci/config)
        done
    }
    open() { ln -sf $1 /dev/mem; }
    peek() { devmem $1 32; }
    poke() { devmem $1 32 $2; }
"#;

const DEVICE: &str = "vhost-user-test-device-pci,num_vqs=1,config_size=16";

#[test]
fn virtio_2_10_a_linux_guest_under_qemu_sees_what_the_back_end_maps() -> Result<(), Failure> {
    const NAME: &str = "virtio_2_10_a_linux_guest_under_qemu_sees_what_the_back_end_maps";
    let Some(lab) = lab::require(NAME) else { return Ok(()) };
    let host = Host::start(&[PMEM])?;
    let script = "
        regions virtio0
        open $resource
        [ $(($(cat /sys/bus/nd/devices/region0/resource))) = $((base)) ] || fail 'the driver found another region'
        tell driver $(cat /sys/bus/nd/devices/region0/size)
        ask nothing $(peek 0) $(peek $((other + 0x1000)))
        ask mapped $(peek 0) $(peek 0x1000) $(peek 0x2000) \
            $(peek $((other + 0xffc))) $(peek $((other + 0x1000))) $(peek $((other + 0x2ffc))) $(peek $((other + 0x3000)))
        poke $((other + 0x2004)) 0x12345678
        ask written $(peek $((other + 0x2004)))
        ask changed $(peek $((other + 0x1000))) $(peek $((other + 0x8000)))
        ask unmapped $(peek $((other + 0x1000))) $(peek $((other + 0x2004))) $(peek $((other + 0x8000))) $(peek 0)
        # With nothing mapped: see above.
        echo virtio0 >/sys/bus/virtio/drivers/virtio_pmem/unbind || fail unbind
        echo virtio0 >/sys/bus/virtio/drivers/virtio_pmem/bind || fail bind
        ask again $(peek $((other + 0x1000)))
        ask end $(peek $((other + 0x1000)))
    ";
    let mut guest = Guest::new(&lab)
        .vhost_user(&format!("{DEVICE},virtio-id=27"), &host.scratch.join("vhost0"))
        .script(&format!("{FUNCTIONS}{script}"))
        .start()?;
    let [device] = host.sides.as_slice() else { panic!("one device") };
    let file = numbered(8);
    assert_eq!(seen(&mut guest, "nothing")?, [0, 0]);
    // QEMU answers a moment before it has carried it out; the guest hears from the same loop of QEMU's, so later.
    assert_eq!(device.map(pages(FIRST, 0, 2), &file, 0, true), Ok(()));
    assert_eq!(device.map(pages(OTHER, 1, 2), &file, 3, true), Ok(()));
    guest.answer("look")?;
    let expected = [0x0101_0101, 0x0202_0202, 0, 0, 0x0404_0404, 0x0505_0505, 0];
    assert_eq!(seen(&mut guest, "mapped")?, expected);
    guest.answer("write")?;
    assert_eq!(seen(&mut guest, "written")?, [0x1234_5678]);
    assert_eq!(words(&file, 4 * PAGE + 4), 0x1234_5678, "the guest writes into the file");
    file.write_all_at(&[0xaa; 4], 3 * PAGE).unwrap();

    // Refused before QEMU hears of it: outside, and over another one.
    let last = SIZE / PAGE - 1;
    assert_eq!(device.map(pages(OTHER, last, 2), &file, 0, true), Err(UpcallError::Range));
    assert_eq!(device.map(pages(1, 0, 1), &file, 0, true), Err(UpcallError::Range));
    assert_eq!(device.map(pages(OTHER, 2, 2), &file, 0, true), Err(UpcallError::Overlap));
    // By QEMU: beyond the end of the file, writable though the file is not.
    let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    assert_eq!(device.map(pages(OTHER, 8, 2), &file, 7, true), Err(UpcallError::Refused));
    assert_eq!(device.map(pages(OTHER, 8, 2), &read_only, 0, true), Err(UpcallError::Refused));
    // Neither is there, nor is QEMU less willing afterwards.
    assert_eq!(device.map(pages(OTHER, 8, 2), &file, 6, true), Ok(()));
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "changed")?, [0xaaaa_aaaa, 0x0707_0707]);

    assert_eq!(device.unmap(pages(OTHER, 1, 1)), Err(UpcallError::NotMapped), "only as a whole");
    for range in [pages(OTHER, 1, 2), pages(OTHER, 8, 2), pages(FIRST, 0, 2)] {
        assert_eq!(device.unmap(range), Ok(()));
    }
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "unmapped")?, [0, 0, 0, 0]);
    assert_eq!(words(&file, 4 * PAGE + 4), 0x1234_5678, "and the file is as it was");
    guest.answer("reset")?;
    assert_eq!(seen(&mut guest, "again")?, [0]);
    assert_eq!(device.map(pages(OTHER, 1, 1), &file, 5, true), Ok(()));
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "end")?, [0x0606_0606]);
    assert_eq!(device.unmap(pages(OTHER, 1, 1)), Ok(()));
    guest.answer("end")?;
    let outcome = guest.wait().and_then(Outcome::success)?;
    // Size of the capability, offset and length of the region: ids stay what they are, sizes, too.
    assert_eq!(outcome.told("region0"), Some(format!("24 0 {SIZE}").as_str()));
    assert_eq!(outcome.told("region3"), Some(format!("24 {SIZE} {SIZE}").as_str()));
    assert_eq!(outcome.told("driver"), Some(SIZE.to_string().as_str()));
    host.stop();
    Ok(())
}

/// QEMU tells its generic devices of no reset. What was mapped it has unmapped by itself then, and the device has to be
/// told: also if nobody made a request that its ring could show, as with persistent memory that is only read.
#[test]
fn virtio_2_4_a_reset_under_qemu_ends_mappings_and_a_pause_does_not() -> Result<(), Failure> {
    const NAME: &str = "virtio_2_4_a_reset_under_qemu_ends_mappings_and_a_pause_does_not";
    let Some(lab) = lab::require(NAME) else { return Ok(()) };
    let host = Host::start(&[PMEM, DeviceType::ENTROPY])?;
    let [unused, used] = host.sides.as_slice() else { panic!("two devices") };
    let relay = |name: &str, daemon: &str| {
        Relay::withholding(WITHHELD, &host.scratch.join(name), &host.scratch.join(daemon))
    };
    let relays = [relay("relay0", "vhost0")?, relay("relay1", "vhost1")?];
    let script = "
        regions virtio0; resource0=$resource
        regions virtio1
        look() { for one in $resource0 $resource; do open $one; peek $((other + 0x1000)); done; }
        again() {
            echo $1 >/sys/bus/virtio/drivers/$2/unbind || fail \"unbind $1\"
            echo $1 >/sys/bus/virtio/drivers/$2/bind || fail \"bind $1\"
        }
        head -c 16 /dev/hwrng >/dev/null || fail 'no entropy'
        ask begin
        ask mapped $(look)
        again virtio0 virtio_pmem
        again virtio1 virtio_rng
        head -c 16 /dev/hwrng >/dev/null || fail 'no entropy after a reset'
        ask reset $(look)
        ask again $(look)
        ask continued $(look)
    ";
    let mut guest = Guest::new(&lab)
        .vhost_user(&format!("{DEVICE},virtio-id=27"), relays[0].socket())
        .vhost_user(&format!("{DEVICE},virtio-id=4"), relays[1].socket())
        .script(&format!("{FUNCTIONS}{script}"))
        .start()?;
    let file = numbered(8);
    let place = pages(OTHER, 1, 1);
    guest.wait_told("begin", 1)?;
    assert_eq!(unused.map(place, &file, 1, true), Ok(()));
    assert_eq!(used.map(place, &file, 2, true), Ok(()));
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "mapped")?, [0x0202_0202, 0x0303_0303]);
    assert_eq!((unused.resets(), used.resets()), (0, 0));
    guest.answer("reset")?;
    assert_eq!(seen(&mut guest, "reset")?, [0, 0]);
    assert_eq!((unused.resets(), used.resets()), (1, 1));
    // Not taken any more; and QEMU, which was asked to unmap what it has not, goes on.
    assert_eq!(unused.map(place, &file, 3, true), Ok(()));
    assert_eq!(used.map(place, &file, 4, true), Ok(()));
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "again")?, [0x0404_0404, 0x0505_0505]);
    guest.qmp("stop", &json!({}))?;
    guest.qmp("cont", &json!({}))?;
    assert_eq!(used.resets(), 1, "a pause is no reset");
    assert_eq!(used.map(place, &file, 0, true), Err(UpcallError::Overlap));
    // Through the ring that nothing ever went through a pause looks like a reset, and both sides agree on that.
    assert_eq!(unused.resets(), 2);
    assert_eq!(unused.map(place, &file, 5, true), Ok(()));
    guest.answer("look")?;
    assert_eq!(seen(&mut guest, "continued")?, [0x0606_0606, 0x0505_0505]);
    guest.answer("end")?;
    guest.wait().and_then(Outcome::success)?;
    assert_eq!(unused.counts.requests.load(Ordering::SeqCst), 0);
    assert!(used.counts.requests.load(Ordering::SeqCst) > 1);
    drop(relays);
    host.stop();
    Ok(())
}
