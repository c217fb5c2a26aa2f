//! A function's configuration space: bytes, and for each bit whether the guest may write it.
//!
//! * A bit is read-only, read-write, or cleared by writing 1; which one is a row of a table ([`TYPE_0`], [`TYPE_1`], and the
//!   tables of capabilities), never code.
//! * An access lies within one naturally aligned double word (PCI Express Base 5.0, 7.2.2: what crosses one is for the root
//!   complex to refuse). Others, and what lies behind the end, read as ones and write nothing.
//! * [`ConfigSpace::reset`] brings back what the function was built with.
use device_state::StateError;

use super::regs::*;

/// What the guest may write in one register. The bits in neither mask are read-only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Offset of the register.
    pub(crate) at: u16,
    /// Its bytes: 1, 2 or 4.
    pub(crate) width: u16,
    /// Read-write bits.
    pub(crate) write: u32,
    /// Bits that a written 1 clears.
    pub(crate) clear: u32,
}

const fn rw(at: u16, width: u16, write: u32) -> Rule {
    Rule { at, width, write, clear: 0 }
}

const fn w1c(at: u16, width: u16, clear: u32) -> Rule {
    Rule { at, width, write: 0, clear }
}

/// A type 0 header, PCI Local Bus 3.0, 6.2. Base addresses are added as a function has them.
pub(crate) const TYPE_0: &[Rule] = &[
    // I/O, memory, bus master, parity error response, SERR#, interrupt disable.
    rw(COMMAND, 2, 0x0547),
    // Parity error, aborts, system error.
    w1c(STATUS, 2, 0xf900),
    rw(CACHE_LINE, 1, 0xff),
    rw(INTERRUPT_LINE, 1, 0xff),
];

/// A type 1 header, PCI-to-PCI Bridge 1.2, 3.2. The I/O window has 16-bit addresses, the prefetchable one 64-bit ones.
pub(crate) const TYPE_1: &[Rule] = &[
    rw(COMMAND, 2, 0x0547),
    w1c(STATUS, 2, 0xf900),
    rw(CACHE_LINE, 1, 0xff),
    rw(PRIMARY, 1, 0xff),
    rw(SECONDARY, 1, 0xff),
    rw(SUBORDINATE, 1, 0xff),
    rw(IO_BASE, 1, 0xf0),
    rw(IO_LIMIT, 1, 0xf0),
    w1c(SECONDARY_STATUS, 2, 0xf900),
    rw(MEMORY_BASE, 2, 0xfff0),
    rw(MEMORY_LIMIT, 2, 0xfff0),
    rw(PREFETCH_BASE, 2, 0xfff0),
    rw(PREFETCH_LIMIT, 2, 0xfff0),
    rw(PREFETCH_BASE_HIGH, 4, 0xffff_ffff),
    rw(PREFETCH_LIMIT_HIGH, 4, 0xffff_ffff),
    rw(INTERRUPT_LINE, 1, 0xff),
    // Parity error response, SERR#, secondary bus reset. No ISA and VGA decoding.
    rw(BRIDGE_CONTROL, 2, 0x0043),
];

/// Bytes with their write masks.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: Vec<Byte>,
}

#[derive(Clone, Copy, Default)]
struct Byte {
    now: u8,
    /// After a reset.
    initial: u8,
    write: u8,
    clear: u8,
}

/// Whether an access stays within one aligned double word.
pub(crate) fn is_valid(offset: u64, len: usize) -> bool {
    (1..=4).contains(&len) && (offset & 3) as usize + len <= 4
}

impl ConfigSpace {
    /// `size` bytes, all 0 and read-only.
    pub(crate) fn new(size: u16) -> ConfigSpace {
        ConfigSpace { bytes: vec![Byte::default(); usize::from(size)] }
    }

    /// Makes room up to `size`. It never shrinks.
    pub(crate) fn grow(&mut self, size: u16) {
        if self.bytes.len() < usize::from(size) {
            self.bytes.resize(usize::from(size), Byte::default());
        }
    }

    fn span(&mut self, at: u16, len: usize) -> &mut [Byte] {
        self.bytes.get_mut(usize::from(at)..usize::from(at) + len).unwrap_or(&mut [])
    }

    /// Gives bits their meaning for the guest, in place of what was said of these bits' register before.
    pub(crate) fn rule(&mut self, rule: &Rule) {
        let (write, clear) = (rule.write.to_le_bytes(), rule.clear.to_le_bytes());
        let masks = write.into_iter().zip(clear);
        for (byte, (write, clear)) in self.span(rule.at, usize::from(rule.width)).iter_mut().zip(masks) {
            (byte.write, byte.clear) = (write, clear);
        }
    }

    pub(crate) fn rules(&mut self, rules: &[Rule]) {
        rules.iter().for_each(|rule| self.rule(rule));
    }

    /// Sets bytes for good: a reset brings them back.
    pub(crate) fn define(&mut self, at: u16, data: &[u8]) {
        for (byte, value) in self.span(at, data.len()).iter_mut().zip(data) {
            (byte.now, byte.initial) = (*value, *value);
        }
    }

    /// Sets bits of a 16-bit register as the function itself does, whatever the guest may write.
    pub(crate) fn set_bits(&mut self, at: u16, bits: u16, on: bool) {
        for (byte, bits) in self.span(at, 2).iter_mut().zip(bits.to_le_bytes()) {
            byte.now = if on { byte.now | bits } else { byte.now & !bits };
        }
    }

    /// Sets a register as the function itself does.
    pub(crate) fn put(&mut self, at: u16, data: &[u8]) {
        for (byte, value) in self.span(at, data.len()).iter_mut().zip(data) {
            byte.now = *value;
        }
    }

    fn array<const N: usize>(&self, at: u16) -> [u8; N] {
        let mut data = [0xff; N];
        for (value, byte) in data.iter_mut().zip(self.bytes.get(usize::from(at)..).unwrap_or(&[])) {
            *value = byte.now;
        }
        data
    }

    pub(crate) fn u8(&self, at: u16) -> u8 {
        self.array::<1>(at)[0]
    }

    pub(crate) fn u16(&self, at: u16) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(crate) fn u32(&self, at: u16) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// So many bytes as they are.
    pub(crate) fn bytes(&self, at: u16, len: u16) -> Vec<u8> {
        let from = usize::from(at);
        self.bytes.get(from..from + usize::from(len)).unwrap_or(&[]).iter().map(|byte| byte.now).collect()
    }

    /// The guest reads.
    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if is_valid(u64::from(offset), data.len()) {
            let from = self.bytes.get(usize::from(offset)..).unwrap_or(&[]);
            for (value, byte) in data.iter_mut().zip(from) {
                *value = byte.now;
            }
        }
    }

    /// The guest writes. Says whether the access was one at all.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let valid = is_valid(u64::from(offset), data.len());
        let span = if valid { self.span(offset, data.len()) } else { &mut [] };
        for (byte, value) in span.iter_mut().zip(data) {
            byte.now = ((byte.now & !byte.write) | (value & byte.write)) & !(value & byte.clear);
        }
        valid && usize::from(offset) < self.bytes.len()
    }

    /// Whether the guest can change anything there.
    pub(crate) fn is_writable(&self, offset: u16, len: usize) -> bool {
        let from = self.bytes.get(usize::from(offset)..).unwrap_or(&[]);
        from.iter().take(len).any(|byte| byte.write | byte.clear != 0)
    }

    /// As it was built.
    pub(crate) fn reset(&mut self) {
        self.bytes.iter_mut().for_each(|byte| byte.now = byte.initial);
    }

    /// What the guest (by writing, or by what it has not cleared yet) has a say in; the rest as after a reset.
    pub(crate) fn save(&self) -> Vec<u8> {
        let kept = |byte: &Byte| {
            let mask = byte.write | byte.clear;
            (byte.now & mask) | (byte.initial & !mask)
        };
        self.bytes.iter().map(kept).collect()
    }

    /// Whether saved bytes are some that this function can have.
    pub(crate) fn check(&self, saved: &[u8]) -> Result<(), StateError> {
        if saved.len() != self.bytes.len() {
            return Err(StateError::refused(format!(
                "a configuration space of {} bytes for one of {}",
                saved.len(),
                self.bytes.len()
            )));
        }
        let wrong = |(byte, saved): (&Byte, &u8)| (byte.initial ^ saved) & !(byte.write | byte.clear) != 0;
        match self.bytes.iter().zip(saved).position(wrong) {
            Some(at) => Err(StateError::refused(format!(
                "read-only bits at {at:#x} of the configuration space are not this function's"
            ))),
            None => Ok(()),
        }
    }

    /// Takes over what [`check`](Self::check) found right. Bits that the guest cannot write stay.
    pub(crate) fn restore(&mut self, saved: &[u8]) {
        for (byte, saved) in self.bytes.iter_mut().zip(saved) {
            let mask = byte.write | byte.clear;
            byte.now = (byte.now & !mask) | (saved & mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(rules: &[Rule]) -> ConfigSpace {
        let mut space = ConfigSpace::new(CONVENTIONAL);
        space.rules(rules);
        space
    }

    /// The three kinds of bits, by a model of one bit.
    fn bit(now: bool, write: bool, clear: bool, value: bool) -> bool {
        match (write, clear) {
            (true, _) => value,
            (_, true) => now && !value,
            _ => now,
        }
    }

    #[test]
    fn pci_7_2_2_an_access_stays_in_one_double_word() {
        for offset in 0..8_u64 {
            for len in 0..10 {
                let within = len > 0 && offset / 4 == (offset + len as u64 - 1) / 4;
                assert_eq!(is_valid(offset, len), within, "{offset}+{len}");
            }
        }
        let mut space = space(TYPE_0);
        assert!(!space.write(COMMAND - 1, &[0xff; 4]));
        assert!(!space.write(COMMAND, &[0xff; 8]));
        assert_eq!(space.u16(COMMAND), 0);
        let mut data = [0; 2];
        space.read(3, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn pci_behind_the_end_there_are_ones() {
        let mut space = space(TYPE_0);
        let mut data = [0; 4];
        space.read(CONVENTIONAL, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(!space.write(CONVENTIONAL, &[0; 4]));
        space.read(u16::MAX - 3, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn pci_6_2_3_a_written_one_clears_a_status_bit_and_a_zero_does_not() {
        let mut space = space(TYPE_0);
        space.set_bits(STATUS, 0xf910, true);
        space.write(STATUS, &[0, 0]);
        assert_eq!(space.u16(STATUS), 0xf910);
        space.write(STATUS, &[0xff, 0x80]);
        assert_eq!(space.u16(STATUS), 0x7910);
        space.write(COMMAND, &[0, 0, 0xff, 0xff]);
        assert_eq!(space.u16(STATUS), 0x0010);
    }

    #[test]
    fn a_restored_space_has_no_bits_that_its_function_cannot_have() {
        let mut space = space(TYPE_1);
        space.define(VENDOR_ID, &[0x36, 0x1b]);
        space.write(SECONDARY, &[7]);
        let saved = space.save();
        let mut other = space.clone();
        other.reset();
        other.check(&saved).unwrap();
        other.restore(&saved);
        assert_eq!(other.u8(SECONDARY), 7);
        for at in 0..saved.len() {
            let mut bad = saved.clone();
            let byte = space.bytes[at];
            let readonly = !(byte.write | byte.clear);
            bad[at] ^= readonly;
            assert_eq!(other.check(&bad).is_err(), readonly != 0, "{at:#x}");
        }
        assert!(other.check(&saved[1..]).is_err());
    }

    proptest! {
        #[test]
        fn any_access_of_any_width_does_what_the_tables_say_bit_by_bit(
            writes in proptest::collection::vec((0..0x110_u16, proptest::collection::vec(any::<u8>(), 0..10)), 1..40),
            bridge in any::<bool>(),
        ) {
            let rules = if bridge { TYPE_1 } else { TYPE_0 };
            let mut space = space(rules);
            space.define(STATUS, &[0xff; 2]);
            space.define(SECONDARY_STATUS, &[0xff; 2]);
            let mut model = space.bytes(0, CONVENTIONAL);
            for (offset, data) in writes {
                space.write(offset, &data);
                let (first, last) = (usize::from(offset), usize::from(offset) + data.len());
                if !data.is_empty() && first / 4 == (last - 1) / 4 {
                    for (at, value) in (first..last).zip(&data) {
                        let rule = rules.iter().find(|rule| {
                            (usize::from(rule.at)..usize::from(rule.at + rule.width)).contains(&at)
                        });
                        let Some(rule) = rule else { continue };
                        for n in 0..8 {
                            let in_rule = (at - usize::from(rule.at)) * 8 + n;
                            let of = |mask: u32| mask >> in_rule & 1 != 0;
                            let now = model[at] >> n & 1 != 0;
                            let bit = bit(now, of(rule.write), of(rule.clear), value >> n & 1 != 0);
                            model[at] = model[at] & !(1 << n) | u8::from(bit) << n;
                        }
                    }
                }
                prop_assert_eq!(&space.bytes(0, CONVENTIONAL), &model);
            }
        }
    }
}
