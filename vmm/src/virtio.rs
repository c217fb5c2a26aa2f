//! Virtio devices, as they are named on the command line, and the two places to put them: registers of virtio-mmio at an address,
//! or a function on a PCI bus. The devices are the same; see [`Place`].

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kvm_ioctls::VmFd;
use virtio_block::{Block, backend::OpenOptions};
use virtio_console::{Console, PortSpec, Target};
use virtio_rng::{Entropy, Rng};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::dispatch::{IoDevice, IoSpace, Registration};
use vm_device::interrupt::{IrqLine, Messages, Trigger};
use vm_device::kvm::{IoAddress, IoEvent, IoMatch, KvmInterrupts};
use vm_device::legacy::IoApic;
use vm_device::pci::Card;
use vm_device::resources::{Claim, ResourceConstraint, SystemAllocator};
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;
use vm_virtio::transport::pci::function::{FunctionOptions, Moved, VIRTIO_BAR, function};
use vm_virtio::transport::{Notifier, Options};
use vm_virtio::{Features, GuestRam, HostEvent, HostEvents, LaneRunner, VirtioDevice, WaitFor, Worker};

use crate::Result;
use crate::layout::VIRTIO_MMIO;

/// VendorID of the virtio-mmio registers: "BKPL".
const VENDOR: u32 = 0x4c50_4b42;

/// A device that is asked for: `KIND[=VALUE][,without=FEATURE[+FEATURE...]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceSpec {
    kind: Kind,
    without: Features,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Rng,
    Block(PathBuf),
    Console(PathBuf),
    Vsock(u64, PathBuf),
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceSpec, String> {
        let (device, without) = text.split_once(",without=").unwrap_or((text, ""));
        let kind = match device.split_once('=').unwrap_or((device, "")) {
            ("rng", "") => Kind::Rng,
            ("block", path) if !path.is_empty() => Kind::Block(path.into()),
            ("console", path) if !path.is_empty() => Kind::Console(path.into()),
            ("vsock", value) => {
                let (cid, path) = value.split_once(':').ok_or("a vsock is vsock=CID:PATH")?;
                Kind::Vsock(cid.parse().map_err(|_| format!("{cid:?} is no context ID"))?, path.into())
            }
            _ => {
                return Err(format!(
                    "{device:?} is none of rng, block=IMAGE, console=SOCKET and vsock=CID:SOCKET"
                ));
            }
        };
        let mut features = Features::empty();
        for name in without.split('+').filter(|name| !name.is_empty()) {
            features |= Features::by_name(name).ok_or_else(|| format!("there is no feature {name:?}"))?;
        }
        Ok(DeviceSpec { kind, without: features })
    }
}

impl DeviceSpec {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Rng => "virtio-rng",
            Kind::Block(_) => "virtio-block",
            Kind::Console(_) => "virtio-console",
            Kind::Vsock(..) => "virtio-vsock",
        }
    }

    /// PCI's class code, for people; Linux takes no notice.
    fn class(&self) -> u32 {
        match self.kind {
            Kind::Rng | Kind::Vsock(..) => 0x00_ff00,
            Kind::Block(_) => 0x01_8000,
            Kind::Console(_) => 0x07_8000,
        }
    }

    /// Makes the device and puts it there.
    pub(crate) fn put<P: Place>(&self, place: P) -> Result<P::Placed> {
        match &self.kind {
            Kind::Rng => place.put(Rng::new(&Entropy::kernel()?, 0, None)?, self),
            Kind::Block(path) => {
                let image =
                    virtio_block::backend::open(path, OpenOptions { lock: true, ..Default::default() })?;
                let options = virtio_block::Options::new(virtio_block::Options::own_pool());
                place.put(Block::new(image, options)?, self)
            }
            Kind::Console(path) => {
                let port = PortSpec::console(Target::Unix(path.clone()));
                place.put(Console::new(&[port], 0, virtio_console::QUEUE_SIZE)?, self)
            }
            Kind::Vsock(cid, path) => {
                let settings = Settings::new(*cid, HostSide::Unix(path.clone()));
                place.put(Vsock::new(settings, &Exchange::new())?, self)
            }
        }
    }

    fn options(&self) -> Options {
        let mut options = Options::new(Arc::new(Ear::new(self.name())));
        options.engine.without = self.without;
        options
    }
}

/// Somewhere to put a device of any type.
pub(crate) trait Place {
    type Placed;
    fn put<D: VirtioDevice>(self, device: D, spec: &DeviceSpec) -> Result<Self::Placed>;
}

/// Tells people of a device; not for ever, since it is guests who make it talk.
struct Ear {
    name: &'static str,
    said: AtomicU32,
}

impl Ear {
    fn new(name: &'static str) -> Ear {
        Ear { name, said: AtomicU32::new(0) }
    }

    fn say(&self, what: std::fmt::Arguments<'_>) {
        const MOST: u32 = 20;
        let more = |said: u32| (said < MOST).then(|| said + 1);
        if self.said.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
            eprintln!("{}: {what}", self.name);
        }
    }
}

impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        if matches!(event, HostEvent::QueueFault { .. } | HostEvent::NeedsReset { .. }) {
            self.say(format_args!("{event:?}"));
        }
    }
}

/// What devices need of the machine.
#[derive(Clone)]
pub(crate) struct Board {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: GuestRam,
    pub(crate) interrupts: KvmInterrupts,
    pub(crate) io_apic: Arc<IoApic>,
    pub(crate) allocator: SystemAllocator,
    pub(crate) space: IoSpace,
}

impl Board {
    /// Message interrupts, with numbers that are theirs as long as the claim is kept.
    pub(crate) fn messages(&self, count: u16) -> Result<(Messages, Claim)> {
        let claim = self.allocator.claim(&[ResourceConstraint::PciMsixIrq { size: count.into() }])?;
        let (first, count) = claim.resources().get_pci_msix_irqs().ok_or("no numbers for messages")?;
        Ok((Messages::new(Arc::new(self.interrupts.clone()), first, count)?, claim))
    }
}

/// A thread for each lane, until the device is dropped.
fn run_lanes<W: Worker>(name: &str, lanes: Vec<LaneRunner<W>>) -> Result<()> {
    for lane in lanes {
        // Nobody waits for it: it ends when its engine does.
        drop(thread::Builder::new().name(name.to_owned()).spawn(move || lane.run())?);
    }
    Ok(())
}

/// Lets the kernel take the guest's notifications: an ioeventfd for each queue, at `base`.
fn kicks<'a>(vm: &Arc<VmFd>, base: u64, all: impl Iterator<Item = Notifier<'a>>) -> Result<Vec<IoEvent>> {
    all.map(|notifier| {
        let matched = IoMatch::of(notifier.width, notifier.value).ok_or("no such notification")?;
        Ok(IoEvent::new(vm, IoAddress::Mmio(base + notifier.offset), matched, notifier.fd)?)
    })
    .collect()
}

/// virtio-mmio: a page of registers, and an interrupt line.
pub(crate) struct OnMmio<'a>(pub(crate) &'a Board);

/// A device there, for good.
pub(crate) struct MmioDevice {
    /// What Linux is to be told, as it has no other way to know.
    pub(crate) argument: String,
    reset: Box<dyn Fn()>,
    _registration: Registration,
    _kicks: Vec<IoEvent>,
    _claim: Claim,
}

impl MmioDevice {
    pub(crate) fn reset(&self) {
        (self.reset)();
    }
}

impl Place for OnMmio<'_> {
    type Placed = MmioDevice;

    fn put<D: VirtioDevice>(self, device: D, spec: &DeviceSpec) -> Result<MmioDevice> {
        let Board { vm, ram, io_apic, allocator, space, .. } = self.0;
        let page = Some((*VIRTIO_MMIO.start(), *VIRTIO_MMIO.end()));
        let claim = allocator.claim(&[
            ResourceConstraint::mmio_with_constraints(0x1000, page, 0x1000),
            ResourceConstraint::new_legacy_irq(None),
        ])?;
        let resources = claim.resources();
        let (base, size) = *resources.get_mmio_address_ranges().first().ok_or("no address")?;
        let irq = resources.get_legacy_irq().ok_or("no interrupt line")?;
        // Linux takes an interrupt below 16 that it knows the number of only for one of the edge kind.
        let line = IrqLine::new(Trigger::Edge)?;
        io_apic.connect(u8::try_from(irq)?, &line)?;
        let (mmio, lanes) = Mmio::new(device, spec.options(), VENDOR, Arc::new(line.source()))?;
        run_lanes(spec.name(), lanes)?;
        mmio.engine().memory(ram.clone(), WaitFor::NewRequests).wait();
        let kicks = kicks(vm, base, mmio.notifiers())?;
        let mmio = Arc::new(mmio);
        let range = MmioRange::new(MmioAddress(base), size)?;
        Ok(MmioDevice {
            argument: format!("virtio_mmio.device={size}@{base:#x}:{irq}"),
            _registration: space.register(IoDevice::mmio(mmio.clone()), &[range.into()])?,
            _kicks: kicks,
            _claim: claim,
            reset: Box::new(move || mmio.reset()),
        })
    }
}

/// virtio-pci: a card for any bus or slot, with a message for each queue and one for the configuration.
pub(crate) struct OnPci<'a>(pub(crate) &'a Board);

impl Place for OnPci<'_> {
    /// The numbers of its messages are given back only after the card is dropped.
    type Placed = (Card, Claim);

    fn put<D: VirtioDevice>(self, device: D, spec: &DeviceSpec) -> Result<(Card, Claim)> {
        let queues = device.queues(device.features()).len();
        let (messages, claim) = self.0.messages(u16::try_from(queues)? + 1)?;
        let (pci, lanes) = Pci::new(device, spec.options(), messages.count())?;
        run_lanes(spec.name(), lanes)?;
        pci.engine().memory(self.0.ram.clone(), WaitFor::NewRequests).wait();
        let pci = Arc::new(pci);
        let options = FunctionOptions {
            name: spec.name().to_owned(),
            class: spec.class(),
            messages: Some(messages),
            capabilities: Vec::new(),
            moved: follow(self.0.vm.clone(), pci.clone(), Ear::new(spec.name())),
        };
        Ok((Card::single(function(pci, options)?), claim))
    }
}

/// Keeps the notifications' ioeventfds where the guest puts their BAR.
fn follow<D: VirtioDevice>(vm: Arc<VmFd>, pci: Arc<Pci<D>>, ear: Ear) -> Moved {
    let now = Mutex::new(Vec::new());
    Box::new(move |bar, address| {
        if bar != VIRTIO_BAR {
            return;
        }
        let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
        // Those at the old place first: one may be where another will be.
        now.clear();
        if let Some(address) = address {
            match kicks(&vm, address, pci.notifiers()) {
                Ok(kicks) => *now = kicks,
                // Then they come as writes, which is slower and nothing else.
                Err(error) => ear.say(format_args!("notifications at {address:#x} are exits: {error}")),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_refused() {
        let spec: DeviceSpec = "rng".parse().unwrap();
        assert_eq!((spec.kind, spec.without), (Kind::Rng, Features::empty()));
        let spec: DeviceSpec = "block=/d,without=ring_packed+event_idx".parse().unwrap();
        assert_eq!(spec.kind, Kind::Block("/d".into()));
        assert_eq!(spec.without, Features::RING_PACKED | Features::EVENT_IDX);
        let spec: DeviceSpec = "vsock=3:/v".parse().unwrap();
        assert_eq!(spec.kind, Kind::Vsock(3, "/v".into()));
        for bad in
            ["", "rng=x", "block", "block=", "console", "vsock=x:/v", "vsock=3", "rng,without=speed", "net"]
        {
            assert!(bad.parse::<DeviceSpec>().is_err(), "{bad}");
        }
    }
}
