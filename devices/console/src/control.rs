//! The control messages of MULTIPORT (virtio 1.4, 5.3.6.2) as pure code: what the driver is told about ports, and what
//! it says. No queue and no file is known here.
//!
//! There is no list of messages to send. For each port there is what the host *has* and what the driver *was told*; the
//! next message is the first difference, so nothing is ever lost for want of a buffer, nothing grows, and a device that is
//! restored elsewhere tells the driver what is different there. A client that came in place of another differs from it
//! by its number: the driver hears of the close in between.
//!
//! Invariants: nothing is sent before DEVICE_READY with value 1 (5.3.5); a port is added once and below the highest number
//! (5.3.6.2.1); only what was added is removed (5.3.6.2.1); details of a port follow its PORT_READY.
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most ports of a device: two queues each, and two for control, are the 64 queues that are offered at most.
pub const MAX_PORTS: u32 = 31;

/// Longest name of a port in bytes: it fits a control buffer of a page with room to spare.
pub const MAX_NAME: usize = 255;

/// What a control message is about (5.3.6.2).
pub mod event {
    /// The driver is ready for control messages (1), or failed (0).
    pub const DEVICE_READY: u16 = 0;
    /// The device has a new port.
    pub const DEVICE_ADD: u16 = 1;
    /// The device has a port no more.
    pub const DEVICE_REMOVE: u16 = 2;
    /// The driver is ready for the port (1), or failed (0).
    pub const PORT_READY: u16 = 3;
    /// The port is a console.
    pub const CONSOLE_PORT: u16 = 4;
    /// The size of a console; columns and rows follow.
    pub const RESIZE: u16 = 5;
    /// One side of a port was opened (1) or closed (0).
    pub const PORT_OPEN: u16 = 6;
    /// The name of a port follows.
    pub const PORT_NAME: u16 = 7;
}

/// `struct virtio_console_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Port number.
    pub id: U32,
    /// See [`event`].
    pub event: U16,
    /// Extra information.
    pub value: U16,
}

/// Size of a console in characters. 0 is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A message to the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Port number.
    pub id: u32,
    /// See [`event`].
    pub event: u16,
    /// Extra information.
    pub value: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Message {
    /// As it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = Header { id: self.id.into(), event: self.event.into(), value: self.value.into() };
        [header.as_bytes(), &self.payload].concat()
    }
}

/// What the driver said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing that makes sense: too short, an unknown event, a port that it does not have.
    Ignored,
    /// It is ready, or not, for control messages.
    Device(bool),
    /// It is ready, or not, for this port.
    Port(u32, bool),
    /// It has opened, or closed, its side of this port.
    Open(u32, bool),
}

/// A port as the host has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Port {
    name: String,
    console: bool,
    /// The number of the client that is there.
    client: Option<u64>,
    size: Size,
}

/// What the driver was told about a port, and what it said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Told {
    added: bool,
    console: bool,
    name: bool,
    client: Option<u64>,
    size: Size,
    ready: bool,
    open: bool,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    port: Option<Port>,
    told: Told,
    /// What the driver knows is another port than the one that is there: it has to go first.
    stale: bool,
}

impl Slot {
    fn next(&self, id: u32) -> Option<Message> {
        let message = |event, value| Some(Message { id, event, value, payload: Vec::new() });
        let told = &self.told;
        let port = match &self.port {
            _ if told.added && self.stale => return message(event::DEVICE_REMOVE, 0),
            None if told.added => return message(event::DEVICE_REMOVE, 0),
            None => return None,
            Some(_) if !told.added => return message(event::DEVICE_ADD, 0),
            Some(_) if !told.ready => return None,
            Some(port) => port,
        };
        if port.console && !told.console {
            return message(event::CONSOLE_PORT, 1);
        }
        if !port.name.is_empty() && !told.name {
            let payload = port.name.as_bytes().to_vec();
            return Some(Message { id, event: event::PORT_NAME, value: 1, payload });
        }
        if port.console && port.size != told.size && port.size != Size::default() {
            let payload = [port.size.cols.to_le_bytes(), port.size.rows.to_le_bytes()].concat();
            return Some(Message { id, event: event::RESIZE, value: 0, payload });
        }
        match (told.client, port.client) {
            (told, now) if told == now => None,
            (Some(_), _) => message(event::PORT_OPEN, 0),
            (None, _) => message(event::PORT_OPEN, 1),
        }
    }

    /// The driver was told this.
    fn sent(&mut self, event: u16, value: u16) {
        let told = &mut self.told;
        match (event, &self.port) {
            (event::DEVICE_REMOVE, _) => {
                *told = Told::default();
                self.stale = false;
            }
            (event::DEVICE_ADD, _) => *told = Told { added: true, ..Told::default() },
            (event::CONSOLE_PORT, _) => told.console = true,
            (event::PORT_NAME, _) => told.name = true,
            (event::RESIZE, Some(port)) => told.size = port.size,
            (event::PORT_OPEN, Some(port)) => told.client = if value == 1 { port.client } else { None },
            _ => {}
        }
    }
}

/// What is remembered of the dialogue with a driver, for a saved device.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct SavedProtocol {
    ready: bool,
    /// Ports that the driver knows, with the name and whether it was a console: another one there is another port.
    ports: Vec<(u32, String, bool, Told)>,
}

/// A state that cannot be of a device with this many ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the state has a port {0}, which there cannot be")]
pub struct WrongPort(pub u32);

/// The device's side of the control queues.
#[derive(Clone, Debug)]
pub struct Protocol {
    ready: bool,
    slots: Vec<Slot>,
    /// Whose turn is next, so that a port whose clients come and go all the time does not keep the others' messages back.
    turn: usize,
    /// It was said, heard or restored what the driver knows.
    met: bool,
    /// What the driver knows was concluded; its own word counts more.
    guessed: bool,
    ignored: u64,
}

impl Protocol {
    /// For ports 0 to `max` - 1, of which none is there yet.
    pub fn new(max: u32) -> Protocol {
        let count = usize::try_from(max.min(MAX_PORTS)).unwrap_or(0);
        Protocol {
            ready: false,
            slots: vec![Slot::default(); count],
            turn: 0,
            met: false,
            guessed: false,
            ignored: 0,
        }
    }

    fn slot(&mut self, id: u32) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(id).ok()?)
    }

    fn told(&self, id: u32) -> Option<&Told> {
        let slot = self.slots.get(usize::try_from(id).ok()?)?;
        // What it says about a port that is gone is of no use to anybody.
        (!slot.stale && slot.port.is_some()).then_some(&slot.told)
    }

    /// The host has a port of this number from now on, in place of whichever was there.
    pub fn add(&mut self, id: u32, name: &str, console: bool) {
        let Some(slot) = self.slot(id) else { return };
        slot.stale = slot.told.added;
        slot.port = Some(Port { name: name.to_owned(), console, ..Port::default() });
    }

    /// The host has no port of this number any more.
    pub fn remove(&mut self, id: u32) {
        let Some(slot) = self.slot(id) else { return };
        slot.stale = slot.told.added;
        slot.port = None;
    }

    /// The client of a port on the host's side: numbers are never used twice.
    pub fn client(&mut self, id: u32, client: Option<u64>) {
        if let Some(port) = self.slot(id).and_then(|slot| slot.port.as_mut()) {
            port.client = client;
        }
    }

    /// The size of a port that is a console.
    pub fn resize(&mut self, id: u32, size: Size) {
        if let Some(port) = self.slot(id).and_then(|slot| slot.port.as_mut()) {
            port.size = size;
        }
    }

    /// Whether it is known what the driver knows.
    pub fn is_met(&self) -> bool {
        self.met
    }

    /// Goes on with a driver that had another device before this one, of a process that was killed, which nothing was saved
    /// of: it has said DEVICE_READY, and that is never said again. If `told`, it knows the ports that are here, in use as
    /// they were: adding them once more is forbidden (5.3.6.2.1), and taking them away would end their users. It is told of their
    /// size, and that whoever was there is gone.
    pub fn take_over(&mut self, told: bool) {
        if self.met {
            return;
        }
        (self.ready, self.met, self.guessed) = (true, true, true);
        for slot in self.slots.iter_mut().filter(|_| told) {
            let Some(port) = &slot.port else { continue };
            slot.told = Told {
                added: true,
                console: port.console,
                name: !port.name.is_empty(),
                client: Some(u64::MAX),
                size: Size::default(),
                ready: true,
                open: true,
            };
        }
    }

    /// Whether the driver takes input for the port: it is ready for it and has opened it.
    pub fn takes_input(&self, id: u32) -> bool {
        self.ready && self.told(id).is_some_and(|told| told.ready && told.open)
    }

    /// Whether the driver has opened the port.
    pub fn is_open(&self, id: u32) -> bool {
        self.told(id).is_some_and(|told| told.open)
    }

    /// Messages of the driver that made no sense.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The next message to the driver. Tell by [`Self::sent`] when it has it.
    pub fn next(&self) -> Option<Message> {
        if !self.ready {
            return None;
        }
        let slots = (0u32..).zip(&self.slots);
        let (before, after) = (slots.clone().take(self.turn), slots.skip(self.turn));
        after.chain(before).find_map(|(id, slot)| slot.next(id))
    }

    /// The driver has what [`Self::next`] gave.
    pub fn sent(&mut self, message: &Message) {
        let Some(slot) = self.slot(message.id) else { return };
        slot.sent(message.event, message.value);
        // A port is described without others in between.
        if message.event == event::PORT_OPEN || message.event == event::DEVICE_REMOVE {
            self.turn = usize::try_from(message.id).map_or(0, |id| id + 1);
        }
    }

    /// The driver sent this. What does not make sense is ignored and counted.
    pub fn hear(&mut self, bytes: &[u8]) -> Heard {
        self.met = true;
        let heard = self.understand(bytes);
        self.ignored += u64::from(heard == Heard::Ignored);
        heard
    }

    fn understand(&mut self, bytes: &[u8]) -> Heard {
        let Ok((header, _)) = Header::read_from_prefix(bytes) else { return Heard::Ignored };
        let (id, yes) = (header.id.get(), header.value.get() != 0);
        if header.event.get() == event::DEVICE_READY {
            if std::mem::take(&mut self.guessed) {
                // It was about to begin when the predecessor ended.
                self.slots.iter_mut().for_each(|slot| slot.told = Told::default());
            }
            self.ready = yes;
            return Heard::Device(yes);
        }
        let known = |slot: &&mut Slot| slot.told.added && !slot.stale && slot.port.is_some();
        let ready = self.ready;
        let Some(slot) = self.slot(id).filter(known).filter(|_| ready) else { return Heard::Ignored };
        match header.event.get() {
            event::PORT_READY => {
                slot.told.ready = yes;
                Heard::Port(id, yes)
            }
            event::PORT_OPEN => {
                slot.told.open = yes;
                Heard::Open(id, yes)
            }
            _ => Heard::Ignored,
        }
    }

    /// The device was reset: the driver knows of nothing.
    pub fn reset(&mut self) {
        let Protocol { ready, slots, turn, met, guessed, ignored: _ } = self;
        (*ready, *turn, *met, *guessed) = (false, 0, false, false);
        for slot in slots {
            slot.told = Told::default();
            slot.stale = false;
        }
    }

    /// What there is to remember.
    pub fn save(&self) -> SavedProtocol {
        let known = |(id, slot): (u32, &Slot)| {
            let port = slot.port.as_ref().filter(|_| !slot.stale);
            // A port that has to go has a name that no port of the other side can have.
            let (name, console) = port.map_or(("\0".into(), false), |port| (port.name.clone(), port.console));
            slot.told.added.then_some((id, name, console, slot.told))
        };
        SavedProtocol { ready: self.ready, ports: (0..).zip(&self.slots).filter_map(known).collect() }
    }

    /// Goes on where a saved device was. Ports that are others here are taken away and added.
    ///
    /// # Errors
    /// A port of a number that there is not; nothing has changed then.
    pub fn restore(&mut self, saved: SavedProtocol) -> Result<(), WrongPort> {
        for (id, ..) in &saved.ports {
            self.slot(*id).ok_or(WrongPort(*id))?;
        }
        self.reset();
        (self.ready, self.met) = (saved.ready, true);
        for (id, name, console, told) in saved.ports {
            let Some(slot) = self.slot(id) else { continue };
            let same = slot.port.as_ref().is_some_and(|port| port.name == name && port.console == console);
            slot.stale = !same;
            // Clients of the other host are none of ours, whatever their numbers: the close comes first.
            let client = told.client.map(|_| u64::MAX);
            slot.told = Told { added: true, client, ..told };
        }
        Ok(())
    }
}
