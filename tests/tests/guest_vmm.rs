//! Linux, with its own drivers, on our buses: virtio-mmio and virtio-pci, our root complex, MSI-X, pins, hot plug by pciehp, in the
//! VMM of this repository (`vmm/`), which runs inside of the lab's guest, since few hosts of tests can run a 64-bit guest themselves.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::time::Duration;

use backplane_tests::bundle::Bundle;
use backplane_tests::cpio::Archive;
use backplane_tests::daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::{self, Lab};
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio;

const VMM: &str = "backplane-vmm";
const OUTER: &str = include_str!("guest_vmm/outer.sh");
const INNER: &str = include_str!("guest_vmm/inner.sh");

/// The socket device.
const VSOCK: u32 = 19;
const CONSOLE: u32 = 3;
const NOTIFICATION_DATA: u32 = 38;
const RING_RESET: u32 = 40;

#[test]
fn linux_on_our_buses() -> Result<(), Failure> {
    let Some(lab) = lab::require("linux_on_our_buses") else { return Ok(()) };
    let vmm = daemon::find(VMM)?;
    let bundle = Bundle::new(&[&vmm])?;
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let software = scratch.join("software");
    archive(&lab, &software).map_err(Failure::io("write the inner guest's software"))?;
    let outcome = Guest::new(&lab)
        .memory_mib(1024)
        // Several would wait for each other in loops, which cost most of all.
        .cpus(1)
        .time_by_instructions()
        .archive(&bundle.path())
        .archive(&software)
        .limit(Duration::from_secs(600))
        .script(&format!("VMM='{}'\n{OUTER}", Bundle::command(&vmm)))
        .run()?
        .success()?;
    let seen = Seen(&outcome);
    let check = || -> Result<(), String> {
        seen.devices()?;
        seen.disks()?;
        seen.messages()?;
        seen.bars()?;
        seen.comes_and_goes()?;
        seen.pins()
    };
    check().map_err(|what| Failure::new(what).with_log("the guest's console", &outcome.console))
}

/// The inner guest's kernel and its script.
fn archive(lab: &Lab, path: &std::path::Path) -> std::io::Result<()> {
    let mut archive = Archive::after(BufWriter::new(File::create(path)?), 0)?;
    archive.file("vmlinux", 0o644, &fs::read(&lab.vmlinux)?)?;
    archive.file("inner.sh", 0o755, INNER.as_bytes())?;
    archive.finish().map(drop)
}

struct Seen<'a>(&'a Outcome);

fn expect(is_so: bool, what: &str) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(what.to_owned()) }
}

impl Seen<'_> {
    /// All lines that were told with these first words, in order.
    fn all(&self, key: &str) -> Vec<Vec<&str>> {
        let lines =
            self.0.console.lines().filter_map(|line| line.split_once("LAB-TELL ")?.1.strip_prefix(key));
        lines.map(|rest| rest.split_whitespace().collect()).collect()
    }

    fn told(&self, key: &str) -> Result<&str, String> {
        self.0.told(key).map(str::trim).ok_or_else(|| format!("the guest did not tell {key:?}"))
    }

    /// Both buses, both ring layouts; each driver runs its device.
    fn devices(&self) -> Result<(), String> {
        let devices = self.0.devices();
        let all = |id| devices.iter().filter(move |device| device.id == id);
        expect(devices.len() == 8, "three devices on virtio-mmio and five on PCI")?;
        for device in &devices {
            expect(device.status == virtio::RUNNING, &format!("{} does not run", device.name))?;
            expect(device.has(virtio::VERSION_1), "features")?;
        }
        for (id, packed) in [(virtio::RNG, 2), (virtio::BLOCK, 2), (VSOCK, 1), (CONSOLE, 1)] {
            let count = all(id).filter(|device| device.has(virtio::RING_PACKED)).count();
            expect(count == packed, &format!("{count} packed devices of type {id}"))?;
        }
        let split = all(virtio::RNG).filter(|device| !device.has(virtio::RING_PACKED)).count();
        expect(split == 2, "an entropy device with a split ring on each bus")?;
        // Linux has it over PCI only.
        let resets = devices.iter().filter(|device| device.has(RING_RESET)).count();
        expect(resets == 5, "queues of PCI devices can be reset by themselves")?;
        let data = devices.iter().filter(|device| device.has(NOTIFICATION_DATA)).count();
        expect(data == 7, "notifications carry data, but of one device")?;
        expect(self.told("vsock")? == "HELLO", "a line through the socket device and back")
    }

    /// What the guest read is what was in the image, what it wrote is in the image, on both buses.
    fn disks(&self) -> Result<(), String> {
        for bus in ["mmio", "pci"] {
            let of = |key: &str| {
                self.all(key).first().and_then(|words| words.first().map(|sum| (*sum).to_owned()))
            };
            let first = |what: &str| of(what).ok_or_else(|| format!("the guest did not tell {what:?}"));
            let read = first(&format!("disk {bus} before"))?;
            expect(
                read == first(&format!("image {bus} before"))?,
                &format!("the {bus} disk was not read right"),
            )?;
            let written = first(&format!("disk {bus} written"))?;
            expect(
                written == first(&format!("image {bus} after"))?,
                &format!("the {bus} disk was not written"),
            )?;
            expect(
                written == first(&format!("disk {bus} after"))?,
                &format!("the {bus} disk lost what was written"),
            )?;
        }
        Ok(())
    }

    /// Interrupts of virtio devices by controller and name, before the first line that says `end`.
    fn interrupts(&self, end: &str) -> Vec<(String, String, u64)> {
        let until = self.0.console.find(&format!("LAB-TELL {end}")).unwrap_or(self.0.console.len());
        let lines = self.0.console.get(..until).unwrap_or_default().lines();
        let words = lines.filter_map(|line| line.split_once("LAB-TELL irq ").map(|(_, rest)| rest));
        words
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (controller, name) = (words.next()?.to_owned(), words.next()?.to_owned());
                Some((controller, name, words.next()?.parse().ok()?))
            })
            .collect()
    }

    /// MSI-X on PCI, a vector for each queue, which counts; an edge of the I/O APIC for each device on virtio-mmio.
    fn messages(&self) -> Result<(), String> {
        let seen = self.interrupts("messages done");
        let messages: Vec<_> = seen.iter().filter(|(chip, ..)| chip.starts_with("PCI-MSIX-")).collect();
        for queue in ["input", "req.0", "rx", "tx"] {
            let counted = messages.iter().any(|(_, name, n)| name.ends_with(&format!("-{queue}")) && *n > 0);
            expect(counted, &format!("no message of a queue named {queue}: {seen:?}"))?;
        }
        let configs = messages.iter().filter(|(_, name, _)| name.ends_with("-config")).count();
        expect(configs == 5, "five vectors for the configuration")?;
        let mmio: Vec<_> = seen.iter().filter(|(chip, ..)| chip == "IO-APIC").collect();
        expect(mmio.len() == 3 && mmio.iter().all(|(.., n)| *n > 0), &format!("three edges: {seen:?}"))
    }

    /// Linux and our root complex agree where BARs are.
    fn bars(&self) -> Result<(), String> {
        let mut guest: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
        for words in self.all("bar ") {
            let [function, bar, first, size] = words[..] else { return Err("a BAR of four words".into()) };
            // Only bus 0: the VMM shows devices by place.
            let Some(place) = function.strip_prefix("0000:00:") else { continue };
            let number = |text: &str| text.parse().map_err(|_| format!("{text} is no number"));
            guest.insert((place.to_owned(), format!("BAR{bar}")), (number(first)?, number(size)?));
        }
        let mut ours: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
        for line in self.0.console.lines().filter(|line| line.contains(" BAR")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(place) = words.first() else { continue };
            for pair in words.windows(2) {
                let [name, at] = pair else { continue };
                let Some((first, size)) = at.split_once("+").filter(|_| name.starts_with("BAR")) else {
                    continue;
                };
                let number = |text: &str| {
                    let hex = text.strip_prefix("0x").ok_or_else(|| format!("{line}: not decoded"))?;
                    u64::from_str_radix(hex, 16).map_err(|_| format!("{text} is no number"))
                };
                ours.insert(((*place).to_owned(), (*name).to_owned()), (number(first)?, number(size)?));
            }
        }
        expect(ours.len() == 10, &format!("two BARs of each of five devices: {ours:x?}"))?;
        expect(guest == ours, &format!("BARs are in two places: {guest:x?} {ours:x?}"))
    }

    /// Drivers that let go and come back, devices that go and come back, cards.
    fn comes_and_goes(&self) -> Result<(), String> {
        expect(self.told("again")?.starts_with("0000:00:"), "a device is removed and found again")?;
        for round in ["1", "2"] {
            expect(self.told(&format!("plugged {round}"))? == "1", "pciehp turns the slot on")?;
            expect(self.told(&format!("unplugged {round}"))? == "0", "pciehp sees an empty slot")?;
        }
        let ejected = self.0.console.matches("slot 1: ejected").count();
        expect(ejected == 2, &format!("the VMM has its card back twice, not {ejected} times"))?;
        expect(
            self.told("hot before")? == self.told("image hot before")?,
            "a disk that was plugged in is read",
        )?;
        expect(self.0.console.contains("slot 2: pulled"), "a card is pulled")?;
        expect(self.told("plugged again")? == "0x1044", "another takes its place, and stays")?;
        self.told("messages done").map(drop)
    }

    /// The same devices with INTA to INTD, and a machine that was reset.
    fn pins(&self) -> Result<(), String> {
        let all = self.interrupts("pins done");
        let seen = &all[self.interrupts("messages done").len()..];
        let pins: Vec<_> = seen.iter().filter(|(chip, ..)| chip == "IO-APIC").collect();
        // A disk on virtio-mmio, two devices on PCI and the console, in two lives.
        expect(pins.len() == seen.len() && pins.len() == 8, &format!("lines only: {seen:?}"))?;
        expect(pins.iter().all(|(.., n)| *n > 0), &format!("each of them counted: {seen:?}"))?;
        self.told("rebooted")?;
        self.told("pins done").map(drop)
    }
}
