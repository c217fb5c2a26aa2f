//! The machine: memory, interrupt controllers, buses and what is on them, and the loop of the thread that owns it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::Kvm;
use reactor::{Interest, Reactor, Token};
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{Event, IrqLine, Trigger};
use vm_device::kvm::KvmInterrupts;
use vm_device::legacy::{IO_APIC_LEN, IO_APIC_PINS, IoApic};
use vm_device::pci::{
    BusId, Card, ConfigMemory, ConfigPorts, Identity, PciEvent, PortId, PortKind, PortOptions, RootComplex,
    RootOptions, Unplug,
};
use vm_device::resources::{Claim, INSTANCE_ID_BASE, Pool, ResourceConstraint, SystemAllocator};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_virtio::GuestRam;

use crate::commands::{Command, Commands};
use crate::layout::{
    DEVICE_IRQS, ECAM, IO_APIC, MESSAGES, PCI_IRQS, PCI_MEMORY, PCI_MEMORY_64, PCI_PORTS, POWER, POWER_IRQ,
    SERIAL, SERIAL_IRQ, TSS, VIRTIO_MMIO,
};
use crate::pic::{self, Pic};
use crate::power::{self, End, Power};
use crate::serial::{self, SerialPort};
use crate::vcpu::{Running, Vcpu, Ways};
use crate::virtio::{Board, DeviceSpec, MmioDevice, OnMmio, OnPci};
use crate::{Args, Result, memory};

/// The last bus number that a guest may give out.
pub(crate) const LAST_BUS: u8 = 0xff;
/// A bus has so many devices.
const DEVICES: u8 = 32;

/// A slot behind a root port.
struct Slot {
    port: PortId,
    /// The numbers of the messages of what is in it.
    numbers: Option<Claim>,
}

pub(crate) struct Machine {
    vcpus: Vec<Vcpu>,
    board: Board,
    _buses: IoManager,
    power: Arc<Power>,
    pci: RootComplex,
    slots: Vec<Slot>,
    mmio: Vec<MmioDevice>,
    /// Of devices that are there for good.
    _numbers: Vec<Claim>,
    /// Cards that the guest has let go of, and the file that says that there is one.
    ejected: Receiver<(PortId, Card)>,
    told: Arc<Event>,
    commands: Option<Commands>,
    /// Behind everything that refers to it.
    pub(crate) ram: GuestMemoryMmap,
}

impl Machine {
    pub(crate) fn new(args: &Args) -> Result<Machine> {
        let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
        let vm = Arc::new(kvm.create_vm()?);
        vm.set_tss_address(TSS)?;
        // Local APICs in the kernel, the I/O APIC here.
        let pins = [IO_APIC_PINS.into(), 0, 0, 0];
        vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: pins, ..Default::default() })?;
        let ram = memory::ram(&vm, args.memory_mib)?;
        let interrupts = KvmInterrupts::split(vm.clone());
        let io_apic = Arc::new(IoApic::new(Arc::new(interrupts.clone()), 0));
        let allocator = allocator()?;
        let mut buses = IoManager::new();
        let board =
            Board { vm, ram: GuestRam::new(&ram), interrupts, io_apic, allocator, space: buses.space() };
        let registers = MmioRange::new(MmioAddress(IO_APIC.into()), IO_APIC_LEN)?;
        buses.register_mmio(registers, board.io_apic.clone())?;
        for place in pic::PLACES {
            buses.register_pio(PioRange::new(PioAddress(place), pic::PORTS)?, Arc::new(Pic::default()))?;
        }

        let power = Arc::new(Power::new()?);
        buses.register_pio(PioRange::new(PioAddress(POWER), power::PORTS)?, power.clone())?;
        let line = IrqLine::new(Trigger::Edge)?;
        board.io_apic.connect(SERIAL_IRQ, &line)?;
        let port = SerialPort::new(line.source());
        buses.register_pio(PioRange::new(PioAddress(SERIAL), serial::PORTS)?, Arc::new(port))?;

        let level = || IrqLine::new(Trigger::Level);
        let lines = [level()?, level()?, level()?, level()?];
        for (line, irq) in lines.iter().zip(PCI_IRQS) {
            board.io_apic.connect(irq, line)?;
        }
        let ((eject, ejected), told) = (mpsc::channel(), Arc::new(Event::new()?));
        let pci = root_complex(&mut buses, lines, eject, told.clone())?;

        let mut machine = Machine {
            vcpus: Vec::new(),
            board,
            power,
            pci,
            slots: Vec::new(),
            mmio: Vec::new(),
            _numbers: Vec::new(),
            ejected,
            told,
            commands: args.commands.as_deref().map(Commands::open).transpose()?,
            ram,
            _buses: buses,
        };
        machine.add_devices(args)?;
        for id in 0..args.cpus {
            let ways = Ways { io: machine._buses.vcpu(), io_apic: machine.board.io_apic.clone() };
            machine.vcpus.push(Vcpu::new(&kvm, &machine.board.vm, id, args.cpus, ways)?);
        }
        Ok(machine)
    }

    /// The host bridge, root ports with a slot each, and the devices of the command line.
    fn add_devices(&mut self, args: &Args) -> Result<()> {
        self.pci.add(BusId::Root, 0, Card::host_bridge(0x8086, 0x29c0))?;
        let mut devices = 1..DEVICES;
        let mut place = || devices.next().ok_or("there are more PCI devices than places");
        for number in 1..=args.slots {
            let (messages, numbers) = self.board.messages(1)?;
            let options = PortOptions {
                kind: PortKind::Root,
                slot: Some(number.into()),
                identity: Identity { vendor: 0x1b36, device: 0x000c, ..Identity::default() },
                messages,
            };
            let port = self.pci.add_port(BusId::Root, place()?, 0, options)?;
            self.slots.push(Slot { port, numbers: None });
            self._numbers.push(numbers);
        }
        for spec in &args.pci {
            let (card, numbers) = spec.put(OnPci(&self.board))?;
            self.pci.add(BusId::Root, place()?, card)?;
            self._numbers.push(numbers);
        }
        for spec in &args.mmio {
            self.mmio.push(spec.put(OnMmio(&self.board))?);
        }
        Ok(())
    }

    /// What Linux has to be told of devices that it cannot find.
    pub(crate) fn kernel_arguments(&self) -> String {
        self.mmio.iter().map(|device| format!(" {}", device.argument)).collect()
    }

    /// Starts the first vCPU at this address, and returns when the guest has had enough.
    pub(crate) fn run(&mut self, entry: GuestAddress) -> Result<End> {
        if let Some(first) = self.vcpus.first() {
            first.start_at(entry)?;
        }
        let running = Running::start(std::mem::take(&mut self.vcpus), &self.power)?;
        let served = self.serve();
        if served.is_err() {
            self.power.end(End::Off);
        }
        self.vcpus = running.stop()?;
        served?;
        Ok(self.power.ended().unwrap_or(End::Off))
    }

    /// Resets everything, so that a kernel can be loaded and run again. RAM keeps what is in it, as RAM does.
    pub(crate) fn reset(&mut self) -> Result<()> {
        self.mmio.iter().for_each(MmioDevice::reset);
        self.pci.reset();
        self.note_events();
        self.board.io_apic.reset();
        self.vcpus.iter().try_for_each(Vcpu::reset)?;
        self.power.reset();
        Ok(())
    }

    /// The loop of this thread while vCPUs run.
    fn serve(&mut self) -> Result<()> {
        const POWER: Token = Token::new(0);
        const TOLD: Token = Token::new(1);
        const COMMANDS: Token = Token::new(2);
        let mut reactor = Reactor::new()?;
        reactor.watch(self.power.event().as_fd(), POWER, Interest::READ)?;
        reactor.watch(self.told.as_fd(), TOLD, Interest::READ)?;
        if let Some(commands) = &self.commands {
            reactor.watch(commands.as_fd(), COMMANDS, Interest::READ)?;
        }
        while self.power.ended().is_none() {
            reactor.wait(None)?;
            while let Some(event) = reactor.next() {
                // Nothing is registered by number.
                let (reactor::Event::Ready { token, .. } | reactor::Event::Timer { token }) = event else {
                    continue;
                };
                match token {
                    TOLD => self.note_events(),
                    COMMANDS => self.obey()?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn note_events(&mut self) {
        self.told.take();
        while let Ok((port, card)) = self.ejected.try_recv() {
            drop(card);
            if let Some(number) = self.free(port) {
                eprintln!("slot {number}: ejected");
            }
        }
    }

    /// The card of a slot is gone: its messages' numbers are free. The slot's own number.
    fn free(&mut self, port: PortId) -> Option<usize> {
        let (at, slot) = self.slots.iter_mut().enumerate().find(|(_, slot)| slot.port == port)?;
        slot.numbers = None;
        Some(at + 1)
    }

    fn obey(&mut self) -> Result<()> {
        let Some(commands) = &mut self.commands else { return Ok(()) };
        for line in commands.read()? {
            if let Err(error) = line.parse().map_err(Into::into).and_then(|command| self.carry_out(command)) {
                eprintln!("{line}: {error}");
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Plug(number, spec) => self.plug(number, &spec)?,
            Command::Unplug(number) => {
                let port = self.slot(number)?.port;
                if let Unplug::Done(card) = self.pci.unplug(port)? {
                    drop(card);
                    self.free(port);
                    eprintln!("slot {number}: ejected");
                }
            }
            Command::Pull(number) => {
                let port = self.slot(number)?.port;
                drop(self.pci.pull(port)?);
                self.free(port);
                eprintln!("slot {number}: pulled");
            }
            Command::Show => eprint!("{}", self.pci),
            Command::Off => self.power.end(End::Off),
        }
        Ok(())
    }

    fn plug(&mut self, number: usize, spec: &DeviceSpec) -> Result<()> {
        let port = self.slot(number)?.port;
        let (card, numbers) = spec.put(OnPci(&self.board))?;
        self.pci.plug(port, card)?;
        self.slot(number)?.numbers = Some(numbers);
        Ok(())
    }

    fn slot(&mut self, number: usize) -> Result<&mut Slot> {
        let slot = number.checked_sub(1).and_then(|at| self.slots.get_mut(at));
        Ok(slot.ok_or_else(|| format!("there is no slot {number}"))?)
    }
}

/// What the machine has to give: addresses for virtio-mmio, a PC's interrupts, messages.
fn allocator() -> Result<SystemAllocator> {
    let bytes = VIRTIO_MMIO.end() - VIRTIO_MMIO.start() + 1;
    let (first, last) = (*DEVICE_IRQS.start(), *DEVICE_IRQS.end());
    let start = GuestAddress(*VIRTIO_MMIO.start());
    let allocator = SystemAllocator::new(None, None, start, bytes, first, last, INSTANCE_ID_BASE)
        .ok_or("a range of the layout is empty")?;
    allocator.set_extent(Pool::Msi, (*MESSAGES.start()).into(), (*MESSAGES.end()).into())?;
    // ACPI's, and the numbers of a PC's clock and coprocessor, which Linux keeps for these whether they are there or not.
    for taken in [8, POWER_IRQ, 13] {
        allocator.allocate(&[ResourceConstraint::new_legacy_irq(Some(taken))])?;
    }
    Ok(allocator)
}

/// The root complex, with configuration space by ports and in memory.
fn root_complex(
    buses: &mut IoManager,
    lines: [IrqLine; 4],
    eject: mpsc::Sender<(PortId, Card)>,
    told: Arc<Event>,
) -> Result<RootComplex> {
    let memory = [PCI_MEMORY, PCI_MEMORY_64]
        .map(|window| MmioRange::new(MmioAddress(*window.start()), window.end() - window.start() + 1));
    let ports = PioRange::new(PioAddress(*PCI_PORTS.start()), PCI_PORTS.end() - PCI_PORTS.start() + 1)?;
    let root = RootComplex::new(
        buses.space(),
        RootOptions {
            buses: 0..=LAST_BUS,
            memory: memory.into_iter().collect::<std::result::Result<_, _>>()?,
            ports: vec![ports],
            lines,
            // From a vCPU's thread: what is to be done about it is this machine's thread's. There are no more of these than cards,
            // which a guest does not make; power it can switch as often as it likes.
            events: Box::new(move |event| {
                if let PciEvent::Ejected { port, card } = event
                    && eject.send((port, card)).is_ok()
                {
                    told.signal();
                }
            }),
        },
    );
    buses.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone())))?;
    let memory = ConfigMemory::new(root.clone());
    buses.register_mmio(memory.range(MmioAddress(ECAM))?, Arc::new(memory))?;
    Ok(root)
}
