//! The guest's RAM, mapped here and known to KVM. The only `unsafe` of this program.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Result;
use crate::layout::RAM_END;

/// RAM from address 0 on, for as long as the returned value and its clones exist; `vm` must not run longer than that.
pub(crate) fn ram(vm: &VmFd, mib: u32) -> Result<GuestMemoryMmap> {
    let bytes = u64::from(mib) << 20;
    if !(64 << 20..=RAM_END).contains(&bytes) {
        return Err(format!("{mib} MiB of memory; the machine has 64 to {}", RAM_END >> 20).into());
    }
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(bytes)?)])?;
    for (slot, region) in (0..).zip(ram.iter()) {
        let start = region.start_addr();
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: ram.get_host_address(start)?.addr() as u64,
        };
        // SAFETY: the region is mapped with this length, and `Machine` drops the mapping behind the VM and its vCPUs. Nobody
        // else in this program refers to it but through `vm-memory` and `GuestRam`, whose accesses are volatile.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(ram)
}
