//! Linux reads entropy through an IOMMU: QEMU emulates Intel's, the rings and buffers have I/O virtual addresses, and the
//! daemon asks QEMU for each translation.

use std::time::Duration;

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;
use backplane_tests::virtio;

const DAEMON: &str = "vhost-device-rng";

/// Reads much, so that buffers are mapped, unmapped and flushed while the device is at work, with two readers.
const SCRIPT: &str = "
	dmesg | grep -q 'DMAR: Intel' || fail \"no IOMMU: $(dmesg | grep -i -e dmar -e iommu | head -3)\"
	[ -n \"$(ls /sys/kernel/iommu_groups)\" ] || fail 'nothing is behind the IOMMU'
	[ \"$(cat /sys/class/misc/hw_random/rng_current)\" = virtio_rng.0 ] || fail \"no virtio_rng\"
	timeout 120 rngtest -c 10 </dev/hwrng 2>/tmp/rngtest
	[ $? -le 1 ] || fail \"rngtest: $(tail -n 1 /tmp/rngtest)\"
	good=$(sed -n 's/.*successes: //p' /tmp/rngtest)
	[ $good -ge 9 ] || fail \"rngtest: $good of 20\"
	for round in 1 2 3; do
		echo virtio0 >/sys/bus/virtio/drivers/virtio_rng/unbind || fail unbind
		echo virtio0 >/sys/bus/virtio/drivers/virtio_rng/bind || fail bind
		timeout 60 head -c 1000 /dev/hwrng | wc -c | grep -qx 1000 || fail \"no bytes in round $round\"
	done
	tell good $good
	virtio_devices
";

/// Boots with an IOMMU; the kernel lets go of translations in this way.
fn through_the_iommu(test: &str, without: &str, strict: bool) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let mut daemon = Daemon::new(DAEMON)?.args(["--without", without, "--log-level", "debug"]);
    daemon.start()?;
    let guest = Guest::new(&lab)
        // Before the devices that are behind it.
        .device("intel-iommu,intremap=on,device-iotlb=on")
        // ATS is a capability of PCI Express, and so of no device of the root bus.
        .device("pcie-root-port,id=root,chassis=1,slot=1")
        .vhost_user("vhost-user-rng-pci,bus=root,iommu_platform=on,ats=on", &daemon.socket())
        .kernel_arguments(&format!("intel_iommu=on iommu=nopt iommu.strict={}", u8::from(strict)))
        .script(SCRIPT)
        .limit(Duration::from_secs(300));
    let outcome = guest.run().and_then(Outcome::success).map_err(|e| e.with_log(DAEMON, &daemon.stderr()))?;
    daemon.check()?;
    let device =
        outcome.devices().into_iter().find(|device| device.id == virtio::RNG).expect("an entropy device");
    assert!(device.has(virtio::ACCESS_PLATFORM), "{:?}", device.feature_names());
    assert_eq!(device.has(virtio::RING_PACKED), without != "ring_packed");
    assert!(outcome.told("good").is_some());
    let translations = daemon.stderr().matches("IotlbMsg").count();
    assert!(translations > 10, "only {translations} IOTLB messages");
    daemon.stop()?;
    Ok(())
}

#[test]
fn iommu_rng_split_strict() -> Result<(), Failure> {
    through_the_iommu("iommu_rng_split_strict", "ring_packed", true)
}

#[test]
fn iommu_rng_split_lazy() -> Result<(), Failure> {
    through_the_iommu("iommu_rng_split_lazy", "ring_packed", false)
}

#[test]
fn iommu_rng_packed_strict() -> Result<(), Failure> {
    through_the_iommu("iommu_rng_packed_strict", "in_order", true)
}

#[test]
fn iommu_rng_packed_lazy() -> Result<(), Failure> {
    through_the_iommu("iommu_rng_packed_lazy", "in_order", false)
}
