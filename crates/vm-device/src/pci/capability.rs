//! Capabilities and extended capabilities: lists of structures in configuration space behind the header (PCI Local Bus 3.0,
//! 6.7; PCI Express Base 5.0, 7.6).
//!
//! A structure is given as its bytes and write masks. [`Lists`] places one behind the other and chains them, so they cannot
//! overlap; what does not fit is refused.
use super::PciError;
use super::config::{ConfigSpace, Rule};
use super::regs::*;

/// A structure to be put into configuration space: what it holds behind its header, and what the guest may write of it.
#[derive(Clone, Debug)]
pub struct Capability {
    id: u8,
    body: Vec<u8>,
    rules: Vec<Rule>,
    watched: bool,
}

impl Capability {
    /// The identifier that a vendor's own structures have.
    pub const VENDOR: u8 = 0x09;

    /// A capability with this identifier. `body` is what follows the two bytes of identifier and next pointer; all of it is
    /// read-only.
    pub fn new(id: u8, body: impl Into<Vec<u8>>) -> Capability {
        Capability { id, body: body.into(), rules: Vec::new(), watched: false }
    }

    /// Lets the guest write these bits of the `width` (1, 2 or 4) bytes at `offset` from the beginning of the capability.
    /// What lies outside of it is left alone.
    pub fn writable(mut self, offset: u16, width: u16, bits: u32) -> Capability {
        self.rules.push(Rule { at: offset, width, write: bits, clear: 0 });
        self
    }

    pub(crate) fn rules(mut self, rules: &[Rule]) -> Capability {
        self.rules.extend(rules);
        self
    }

    /// Reads and writes of this capability have effects: the device is told of each
    /// ([`PciDevice::capability_read`](super::PciDevice::capability_read),
    /// [`capability_write`](super::PciDevice::capability_write)).
    pub fn watched(mut self) -> Capability {
        self.watched = true;
        self
    }
}

/// An extended capability, for which a PCI Express function has the space behind byte 256.
#[derive(Clone, Debug)]
pub struct ExtendedCapability {
    id: u16,
    version: u8,
    body: Vec<u8>,
    rules: Vec<Rule>,
}

impl ExtendedCapability {
    /// An extended capability with this identifier and version (0 to 15). `body` is what follows the header of four bytes;
    /// all of it is read-only.
    pub fn new(id: u16, version: u8, body: impl Into<Vec<u8>>) -> ExtendedCapability {
        ExtendedCapability { id, version: version & 15, body: body.into(), rules: Vec::new() }
    }

    /// The device's serial number, PCI Express Base 5.0, 7.9.3: by it a guest sees that another card is in the slot.
    pub fn serial_number(number: u64) -> ExtendedCapability {
        ExtendedCapability::new(EXT_SERIAL, 1, number.to_le_bytes())
    }

    /// Lets the guest write these bits of the `width` (1, 2 or 4) bytes at `offset` from the beginning of the capability.
    pub fn writable(mut self, offset: u16, width: u16, bits: u32) -> ExtendedCapability {
        self.rules.push(Rule { at: offset, width, write: bits, clear: 0 });
        self
    }
}

/// A capability of a function whose accesses have effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Watched {
    pub(crate) at: u16,
    pub(crate) len: u16,
}

/// The two lists of a function while it is built.
#[derive(Debug)]
pub(crate) struct Lists {
    /// The first free byte behind the capabilities.
    free: u16,
    /// Where the pointer to the next capability goes.
    link: u16,
    extended_free: u16,
    extended_last: Option<u16>,
}

impl Lists {
    pub(crate) fn new() -> Lists {
        Lists { free: HEADER_END, link: CAPABILITIES, extended_free: CONVENTIONAL, extended_last: None }
    }

    /// Places a capability and says where it is; and whether its accesses have effects.
    pub(crate) fn add(
        &mut self,
        config: &mut ConfigSpace,
        capability: &Capability,
    ) -> Result<(u8, Option<Watched>), PciError> {
        let no_room = PciError::NoRoom(u16::from(capability.id));
        let len = u16::try_from(capability.body.len() + 2).map_err(|_| no_room)?;
        let at = self.free;
        let end = at.checked_add(len).filter(|end| *end <= CONVENTIONAL);
        let (Some(end), Ok(place)) = (end, u8::try_from(at)) else {
            return Err(PciError::NoRoom(u16::from(capability.id)));
        };
        config.define(at, &[capability.id, 0]);
        config.define(at + 2, &capability.body);
        place_rules(config, at, len, &capability.rules, 2);
        config.define(self.link, &[place]);
        if self.link == CAPABILITIES {
            config.define(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        }
        (self.link, self.free) = (at + 1, end.next_multiple_of(4));
        Ok((place, capability.watched.then_some(Watched { at, len })))
    }

    /// Places an extended capability.
    pub(crate) fn add_extended(
        &mut self,
        config: &mut ConfigSpace,
        capability: &ExtendedCapability,
    ) -> Result<u16, PciError> {
        let no_room = || PciError::NoRoom(capability.id);
        let len = u16::try_from(capability.body.len() + 4).map_err(|_| no_room())?;
        let at = self.extended_free;
        let end = at.checked_add(len).filter(|end| *end <= EXTENDED).ok_or_else(no_room)?;
        config.grow(EXTENDED);
        let header = u32::from(capability.id) | u32::from(capability.version) << 16;
        config.define(at, &header.to_le_bytes());
        config.define(at + 4, &capability.body);
        place_rules(config, at, len, &capability.rules, 4);
        if let Some(last) = self.extended_last {
            let header = config.u32(last) & 0xf_ffff | u32::from(at) << 20;
            config.define(last, &header.to_le_bytes());
        }
        (self.extended_last, self.extended_free) = (Some(at), end.next_multiple_of(4));
        Ok(at)
    }
}

/// The rules of a structure of `len` bytes at `at`; those that reach out of it, or into its `header` bytes, are left out.
fn place_rules(config: &mut ConfigSpace, at: u16, len: u16, rules: &[Rule], header: u16) {
    for rule in rules {
        let within = rule.at.checked_add(rule.width).is_some_and(|end| end <= len);
        if within && rule.at >= header && rule.width <= 4 {
            config.rule(&Rule { at: at + rule.at, ..*rule });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Walks the list as a guest does.
    fn walk(config: &ConfigSpace) -> Vec<(u16, u8)> {
        let mut found = Vec::new();
        let mut at = u16::from(config.u8(CAPABILITIES));
        while at != 0 {
            found.push((at, config.u8(at)));
            assert!(found.len() <= 48, "the list has no end");
            at = u16::from(config.u8(at + 1));
        }
        found
    }

    fn walk_extended(config: &ConfigSpace) -> Vec<(u16, u16)> {
        let mut found = Vec::new();
        let mut at = CONVENTIONAL;
        while at != 0 && !matches!(config.u32(at), 0 | u32::MAX) {
            let header = config.u32(at);
            found.push((at, header as u16));
            assert!(found.len() <= 1000, "the list has no end");
            at = (header >> 20) as u16;
        }
        found
    }

    #[test]
    fn pci_6_7_without_capabilities_there_is_no_list() {
        let config = ConfigSpace::new(EXTENDED);
        assert_eq!(config.u16(STATUS) & STATUS_CAPABILITIES, 0);
        assert!(walk(&config).is_empty() && walk_extended(&config).is_empty());
    }

    #[test]
    fn pci_6_7_a_rule_reaches_neither_the_header_nor_the_next_capability() {
        let mut config = ConfigSpace::new(CONVENTIONAL);
        let mut lists = Lists::new();
        let first = Capability::new(9, [1, 2]).writable(0, 4, u32::MAX).writable(2, 4, u32::MAX);
        lists.add(&mut config, &first).unwrap();
        lists.add(&mut config, &Capability::new(9, [3, 4, 5, 6]).writable(4, 2, 0xff)).unwrap();
        config.write(0x40, &[0; 4]);
        config.write(0x44, &[0xff; 4]);
        config.write(0x48, &[0; 4]);
        assert_eq!(config.bytes(0x40, 10), [9, 0x44, 1, 2, 9, 0, 3, 4, 0, 6]);
    }

    proptest! {
        #[test]
        fn pci_6_7_capabilities_are_chained_in_order_and_never_overlap(
            sizes in proptest::collection::vec(0..60_usize, 0..16),
            extended in proptest::collection::vec(0..900_usize, 0..12),
        ) {
            let mut config = ConfigSpace::new(CONVENTIONAL);
            let mut lists = Lists::new();
            let mut placed = Vec::new();
            for (id, size) in sizes.iter().enumerate() {
                let id = id as u8 + 1;
                // A body that is mistaken for nothing else: its identifier all over.
                match lists.add(&mut config, &Capability::new(id, vec![id; *size])) {
                    Ok((at, _)) => placed.push((u16::from(at), id, *size)),
                    Err(error) => prop_assert!(matches!(error, PciError::NoRoom(_))),
                }
            }
            let expected: Vec<_> = placed.iter().map(|(at, id, _)| (*at, *id)).collect();
            prop_assert_eq!(walk(&config), expected);
            for (at, id, size) in placed {
                prop_assert!(at >= HEADER_END && at % 4 == 0);
                prop_assert_eq!(config.bytes(at + 2, size as u16), vec![id; size]);
            }
            let mut placed = Vec::new();
            for (id, size) in extended.iter().enumerate() {
                let id = id as u16 + 1;
                let body = vec![id as u8; *size];
                match lists.add_extended(&mut config, &ExtendedCapability::new(id, 1, body)) {
                    Ok(at) => placed.push((at, id, *size)),
                    Err(error) => prop_assert!(matches!(error, PciError::NoRoom(_))),
                }
            }
            let expected: Vec<_> = placed.iter().map(|(at, id, _)| (*at, *id)).collect();
            prop_assert_eq!(walk_extended(&config), expected);
            for (at, id, size) in placed {
                prop_assert_eq!(config.bytes(at + 4, size as u16), vec![id as u8; size]);
            }
        }
    }
}
