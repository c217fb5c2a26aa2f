//! What a bridge lets through, by its type 1 header: PCI-to-PCI Bridge 1.2, 3.2.5.
use super::bar::{Claim, Space};
use super::config::ConfigSpace;
use super::regs::*;

/// A range of addresses that a bridge, or the root complex, passes downwards. The ends are inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) space: Space,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Window {
    /// Whether all of a claim is inside.
    pub(crate) fn passes(&self, claim: &Claim) -> bool {
        self.space == claim.space && self.first <= claim.base && claim.base + (claim.size - 1) <= self.last
    }
}

/// The windows that are open: enabled in `COMMAND` (3.2.5.2), and not reversed, which is how a guest closes one.
pub(crate) fn windows(config: &ConfigSpace) -> Vec<Window> {
    let command = config.u16(COMMAND);
    let io = |at: u16| u64::from(config.u8(at) & 0xf0) << 8;
    let memory = |at: u16| u64::from(config.u16(at) & 0xfff0) << 16;
    let high = |at: u16| u64::from(config.u32(at)) << 32;
    let all = [
        (COMMAND_IO, Space::Io, io(IO_BASE), io(IO_LIMIT) | 0xfff),
        (COMMAND_MEMORY, Space::Memory, memory(MEMORY_BASE), memory(MEMORY_LIMIT) | 0xf_ffff),
        (
            COMMAND_MEMORY,
            Space::Memory,
            high(PREFETCH_BASE_HIGH) | memory(PREFETCH_BASE),
            high(PREFETCH_LIMIT_HIGH) | memory(PREFETCH_LIMIT) | 0xf_ffff,
        ),
    ];
    let open = all.into_iter().filter(|(enable, _, first, last)| command & enable != 0 && first <= last);
    open.map(|(_, space, first, last)| Window { space, first, last }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::config::TYPE_1;
    use super::*;

    fn bridge() -> ConfigSpace {
        let mut config = ConfigSpace::new(CONVENTIONAL);
        config.rules(TYPE_1);
        config.define(PREFETCH_BASE, &[1, 0, 1, 0]);
        // As Linux closes them: the limits below the bases.
        config.write(IO_BASE, &[0xf0, 0x00]);
        config.write(MEMORY_BASE, &[0xf0, 0xff, 0, 0]);
        config.write(PREFETCH_BASE, &[0xf0, 0xff, 0, 0]);
        config
    }

    #[test]
    fn bridge_3_2_5_6_windows_that_are_reversed_are_closed() {
        let mut config = bridge();
        config.write(COMMAND, &[7]);
        assert_eq!(windows(&config), []);
    }

    #[test]
    fn bridge_3_2_5_windows_are_where_the_guest_puts_them() {
        let mut config = bridge();
        config.write(IO_BASE, &[0x10, 0x20]);
        config.write(MEMORY_BASE, &[0x00, 0xe0, 0x10, 0xe0]);
        config.write(PREFETCH_BASE, &[0x00, 0x10, 0xff, 0x1f]);
        config.write(PREFETCH_BASE_HIGH, &[0x40, 0, 0, 0]);
        config.write(PREFETCH_LIMIT_HIGH, &[0x40, 0, 0, 0]);
        assert_eq!(windows(&config), [], "COMMAND does not enable them");
        config.write(COMMAND, &[3]);
        let window = |space, first, last| Window { space, first, last };
        assert_eq!(
            windows(&config),
            [
                window(Space::Io, 0x1000, 0x2fff),
                window(Space::Memory, 0xe000_0000, 0xe01f_ffff),
                window(Space::Memory, 0x40_1000_0000, 0x40_1fff_ffff),
            ]
        );
        config.write(COMMAND, &[1]);
        assert_eq!(windows(&config).len(), 1);
    }

    #[test]
    fn bridge_a_range_passes_as_a_whole_or_not_at_all() {
        let window = Window { space: Space::Memory, first: 0x1000, last: 0x1fff };
        let passes = |space, base, size| window.passes(&Claim { bar: 0, space, base, size });
        assert!(passes(Space::Memory, 0x1000, 0x1000));
        assert!(!passes(Space::Memory, 0x1000, 0x2000));
        assert!(!passes(Space::Memory, 0xf00, 0x1000));
        assert!(!passes(Space::Io, 0x1000, 0x10));
        let all = Window { space: Space::Memory, first: 0, last: u64::MAX };
        assert!(all.passes(&Claim { bar: 0, space: Space::Memory, base: 1 << 63, size: 1 << 63 }));
    }
}
