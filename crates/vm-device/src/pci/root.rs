//! The root complex: the tree, accesses to it, and what is plugged in and out.
//!
//! Locks, of which none is held while a device or the VMM is called: the tree's, to find functions; each function's, inside of
//! it; and who brings the address map up to date ([`decode`](super::decode)), which takes both. A guest's access to
//! configuration space is served by its own vCPU's thread, the move of a BAR included.
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::bar::{ROM_BAR, Space};
use super::bridge::Window;
use super::builder::{FunctionBuilder, Identity};
use super::config::{ConfigSpace, is_valid};
use super::decode::{self, Decoder};
use super::express::PortKind;
use super::function::{Effects, Function};
use super::slot::{Outcome, PowerIndicator, Slot};
use super::tree::{self, Bus, FUNCTIONS, Node, Path, Port};
use super::{PciDevice, PciError};
use crate::bus::{MmioRange, PioRange};
use crate::dispatch::IoSpace;
use crate::interrupt::{IrqLine, Messages};
use crate::sync::{Mutex, MutexGuard, lock};

/// A port that was added: root port, or port of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(u32);

/// A bus, by where it is. Its number is the guest's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BusId {
    /// The root complex's own.
    Root,
    /// The one behind a port.
    Behind(PortId),
}

/// What is plugged in as one: the functions of a device.
#[derive(Debug)]
pub struct Card {
    pub(crate) functions: Vec<(u8, Arc<Function>)>,
}

impl Card {
    /// A device of one function.
    pub fn single(function: Function) -> Card {
        Card { functions: vec![(0, Arc::new(function))] }
    }

    /// A device of several functions, each with its number.
    ///
    /// # Errors
    /// A number that is above 7 or there twice, or no function 0, without which a guest looks for no other.
    pub fn multifunction(functions: Vec<(u8, Function)>) -> Result<Card, PciError> {
        let mut all: Vec<(u8, Arc<Function>)> = Vec::new();
        for (number, function) in functions {
            if number >= FUNCTIONS || all.iter().any(|(taken, _)| *taken == number) {
                return Err(PciError::FunctionNumber(number));
            }
            all.push((number, Arc::new(function)));
        }
        all.sort_by_key(|(number, _)| *number);
        if all.first().is_none_or(|(number, _)| *number != 0) {
            return Err(PciError::FunctionNumber(0));
        }
        Ok(Card { functions: all })
    }

    /// The bridge from the processors to the root bus, as a guest looks for it at device 0: it does nothing.
    pub fn host_bridge(vendor: u16, device: u16) -> Card {
        let identity = Identity { vendor, device, class: 0x06_0000, ..Identity::default() };
        let builder = FunctionBuilder::new("host bridge", identity);
        // It has no vectors, so that nothing is missing.
        builder.build(None, |_| Arc::new(Nothing)).map_or(Card { functions: Vec::new() }, Card::single)
    }

    /// Its functions, with their numbers.
    pub fn functions(&self) -> &[(u8, Arc<Function>)] {
        &self.functions
    }
}

/// A device that has nothing but configuration space.
struct Nothing;

impl PciDevice for Nothing {
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

/// What a port is.
pub struct PortOptions {
    /// Root port, or which side of a switch.
    pub kind: PortKind,
    /// The number of its slot, for hot plug; up to 8191. Without one, what is behind it is there for good. The upper side of
    /// a switch has none.
    pub slot: Option<u16>,
    /// What it calls itself; the class is that of a bridge whatever is here.
    pub identity: Identity,
    /// Its one vector, for hot plug interrupts by MSI.
    pub messages: Messages,
}

/// What the root complex tells the VMM, from the thread in which it happens: mostly a vCPU's.
#[derive(Debug)]
pub enum PciEvent {
    /// The guest has let go of a card that it was [asked](RootComplex::unplug) for. It is out of the tree; vCPUs that were
    /// inside of it still may be.
    Ejected {
        /// Where it was.
        port: PortId,
        /// What was in the slot.
        card: Card,
    },
    /// The guest has turned a slot on or off; power on is when the link is up. Off resets what is in it.
    Power {
        /// The port of the slot.
        port: PortId,
        /// On or off.
        on: bool,
    },
}

/// What asking for a card came to.
#[derive(Debug)]
pub enum Unplug {
    /// The guest was asked. [`PciEvent::Ejected`] follows when it has let go, which is up to it.
    Asked,
    /// The slot had no power, so that nothing had to be asked.
    Done(Card),
}

/// How the VMM builds the machine around.
pub struct RootOptions {
    /// Bus number of the root bus, and the last one that may be below it.
    pub buses: std::ops::RangeInclusive<u8>,
    /// Where memory BARs may lie. Not where RAM is, or anything else.
    pub memory: Vec<MmioRange>,
    /// Where I/O BARs may lie.
    pub ports: Vec<PioRange>,
    /// The wires of INTA to INTD of device 0 on the root bus. Device n's pins are shifted by n, as bridges do it
    /// (PCI-to-PCI Bridge 1.2, 9.1).
    pub lines: [IrqLine; 4],
    /// Is told what guests do.
    pub events: Box<dyn Fn(PciEvent) + Send + Sync>,
}

pub(crate) struct Inner {
    pub(crate) first_bus: u8,
    last_bus: u8,
    windows: Vec<Window>,
    lines: [IrqLine; 4],
    events: Box<dyn Fn(PciEvent) + Send + Sync>,
    tree: Mutex<Tree>,
    decoder: Decoder,
    /// Accesses to functions that there are not.
    absent: AtomicU64,
    /// The register at port 0xcf8.
    pub(crate) address: AtomicU32,
}

#[derive(Default)]
struct Tree {
    root: Bus,
    ports: u32,
}

/// A PCI hierarchy, with one bus for its root. Clones are the same one.
#[derive(Clone)]
pub struct RootComplex {
    pub(crate) inner: Arc<Inner>,
}

impl RootComplex {
    /// An empty one, whose BARs appear in `space`.
    pub fn new(space: IoSpace, options: RootOptions) -> RootComplex {
        let memory = options.memory.iter().map(|range| Window {
            space: Space::Memory,
            first: range.base().0,
            last: range.last().0,
        });
        let ports = options.ports.iter().map(|range| Window {
            space: Space::Io,
            first: range.base().0.into(),
            last: range.last().0.into(),
        });
        let inner = Inner {
            first_bus: *options.buses.start(),
            last_bus: *options.buses.end(),
            windows: memory.chain(ports).collect(),
            lines: options.lines,
            events: options.events,
            tree: Mutex::new(Tree::default()),
            decoder: Decoder::new(space),
            absent: AtomicU64::new(0),
            address: AtomicU32::new(0),
        };
        RootComplex { inner: Arc::new(inner) }
    }

    /// Adds a port, before the guest runs. A port on the link of another begins a switch.
    ///
    /// # Errors
    /// There is no such bus or device, the place is taken, or a slot is asked for where there is no link.
    pub fn add_port(
        &self,
        bus: BusId,
        device: u8,
        function: u8,
        options: PortOptions,
    ) -> Result<PortId, PciError> {
        let PortOptions { kind, slot, identity, messages } = options;
        if function >= FUNCTIONS {
            return Err(PciError::FunctionNumber(function));
        }
        if slot.is_some_and(|number| number > 0x1fff || !kind.has_link()) {
            return Err(PciError::SlotNumber);
        }
        let mut tree = self.tree();
        let id = PortId(tree.ports);
        let name = format!("{kind:?} port {}", id.0);
        let port = Arc::new(FunctionBuilder::bridge(name, identity).build_port(kind, slot, messages)?);
        let (here, above) = tree::bus_mut(&mut tree.root, bus)?;
        // Ports of one device are added one by one.
        let beside = |((taken, _), node): (&(u8, u8), &Node)| *taken == device && node.port.is_some();
        let joins = function > 0 && here.iter().any(beside);
        if joins && here.contains_key(&(device, function)) {
            return Err(PciError::Occupied);
        }
        if !joins {
            if function != 0 {
                return Err(PciError::FunctionNumber(function));
            }
            tree::check_free(here, above.as_ref().and_then(|port| port.port_kind()), device)?;
        }
        let node = Node { function: port, port: Some(Port { id, bus: Bus::new() }) };
        here.insert((device, function), node);
        if joins {
            here.iter()
                .filter(|(place, _)| place.0 == device)
                .for_each(|(_, node)| node.function.place(true, true));
        }
        tree.ports += 1;
        if let Some(above) = above {
            above.with_slot(Slot::populate);
        }
        drop(tree);
        self.inner.settle();
        Ok(id)
    }

    /// Puts a device onto a bus, where a guest finds it when it looks for devices; it is not told. Into a slot before the
    /// guest runs: [`plug`](Self::plug) is for later.
    ///
    /// # Errors
    /// There is no such bus or device, or the place is taken.
    pub fn add(&self, bus: BusId, device: u8, card: Card) -> Result<(), PciError> {
        self.insert(bus, device, card, Slot::populate)
    }

    /// Plugs a card into a slot while the guest runs, which is told. Leave a slot empty for two seconds after its last card: within one
    /// second from turning it off Linux takes no notice of what appears but for the button, which may mean to it that the new card is
    /// asked back.
    ///
    /// # Errors
    /// There is no such port, it has no slot, or something is in it.
    pub fn plug(&self, port: PortId, card: Card) -> Result<(), PciError> {
        self.slot_of(port)?;
        self.insert(BusId::Behind(port), 0, card, Slot::insert)
    }

    /// Into the tree, and into the slot if there is one.
    fn insert(
        &self,
        bus: BusId,
        device: u8,
        card: Card,
        how: fn(&mut Slot, &mut ConfigSpace) -> Outcome,
    ) -> Result<(), PciError> {
        if card.functions.is_empty() {
            return Err(PciError::FunctionNumber(0));
        }
        let mut tree = self.tree();
        let (here, above) = tree::bus_mut(&mut tree.root, bus)?;
        tree::check_free(here, above.as_ref().and_then(|port| port.port_kind()), device)?;
        let multifunction = card.functions.len() > 1;
        for (number, function) in card.functions {
            function.place(bus == BusId::Root, multifunction);
            here.insert((device, number), Node { function, port: None });
        }
        if let Some(port) = above {
            port.with_slot(how);
        }
        drop(tree);
        self.inner.settle();
        Ok(())
    }

    /// Asks the guest to let go of the card in a slot, by its attention button. Linux waits five seconds, in which pressing
    /// again takes the wish back: so this does not press again while the guest has not answered.
    ///
    /// # Errors
    /// There is no such port, it has no slot, or the slot is empty.
    pub fn unplug(&self, id: PortId) -> Result<Unplug, PciError> {
        let port = self.slot_of(id)?;
        let mut tree = self.tree();
        let node = tree::find(&mut tree.root, id).ok_or(PciError::NoSuchPort)?;
        if node.port.as_ref().is_none_or(|port| port.bus.is_empty()) {
            return Err(PciError::Empty);
        }
        let outcome =
            port.with_slot(
                |slot, config| {
                    if slot.asked_back() { Outcome::default() } else { slot.ask_back(config) }
                },
            );
        let card = if outcome.ejected { self.take_out(node) } else { None };
        drop(tree);
        self.inner.settle();
        Ok(card.map_or(Unplug::Asked, Unplug::Done))
    }

    /// Takes the wish for a card back by pressing the button again. Linux has it that way for five seconds from the first time;
    /// later it means to take the card back into use. Either way the card is not [ejected](PciEvent::Ejected) any more.
    ///
    /// # Errors
    /// There is no such port, it has no slot, or nothing was asked for.
    pub fn cancel_unplug(&self, id: PortId) -> Result<(), PciError> {
        let port = self.slot_of(id)?;
        let mut asked = false;
        port.with_slot(|slot, config| {
            asked = slot.cancel(config);
            Outcome::default()
        });
        if asked { Ok(()) } else { Err(PciError::NotAsked) }
    }

    /// Takes a card out of its slot, whatever the guest thinks of it; it is told afterwards. When this returns no vCPU is
    /// inside of the device, unless it is called by one, or a vCPU does not come out. The card is reset, so that it may be
    /// plugged in again.
    ///
    /// # Errors
    /// There is no such port, it has no slot, or the slot is empty.
    pub fn pull(&self, id: PortId) -> Result<Card, PciError> {
        let port = self.slot_of(id)?;
        let mut tree = self.tree();
        let node = tree::find(&mut tree.root, id).ok_or(PciError::NoSuchPort)?;
        let card = self.take_out(node).ok_or(PciError::Empty)?;
        port.with_slot(Slot::take_out);
        drop(tree);
        self.inner.settle();
        reset(&card);
        Ok(card)
    }

    /// Takes a device off the root bus or a switch's, where the guest is not told of it. Waits as [`pull`](Self::pull) does.
    ///
    /// # Errors
    /// There is no such bus, nothing at this place, or it is a slot's.
    pub fn remove(&self, bus: BusId, device: u8) -> Result<Card, PciError> {
        let mut tree = self.tree();
        let (here, above) = tree::bus_mut(&mut tree.root, bus)?;
        if above.and_then(|port| port.port_kind()).is_some_and(PortKind::has_link) {
            return Err(PciError::NoSuchPort);
        }
        let card = tree::take_card(here, device).ok_or(PciError::Empty)?;
        hide(&card);
        drop(tree);
        self.inner.settle();
        reset(&card);
        Ok(card)
    }

    fn take_out(&self, node: &mut Node) -> Option<Card> {
        let card = tree::take_card(&mut node.port.as_mut()?.bus, 0)?;
        hide(&card);
        Some(card)
    }

    /// What a slot's power indicator shows. `None`: it has no slot.
    ///
    /// # Errors
    /// There is no such port.
    pub fn power_indicator(&self, port: PortId) -> Result<Option<PowerIndicator>, PciError> {
        let shown =
            self.port(port)?.slot(|slot, config| slot.hot_plug().then(|| slot.power_indicator(config)));
        Ok(shown.flatten())
    }

    fn port(&self, id: PortId) -> Result<Arc<Function>, PciError> {
        let mut tree = self.tree();
        Ok(tree::find(&mut tree.root, id).ok_or(PciError::NoSuchPort)?.function.clone())
    }

    fn slot_of(&self, id: PortId) -> Result<Arc<Function>, PciError> {
        let port = self.port(id)?;
        match port.slot(|slot, _| slot.hot_plug()) {
            Some(true) => Ok(port),
            _ => Err(PciError::NoSlot),
        }
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.inner.tree)
    }

    /// Resets all functions and their devices, as the machine's reset does. Cards that were asked back are out then.
    pub fn reset(&self) {
        self.inner.address.store(0, Ordering::Relaxed);
        let functions = tree::functions(&self.tree().root);
        for function in functions {
            let outcome = function.reset();
            if outcome.ejected {
                self.inner.eject(&function);
            }
        }
        self.inner.settle();
    }

    /// The guest reads a function's configuration space. What is not there, or no access that there can be, reads as ones.
    pub fn config_read(&self, bus: u8, device: u8, function: u8, offset: u16, data: &mut [u8]) {
        match self.inner.function_at(bus, device, function) {
            Some(function) if is_valid(offset.into(), data.len()) => function.config_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// The guest writes a function's configuration space. When this returns, its BARs are where it put them.
    pub fn config_write(&self, bus: u8, device: u8, function: u8, offset: u16, data: &[u8]) {
        if let Some(function) = self.inner.function_at(bus, device, function)
            && is_valid(offset.into(), data.len())
        {
            let effects = function.config_write(offset, data);
            self.inner.carry_out(&function, &effects);
            function.config_written(&effects, data);
        }
    }

    /// How many accesses there were to functions that there are not.
    pub fn absent_accesses(&self) -> u64 {
        self.inner.absent.load(Ordering::Relaxed)
    }

    /// How many BARs the guest has put over something that the VMM registered.
    pub fn blocked_bars(&self) -> usize {
        self.inner.decoder.blocked()
    }

    /// Where a BAR (0 to 5, 6 for the expansion ROM) is on the buses now, if it is.
    pub fn bar_address(&self, function: &Arc<Function>, bar: u8) -> Option<u64> {
        self.inner.decoder.address(function, bar)
    }

    /// All functions by their place: device and function number on each bus from the root down.
    pub(crate) fn by_place(&self) -> Vec<(Path, Arc<Function>)> {
        fn collect(bus: &Bus, above: &[(u8, u8)], all: &mut Vec<(Path, Arc<Function>)>) {
            for (place, node) in bus {
                let path: Path = above.iter().copied().chain([*place]).collect();
                all.push((path.clone(), node.function.clone()));
                if let Some(port) = &node.port {
                    collect(&port.bus, &path, all);
                }
            }
        }
        let mut all = Vec::new();
        collect(&self.tree().root, &[], &mut all);
        all
    }

    pub(crate) fn settle(&self) {
        self.inner.settle();
    }

    /// How many bus numbers there are.
    pub(crate) fn buses(&self) -> u64 {
        u64::from(self.inner.last_bus.saturating_sub(self.inner.first_bus)) + 1
    }
}

/// The tree, a line for each function.
impl fmt::Display for RootComplex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (path, function) in self.by_place() {
            let (device, number) = path.last().copied().unwrap_or_default();
            let indent = 2 * path.len().saturating_sub(1);
            write!(f, "{:indent$}{device:02x}.{number} {}", "", function.name())?;
            if function.port_kind().is_some() {
                let (secondary, subordinate) = function.buses();
                write!(f, " [bus {secondary:02x}-{subordinate:02x}]")?;
            }
            for bar in function.bars() {
                let name = if bar.index == ROM_BAR { "ROM".into() } else { format!("BAR{}", bar.index) };
                match self.bar_address(&function, bar.index) {
                    Some(address) => write!(f, " {name} {address:#x}+{:#x}", bar.size)?,
                    None => write!(f, " {name} -+{:#x}", bar.size)?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Debug for RootComplex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootComplex").field("functions", &self.by_place()).finish()
    }
}

/// A card that is out has no power.
fn reset(card: &Card) {
    for (_, function) in &card.functions {
        function.reset();
    }
}

/// Out of the guest's sight: nothing of it is asserted any more.
fn hide(card: &Card) {
    card.functions.iter().for_each(|(_, function)| function.interrupts().connect(None));
}

impl Inner {
    /// The function that an access is for.
    fn function_at(&self, bus: u8, device: u8, function: u8) -> Option<Arc<Function>> {
        let tree = lock(&self.tree);
        let found = if bus == self.first_bus {
            Some(&tree.root)
        } else if (self.first_bus..=self.last_bus).contains(&bus) {
            tree::route(&tree.root, bus)
        } else {
            None
        };
        let found = found.and_then(|bus| bus.get(&(device, function))).map(|node| node.function.clone());
        if found.is_none() {
            self.absent.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// What a write means beyond its function.
    fn carry_out(&self, function: &Arc<Function>, effects: &Effects) {
        let mut changed = effects.decode;
        if effects.reset {
            function.reset();
            changed = true;
        }
        if effects.secondary_reset {
            self.reset_below(function);
            changed = true;
        }
        let Outcome { link, ejected } = effects.slot;
        if link == Some(false) {
            self.reset_below(function);
        }
        let card = if ejected { self.take_card(function) } else { None };
        if link.is_some() || ejected || changed {
            self.settle();
        }
        if let (Some(on), Some(port)) = (link, self.id_of(function)) {
            (self.events)(PciEvent::Power { port, on });
        }
        if let Some((port, card)) = card {
            (self.events)(PciEvent::Ejected { port, card });
        }
    }

    fn reset_below(&self, port: &Arc<Function>) {
        let below = self.with_node(port, |node| node.port.as_ref().map(|port| tree::functions(&port.bus)));
        for function in below.flatten().unwrap_or_default() {
            let outcome = function.reset();
            if outcome.ejected {
                self.eject(&function);
            }
        }
    }

    fn eject(&self, port: &Arc<Function>) {
        if let Some((port, card)) = self.take_card(port) {
            self.settle();
            (self.events)(PciEvent::Ejected { port, card });
        }
    }

    fn take_card(&self, port: &Arc<Function>) -> Option<(PortId, Card)> {
        let taken = self.with_node(port, |node| {
            let port = node.port.as_mut()?;
            let card = tree::take_card(&mut port.bus, 0)?;
            hide(&card);
            Some((port.id, card))
        });
        taken.flatten()
    }

    fn id_of(&self, port: &Arc<Function>) -> Option<PortId> {
        self.with_node(port, |node| node.port.as_ref().map(|port| port.id)).flatten()
    }

    /// The node of a function, if it is still in the tree.
    fn with_node<T>(&self, function: &Arc<Function>, act: impl FnOnce(&mut Node) -> T) -> Option<T> {
        fn search<'a>(bus: &'a mut Bus, function: &Arc<Function>) -> Option<&'a mut Node> {
            for node in bus.values_mut() {
                if Arc::ptr_eq(&node.function, function) {
                    return Some(node);
                }
                if let Some(port) = &mut node.port
                    && let Some(found) = search(&mut port.bus, function)
                {
                    return Some(found);
                }
            }
            None
        }
        search(&mut lock(&self.tree).root, function).map(act)
    }

    /// Pins and address map follow the tree, links and registers.
    fn settle(&self) {
        tree::walk(&lock(&self.tree).root, 0, true, &mut |node, swizzle, visible| {
            let interrupts = node.function.interrupts();
            if let Some(pin) = interrupts.pin() {
                let number = (pin as usize - 1 + swizzle) % 4;
                let line = self.lines.get(number).filter(|_| visible);
                interrupts.connect(line.map(|line| (number, line)));
            }
        });
        self.decoder.refresh(|| {
            let tree = lock(&self.tree);
            (decode::wanted(&tree.root, &self.windows), tree::functions(&tree.root))
        });
    }
}
