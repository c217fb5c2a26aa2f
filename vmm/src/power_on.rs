//! Back to power-on: what KVM keeps of vCPUs, taken when the machine is made and put back at each reset.
//! Devices, buses and the I/O APIC reset themselves.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::Result;

/// Of a vCPU.
pub(crate) struct Processor {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl Processor {
    pub(crate) fn take(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Processor> {
        let mut msrs = Vec::new();
        for index in kvm.get_msr_index_list()?.as_slice() {
            // One by one: KVM lists some that this processor does not have, and stops at the first of them.
            let mut one = of(kvm_msr_entry { index: *index, ..Default::default() })?;
            if vcpu.get_msrs(&mut one).is_ok_and(|count| count == 1) {
                msrs.extend(one.as_slice());
            }
        }
        Ok(Processor {
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs()?,
            fpu: vcpu.get_fpu()?,
            xcrs: vcpu.get_xcrs()?,
            debug: vcpu.get_debug_regs()?,
            lapic: vcpu.get_lapic()?,
            events: vcpu.get_vcpu_events()?,
            state: vcpu.get_mp_state()?,
            msrs,
        })
    }

    pub(crate) fn put(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_sregs(&self.sregs)?;
        // Among them are those by which KVM writes into the guest's memory (its clock above all): off again.
        for msr in &self.msrs {
            // Those that cannot be written have not changed.
            let _ = vcpu.set_msrs(&of(*msr)?);
        }
        vcpu.set_lapic(&self.lapic)?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_fpu(&self.fpu)?;
        vcpu.set_xcrs(&self.xcrs)?;
        vcpu.set_debug_regs(&self.debug)?;
        vcpu.set_vcpu_events(&self.events)?;
        Ok(vcpu.set_mp_state(self.state)?)
    }
}

fn of(msr: kvm_msr_entry) -> Result<Msrs> {
    Msrs::from_entries(&[msr]).map_err(|error| format!("{error:?}").into())
}
