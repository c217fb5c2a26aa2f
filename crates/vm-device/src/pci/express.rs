//! The PCI Express capability, PCI Express Base 5.0, 7.5.3, by the place that a function has in the tree.
//!
//! Speed and width of a link are what the registers say only: nothing here depends on them.
use super::capability::Capability;
use super::config::{ConfigSpace, Rule};
use super::regs::*;

/// Bytes of the capability, header included.
const LEN: u16 = 0x3c;

/// 16 GT/s.
const SPEED: u16 = 4;
const WIDTH: u16 = 16 << 4;
/// 2.5 to 16 GT/s, as a vector.
const SPEEDS: u32 = 0x1e;

/// What a bridge is in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortKind {
    /// A port of the root complex: a link begins here, with one device at its other end.
    Root,
    /// The upper side of a switch: the bus behind it is the switch's own.
    Upstream,
    /// A port at the lower side of a switch: again a link with one device.
    Downstream,
}

impl PortKind {
    /// Whether the bus behind it is a link, on which there is device 0 only.
    pub fn has_link(self) -> bool {
        self != PortKind::Upstream
    }
}

/// The place of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A device on the root bus.
    Integrated,
    /// A device at the end of a link.
    Endpoint,
    /// A bridge, and the number of its slot, if it has one.
    Port(PortKind, Option<u16>),
}

impl Place {
    /// The device/port type, 7.5.3.2.
    fn code(self) -> u16 {
        match self {
            Place::Endpoint => 0,
            Place::Port(PortKind::Root, _) => 4,
            Place::Port(PortKind::Upstream, _) => 5,
            Place::Port(PortKind::Downstream, _) => 6,
            Place::Integrated => 9,
        }
    }
}

// Slot capabilities, 7.5.3.9.
const BUTTON_PRESENT: u32 = 1 << 0;
const POWER_CONTROLLER: u32 = 1 << 1;
const ATTENTION_INDICATOR: u32 = 1 << 3;
const POWER_INDICATOR: u32 = 1 << 4;
const SURPRISE: u32 = 1 << 5;
const HOT_PLUG: u32 = 1 << 6;

/// Reserves the capability; [`place`] fills it.
pub(crate) fn capability() -> Capability {
    Capability::new(CAP_EXPRESS, vec![0; usize::from(LEN - 2)])
}

/// Fills the capability at `at` for a place. Done before a guest can see the function, and again only when it is gone from
/// the guest's sight.
pub(crate) fn place(config: &mut ConfigSpace, at: u16, place: Place) {
    let mut body = [0; LEN as usize - 2];
    let mut put = |offset: u16, value: u32, width: usize| {
        let from = usize::from(offset) - 2;
        body[from..from + width].copy_from_slice(&value.to_le_bytes()[..width]);
    };
    let mut rules = vec![
        // Error reporting, relaxed ordering, payload, no snoop, read request size; 7.5.3.4.
        Rule { at: EXP_DEVICE_CONTROL, width: 2, write: 0x78ff, clear: 0 },
        Rule { at: 0x0a, width: 2, write: 0, clear: 0x000f },
        // Completion timeout disable, 7.5.3.16.
        Rule { at: 0x28, width: 2, write: 0x0010, clear: 0 },
    ];
    let port = match place {
        Place::Port(kind, slot) => Some((kind, slot)),
        _ => None,
    };
    let slot = port.and_then(|(kind, slot)| slot.filter(|_| kind.has_link()));
    put(EXP_FLAGS, u32::from(2 | place.code() << 4 | u16::from(slot.is_some()) << 8), 2);
    // Role-based error reporting; function level reset for all but ports.
    put(0x04, 1 << 15 | u32::from(port.is_none()) << 28, 4);
    put(EXP_DEVICE_CONTROL, 0x2810, 2);
    put(0x24, 1 << 4, 4);
    if place != Place::Integrated {
        let below = port.is_some_and(|(kind, _)| kind.has_link());
        // A port says by the link's state when a device is there, 7.5.3.6.
        let link = u32::from(SPEED | WIDTH) | u32::from(below) << 20;
        put(EXP_LINK_CAPABILITIES, link, 4);
        put(EXP_LINK_STATUS, u32::from(SPEED | WIDTH), 2);
        put(0x2c, SPEEDS, 4);
        put(0x30, u32::from(SPEED), 2);
        // ASPM, common clock, extended synch; a port's link can be disabled; 7.5.3.7.
        let control = if below { 0x00d3 } else { 0x00cb };
        rules.push(Rule { at: EXP_LINK_CONTROL, width: 2, write: control, clear: 0 });
        rules.push(Rule { at: 0x30, width: 2, write: 0x000f, clear: 0 });
        if below {
            rules.push(Rule { at: EXP_LINK_STATUS, width: 2, write: 0, clear: 0xc000 });
        }
    }
    if let Some(number) = slot {
        let parts = BUTTON_PRESENT | POWER_CONTROLLER | ATTENTION_INDICATOR | POWER_INDICATOR;
        put(0x14, parts | SURPRISE | HOT_PLUG | u32::from(number & 0x1fff) << 19, 4);
        // All but the latch sensor's and the interlock's bits, 7.5.3.10 and 7.5.3.11.
        rules.push(Rule { at: EXP_SLOT_CONTROL, width: 2, write: 0x17fb, clear: 0 });
        rules.push(Rule { at: EXP_SLOT_STATUS, width: 2, write: 0, clear: 0x011b });
    }
    if let Some((PortKind::Root, _)) = port {
        // Which errors and power events interrupt, 7.5.3.12.
        rules.push(Rule { at: 0x1c, width: 2, write: 0x000f, clear: 0 });
        rules.push(Rule { at: 0x20, width: 4, write: 0, clear: 1 << 16 });
    }
    config.define(at + 2, &body);
    for register in (EXP_FLAGS..LEN).step_by(2) {
        config.rule(&Rule { at: at + register, width: 2, write: 0, clear: 0 });
    }
    for rule in rules {
        config.rule(&Rule { at: at + rule.at, ..rule });
    }
}
