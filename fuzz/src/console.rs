//! A driver and an operator that say anything to the console's control protocol, against a driver that keeps account.
//!
//! Checked: nothing panics; whatever happens, the messages come to an end; nothing is said before DEVICE_READY; a port is
//! added that is not there and below the highest number, removed if it is there, described once it is ready, opened and
//! closed in turns; and when there is nothing more to say, the driver knows exactly the ports that there are.
use device_state::Section;
use virtio_console::MAX_PORTS;
use virtio_console::control::{Header, Heard, Message, Protocol, SavedProtocol, Size, event};

use crate::bytes::Bytes;

/// What a driver knows of a port.
#[derive(Clone, Copy, Default)]
struct Known {
    ready: bool,
    open: bool,
    host_open: bool,
    console: bool,
    name: bool,
}

struct Game {
    max: u32,
    protocol: Protocol,
    /// What the host has.
    ports: Vec<bool>,
    ready: bool,
    known: Vec<Option<Known>>,
    clients: u64,
}

/// The console protocol: see the module.
pub fn console(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let max = 1 + bytes.below(MAX_PORTS as usize) as u32;
    let mut game = Game {
        max,
        protocol: Protocol::new(max),
        ports: vec![false; max as usize],
        ready: false,
        known: vec![None; max as usize],
        clients: 0,
    };
    while !bytes.is_empty() {
        game.turn(&mut bytes);
    }
    game.end();
}

impl Game {
    fn turn(&mut self, bytes: &mut Bytes<'_>) {
        // Numbers that there are not are said as well.
        let id = u32::from(bytes.u8()) % (self.max + 2);
        match bytes.below(10) {
            0 => {
                // Names as a command line lets them through: none has a NUL.
                let name = ["", "a", "b", "a name that is longer"][bytes.below(4)];
                self.protocol.add(id, name, bytes.bool());
                self.has(id, true);
            }
            1 => {
                self.protocol.remove(id);
                self.has(id, false);
            }
            2 => {
                self.clients += 1;
                let client = bytes.bool().then_some(self.clients);
                self.protocol.client(id, client);
            }
            3 => self.protocol.resize(id, Size { cols: bytes.u16(), rows: bytes.u16() }),
            4 | 5 => {
                if let Some(message) = self.protocol.next()
                    && bytes.bool()
                {
                    self.protocol.sent(&message);
                    self.told(&message);
                }
            }
            6 | 7 => {
                let header = Header {
                    id: id.into(),
                    event: (bytes.u16() % 9).into(),
                    value: (bytes.u16() % 3).into(),
                };
                self.say(zerocopy::IntoBytes::as_bytes(&header));
            }
            8 => {
                let count = bytes.below(20);
                let raw = bytes.take(count);
                self.say(raw);
            }
            _ => match bytes.below(3) {
                0 => {
                    self.protocol.reset();
                    self.ready = false;
                    self.known.fill(None);
                }
                1 => {
                    // Onto itself: nothing is different but that clients are others.
                    let state = Section::encode(1, &self.protocol.save()).expect("a state");
                    let saved: SavedProtocol = state.decode(1).expect("what was saved");
                    self.protocol.restore(saved).expect("its own state");
                }
                _ => self.anything(bytes),
            },
        }
    }

    fn has(&mut self, id: u32, there: bool) {
        if let Some(port) = self.ports.get_mut(id as usize) {
            *port = there;
        }
    }

    /// A state from anywhere: what the driver knows is anybody's guess then, but it ends.
    fn anything(&self, bytes: &mut Bytes<'_>) {
        let count = bytes.below(64);
        let state = Section::from_bytes(1, bytes.take(count).to_vec());
        let Ok(saved) = state.decode::<SavedProtocol>(1) else { return };
        let mut protocol = self.protocol.clone();
        if protocol.restore(saved).is_ok() {
            for _ in 0..self.max * 10 {
                let Some(message) = protocol.next() else { return };
                assert!(message.id < self.max);
                protocol.sent(&message);
            }
            panic!("messages without an end");
        }
    }

    fn say(&mut self, said: &[u8]) {
        match self.protocol.hear(said) {
            Heard::Ignored => {}
            Heard::Device(ready) => self.ready = ready,
            // An answer to the port before it: the driver cannot tell them apart, and nor may the device.
            Heard::Port(id, ready) => {
                self.known[id as usize].as_mut().expect("a port that it was told of").ready = ready
            }
            Heard::Open(id, open) => {
                self.known[id as usize].as_mut().expect("a port that it was told of").open = open
            }
        }
        for (id, known) in (0..).zip(&self.known) {
            let takes = self.protocol.takes_input(id);
            assert!(
                !takes || self.ready && known.is_some_and(|known| known.ready && known.open),
                "port {id}"
            );
        }
    }

    fn told(&mut self, message: &Message) {
        assert!(self.ready, "{message:?} before DEVICE_READY (5.3.5)");
        assert!(message.id < self.max, "{message:?} is beyond max_nr_ports (5.3.6.2.1)");
        let known = &mut self.known[message.id as usize];
        match (message.event, known.as_mut()) {
            (event::DEVICE_ADD, None) => *known = Some(Known::default()),
            (event::DEVICE_REMOVE, Some(_)) => *known = None,
            (_, Some(Known { ready: false, .. }) | None) => {
                panic!("{message:?} about a port that is not ready")
            }
            (event::CONSOLE_PORT, Some(known)) => {
                assert!(message.value == 1 && !std::mem::replace(&mut known.console, true));
            }
            (event::PORT_NAME, Some(known)) => {
                assert!(!message.payload.is_empty() && !std::mem::replace(&mut known.name, true));
            }
            (event::RESIZE, Some(known)) => assert!(known.console && message.payload.len() == 4),
            (event::PORT_OPEN, Some(known)) => {
                assert_eq!(u16::from(!known.host_open), message.value, "opened and closed in turns");
                known.host_open = !known.host_open;
            }
            (_, Some(_)) => panic!("{message:?}"),
        }
    }

    /// A driver that answers as it should hears of everything, and then of nothing.
    fn end(&mut self) {
        let ready = Header { id: 0.into(), event: 0.into(), value: 1.into() };
        self.say(zerocopy::IntoBytes::as_bytes(&ready));
        let mut left = self.max * 20;
        while let Some(message) = self.protocol.next() {
            left = left.checked_sub(1).expect("messages come to an end");
            self.protocol.sent(&message);
            self.told(&message);
            if message.event == event::DEVICE_ADD {
                let answer =
                    Header { id: message.id.into(), event: event::PORT_READY.into(), value: 1.into() };
                self.say(zerocopy::IntoBytes::as_bytes(&answer));
            }
        }
        for (id, (there, known)) in self.ports.iter().zip(&self.known).enumerate() {
            assert_eq!(*there, known.is_some(), "port {id}");
        }
    }
}
