//! Lines and messages through KVM: `KVM_IRQFD` and `KVM_SET_GSI_ROUTING`.
//!
//! The kernel takes the table of routes as a whole only. So it is kept here, and each change of any number of routes is one
//! commit; one that the kernel refuses leaves both tables as they were.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::file::eventfd;
use crate::interrupt::{Event, IrqLine, MessageAction, MessageChange, MessageController, MsiMessage};

/// An interrupt controller in the kernel, of a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// The first 8259A: pins 0 to 7.
    PicMaster,
    /// The second 8259A: pins 0 to 7.
    PicSlave,
    /// The I/O APIC: pins 0 to 23.
    IoApic,
}

/// Where an interrupt with a number (GSI) goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To a pin of an interrupt controller.
    Pin(Chip, u32),
    /// To a vCPU, as a message.
    Message(MsiMessage),
}

/// What each number's interrupts are; a number may have several pins.
type Routes = BTreeMap<u32, Vec<Route>>;

#[derive(Debug)]
struct Table {
    routes: Routes,
    /// Numbers of messages that have their irqfd.
    attached: BTreeSet<u32>,
}

/// The interrupts of a VM. A clone is another handle of the same.
#[derive(Clone, Debug)]
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    table: Arc<Mutex<Table>>,
}

impl KvmInterrupts {
    /// For a VM that has all of its interrupt controllers in the kernel; on x86 with the routes that these begin with: 0 to 15 to
    /// the 8259A pair, 0 to 23 to the I/O APIC.
    ///
    /// There must be one such table a VM only, since a change replaces all routes.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self::with_routes(vm, if cfg!(target_arch = "x86_64") { pc_pins() } else { Routes::new() })
    }

    /// For a VM without an I/O APIC in the kernel (`KVM_CAP_SPLIT_IRQCHIP`): there are no routes yet. Lines are the VMM's own there,
    /// messages work.
    pub fn split(vm: Arc<VmFd>) -> Self {
        Self::with_routes(vm, Routes::new())
    }

    fn with_routes(vm: Arc<VmFd>, routes: Routes) -> Self {
        let table = Table { routes, attached: BTreeSet::new() };
        Self { vm, table: Arc::new(Mutex::new(table)) }
    }

    /// Changes the routes of these numbers, all at once: each to what is given, or to none.
    ///
    /// # Errors
    /// The kernel's; no route has changed then.
    pub fn set_routes(&self, changes: &[(u32, &[Route])]) -> io::Result<()> {
        let changes = changes.iter().map(|&(number, routes)| (number, routes.to_vec())).collect();
        self.lock().change(&self.vm, changes).map(drop)
    }

    /// What a number's interrupts are now.
    pub fn routes(&self, number: u32) -> Vec<Route> {
        self.lock().routes.get(&number).cloned().unwrap_or_default()
    }

    /// Connects a line to the pins that `number` is routed to, as long as the returned value exists. What the line was triggered
    /// before comes through at once.
    ///
    /// # Errors
    /// The kernel's: `EBUSY` if the line is connected already.
    pub fn connect_line(&self, line: &IrqLine, number: u32) -> io::Result<LineConnection> {
        let trigger = eventfd(line.trigger().as_fd())?;
        match line.resample() {
            None => self.vm.register_irqfd(&trigger, number)?,
            Some(resample) => {
                self.vm.register_irqfd_with_resample(&trigger, &eventfd(resample.as_fd())?, number)?
            }
        }
        Ok(LineConnection { vm: self.vm.clone(), trigger, number })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing in here panics between two steps that belong together.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, number: u32, event: &Event) -> io::Result<()> {
        Ok(self.vm.register_irqfd(&eventfd(event.as_fd())?, number)?)
    }

    fn detach(&self, number: u32, event: &Event) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(&eventfd(event.as_fd())?, number)?)
    }

    /// Attaches or detaches, whichever is needed; whether it was.
    fn switch(&self, table: &mut Table, number: u32, event: &Event, on: bool) -> io::Result<bool> {
        if table.attached.contains(&number) == on {
            return Ok(false);
        }
        if on {
            self.attach(number, event)?;
            table.attached.insert(number);
        } else {
            self.detach(number, event)?;
            table.attached.remove(&number);
        }
        Ok(true)
    }
}

impl MessageController for KvmInterrupts {
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()> {
        let mut table = self.lock();
        let routes = changes.iter().filter_map(|change| match change.action {
            MessageAction::Deliver(message) => Some((change.number, vec![Route::Message(message)])),
            // The route stays: unmasking the same message again then needs no commit.
            MessageAction::Hold => None,
            MessageAction::Forget => Some((change.number, Vec::new())),
        });
        // First the routes, so that an irqfd has one when it is attached.
        let before = table.change(&self.vm, routes.collect())?;
        let mut done: Vec<&MessageChange<'_>> = Vec::new();
        for change in changes {
            let on = matches!(change.action, MessageAction::Deliver(_));
            match self.switch(&mut table, change.number, change.event, on) {
                Ok(true) => done.push(change),
                Ok(false) => {}
                Err(error) => {
                    for undo in done.into_iter().rev() {
                        let on = !table.attached.contains(&undo.number);
                        let _ = self.switch(&mut table, undo.number, undo.event, on);
                    }
                    let _ = table.change(&self.vm, before);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl Table {
    /// Commits, if something is new, and returns what has to be changed to be as before.
    fn change(&mut self, vm: &VmFd, changes: Vec<(u32, Vec<Route>)>) -> io::Result<Vec<(u32, Vec<Route>)>> {
        let mut before = Vec::new();
        for (number, routes) in changes {
            if self.routes.get(&number).map_or(&[][..], Vec::as_slice) != routes {
                before.push((number, self.put(number, routes)));
            }
        }
        // A number that was changed twice ends as it was first.
        before.reverse();
        if before.is_empty() {
            return Ok(before);
        }
        if let Err(error) = self.commit(vm) {
            for (number, routes) in before {
                self.put(number, routes);
            }
            return Err(error);
        }
        Ok(before)
    }

    /// Replaces, without telling the kernel; what was there.
    fn put(&mut self, number: u32, routes: Vec<Route>) -> Vec<Route> {
        let old =
            if routes.is_empty() { self.routes.remove(&number) } else { self.routes.insert(number, routes) };
        old.unwrap_or_default()
    }

    fn commit(&self, vm: &VmFd) -> io::Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = self
            .routes
            .iter()
            .flat_map(|(&number, routes)| routes.iter().map(move |route| entry(number, *route)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "more routes than KVM has"))?;
        Ok(vm.set_gsi_routing(&table)?)
    }
}

fn entry(gsi: u32, route: Route) -> kvm_irq_routing_entry {
    let (type_, u) = match route {
        Route::Pin(chip, pin) => {
            let irqchip = match chip {
                Chip::PicMaster => 0,
                Chip::PicSlave => 1,
                Chip::IoApic => 2,
            };
            let irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            (KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1 { irqchip })
        }
        Route::Message(MsiMessage { address, data }) => {
            let msi = kvm_irq_routing_msi {
                address_lo: (address & u64::from(u32::MAX)) as u32,
                address_hi: (address >> 32) as u32,
                data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
            };
            (KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry__bindgen_ty_1 { msi })
        }
    };
    kvm_irq_routing_entry { gsi, type_, flags: 0, pad: 0, u }
}

/// What `KVM_CREATE_IRQCHIP` sets up.
fn pc_pins() -> Routes {
    (0..24)
        .map(|number| {
            let pic = match number {
                0..8 => Some(Route::Pin(Chip::PicMaster, number)),
                8..16 => Some(Route::Pin(Chip::PicSlave, number - 8)),
                _ => None,
            };
            (number, pic.into_iter().chain([Route::Pin(Chip::IoApic, number)]).collect())
        })
        .collect()
}

/// A line that KVM carries; dropping it takes the line off.
#[derive(Debug)]
pub struct LineConnection {
    vm: Arc<VmFd>,
    trigger: EventFd,
    number: u32,
}

impl Drop for LineConnection {
    fn drop(&mut self) {
        // Can only fail if it is not there.
        let _ = self.vm.unregister_irqfd(&self.trigger, self.number);
    }
}
