//! The slot of a port: native hot plug, PCI Express Base 5.0, 6.7 and 7.5.3.9 to 7.5.3.11.
//!
//! Each slot has an attention button, a power controller and both indicators, and tells the guest of events by the port's
//! interrupt. What Linux's pciehp and the standard expect of it:
//!
//! * A card appears: presence detect changed, and the button is pressed. pciehp takes presence and button together as the wish
//!   to have it on at once (a button alone would mean five seconds of blinking). If the slot still has power, as after a surprise
//!   that the guest is still busy with, the link comes up and tells instead: pciehp would take the button, which it
//!   finds when it has turned the new card on, as the wish to have that back.
//! * The link is up while a card is in, the slot has power and the guest has not disabled the link; each change is an event.
//!   Nothing behind the port is seen while the link is down, and power that goes off resets what is in the slot.
//! * A card is asked back: the button is pressed. The guest unloads its drivers and takes the power off; then the card is out.
//!   Power off without that wish leaves the card where it is: the guest may turn it on again.
//! * A surprise: presence and link are gone, the guest learns of both afterwards.
//! * Each write to slot control is a command, and is completed at once.
//!
//! Its capabilities (but for the interlock, which it does not have) and its registers after power-on are those of QEMU 11.1's
//! `pcie-root-port`, which guests know.
//!
//! Only registers and rules; the tree behind the port belongs to [`Hierarchy`](super::Hierarchy).
use super::config::ConfigSpace;
use super::regs::*;

/// What became of a slot, to be acted on by who owns the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The link went up or down.
    pub(crate) link: Option<bool>,
    /// The card that was asked back is out.
    pub(crate) ejected: bool,
}

/// The slot of a port, or a link without one: whether a card is in, and whether it is asked back.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// Offset of the PCI Express capability.
    express: u16,
    /// Whether it is a slot: with control and events.
    hot_plug: bool,
    occupied: bool,
    asked_back: bool,
}

impl Slot {
    /// An empty one.
    pub(crate) fn new(config: &mut ConfigSpace, express: u16, hot_plug: bool) -> Slot {
        let mut slot = Slot { express, hot_plug, occupied: false, asked_back: false };
        slot.reset(config);
        slot
    }

    pub(crate) fn hot_plug(&self) -> bool {
        self.hot_plug
    }

    pub(crate) fn asked_back(&self) -> bool {
        self.asked_back
    }

    pub(crate) fn link_is_up(&self, config: &ConfigSpace) -> bool {
        config.u16(self.express + EXP_LINK_STATUS) & LINK_STATUS_ACTIVE != 0
    }

    fn powered(&self, config: &ConfigSpace) -> bool {
        !self.hot_plug || config.u16(self.express + EXP_SLOT_CONTROL) & SLOT_POWER_OFF == 0
    }

    fn event(&self, config: &mut ConfigSpace, events: u16) {
        if self.hot_plug {
            config.set_bits(self.express + EXP_SLOT_STATUS, events, true);
        }
    }

    /// Brings link and presence up to date. The first tells of a change with an event.
    fn settle(&self, config: &mut ConfigSpace) -> Option<bool> {
        if self.hot_plug {
            config.set_bits(self.express + EXP_SLOT_STATUS, SLOT_PRESENT, self.occupied);
        }
        let disabled = config.u16(self.express + EXP_LINK_CONTROL) & LINK_CONTROL_DISABLE != 0;
        let up = self.occupied && self.powered(config) && !disabled;
        if up == self.link_is_up(config) {
            return None;
        }
        config.set_bits(self.express + EXP_LINK_STATUS, LINK_STATUS_ACTIVE, up);
        self.event(config, SLOT_LINK_CHANGED);
        Some(up)
    }

    /// As after a reset of the machine: power on and indicated if there is a card. No events. A card that was asked back is
    /// not in use any more, so it is out.
    pub(crate) fn reset(&mut self, config: &mut ConfigSpace) -> Outcome {
        let ejected = self.occupied && self.asked_back;
        self.occupied &= !ejected;
        self.asked_back = false;
        if self.hot_plug {
            let power = if self.occupied {
                SLOT_POWER_INDICATOR_ON
            } else {
                SLOT_POWER_OFF | SLOT_POWER_INDICATOR_OFF
            };
            let control = SLOT_ATTENTION_INDICATOR_OFF | power;
            config.put(self.express + EXP_SLOT_CONTROL, &control.to_le_bytes());
        }
        let link = self.settle(config);
        if self.hot_plug {
            config.set_bits(self.express + EXP_SLOT_STATUS, !SLOT_PRESENT, false);
        }
        Outcome { link, ejected }
    }

    /// A card is in from the beginning: with power, the guest is not told.
    pub(crate) fn populate(&mut self, config: &mut ConfigSpace) -> Outcome {
        self.occupied = true;
        self.asked_back = false;
        self.reset(config)
    }

    /// A card appears while the guest runs.
    pub(crate) fn insert(&mut self, config: &mut ConfigSpace) -> Outcome {
        self.occupied = true;
        self.asked_back = false;
        let link = self.settle(config);
        self.event(config, SLOT_PRESENCE_CHANGED);
        if link.is_none() {
            self.event(config, SLOT_BUTTON);
        }
        Outcome { link, ejected: false }
    }

    /// The guest is asked to let go of the card. If the slot has no power, it already has.
    pub(crate) fn ask_back(&mut self, config: &mut ConfigSpace) -> Outcome {
        if !self.powered(config) {
            return self.take_out(config);
        }
        self.asked_back = true;
        self.event(config, SLOT_BUTTON);
        Outcome::default()
    }

    /// The wish is taken back, by another press. Says whether there was one.
    pub(crate) fn cancel(&mut self, config: &mut ConfigSpace) -> bool {
        let asked = std::mem::take(&mut self.asked_back);
        if asked {
            self.event(config, SLOT_BUTTON);
        }
        asked
    }

    /// The card is out, whatever the guest thinks of it.
    pub(crate) fn take_out(&mut self, config: &mut ConfigSpace) -> Outcome {
        self.occupied = false;
        self.asked_back = false;
        let link = self.settle(config);
        self.event(config, SLOT_PRESENCE_CHANGED);
        Outcome { link, ejected: true }
    }

    /// After the guest wrote `len` bytes at `offset` of the port's configuration space.
    pub(crate) fn written(&mut self, config: &mut ConfigSpace, offset: u16, len: usize) -> Outcome {
        let touches = |register: u16| {
            let (from, register) = (usize::from(offset), usize::from(self.express + register));
            from < register + 2 && register < from + len
        };
        let (control, link) = (touches(EXP_SLOT_CONTROL), touches(EXP_LINK_CONTROL));
        if !control && !link {
            return Outcome::default();
        }
        let mut outcome = Outcome { link: self.settle(config), ejected: false };
        if control && self.hot_plug {
            if self.asked_back && !self.powered(config) {
                outcome.ejected = self.take_out(config).ejected;
            }
            self.event(config, SLOT_COMMAND_COMPLETED);
        }
        outcome
    }

    /// Whether an event that the guest wants to hear of is there, and it wants interrupts at all (6.7.3.4).
    pub(crate) fn interrupt(&self, config: &ConfigSpace) -> bool {
        /// Status bits of events, and the control bits that enable them.
        const EVENTS: [(u16, u16); 4] = [
            (SLOT_BUTTON, SLOT_BUTTON_ENABLE),
            (SLOT_PRESENCE_CHANGED, SLOT_PRESENCE_ENABLE),
            (SLOT_COMMAND_COMPLETED, SLOT_COMMAND_ENABLE),
            (SLOT_LINK_CHANGED, SLOT_LINK_ENABLE),
        ];
        let control = config.u16(self.express + EXP_SLOT_CONTROL);
        let status = config.u16(self.express + EXP_SLOT_STATUS);
        let wanted = |(event, enable): &(u16, u16)| status & event != 0 && control & enable != 0;
        self.hot_plug && control & SLOT_INTERRUPT_ENABLE != 0 && EVENTS.iter().any(wanted)
    }

    /// The guest's wish after a restore is in the registers; what is in the slot, and whether it was asked back, is not.
    pub(crate) fn restored(&mut self, config: &mut ConfigSpace, asked_back: bool) {
        self.asked_back = asked_back && self.occupied && self.powered(config);
        // The link's state follows from what was restored; its events are in what was restored.
        let events = config.u16(self.express + EXP_SLOT_STATUS) & SLOT_LINK_CHANGED;
        self.settle(config);
        if self.hot_plug && events == 0 {
            config.set_bits(self.express + EXP_SLOT_STATUS, SLOT_LINK_CHANGED, false);
        }
    }

    /// What the guest sees of the power indicator: on, blinking or off.
    pub(crate) fn power_indicator(&self, config: &ConfigSpace) -> PowerIndicator {
        match config.u16(self.express + EXP_SLOT_CONTROL) & SLOT_POWER_INDICATOR {
            SLOT_POWER_INDICATOR_ON => PowerIndicator::On,
            SLOT_POWER_INDICATOR_OFF => PowerIndicator::Off,
            _ => PowerIndicator::Blinking,
        }
    }
}

/// What a slot's power indicator shows: the guest sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerIndicator {
    /// The card is in use.
    On,
    /// The guest is about to turn power on or off.
    Blinking,
    /// The card may be taken out.
    Off,
}

#[cfg(test)]
mod tests {
    use super::super::express::{self, Place, PortKind};
    use super::*;

    const AT: u16 = 0x40;

    fn slot() -> (ConfigSpace, Slot) {
        let mut config = ConfigSpace::new(EXTENDED);
        express::place(&mut config, AT, Place::Port(PortKind::Root, Some(5)));
        let slot = Slot::new(&mut config, AT, true);
        (config, slot)
    }

    fn status(config: &ConfigSpace) -> u16 {
        config.u16(AT + EXP_SLOT_STATUS)
    }

    fn control(config: &mut ConfigSpace, slot: &mut Slot, value: u16) -> Outcome {
        config.write(AT + EXP_SLOT_CONTROL, &value.to_le_bytes());
        slot.written(config, AT + EXP_SLOT_CONTROL, 2)
    }

    /// Clears what is there and says what it was, as an interrupt handler does.
    fn take(config: &mut ConfigSpace) -> u16 {
        let events = status(config) & !SLOT_PRESENT;
        config.write(AT + EXP_SLOT_STATUS, &events.to_le_bytes());
        events
    }

    /// What pciehp enables where there is a button (pcie_enable_notification).
    const PCIEHP: u16 = SLOT_LINK_ENABLE | SLOT_BUTTON_ENABLE | SLOT_INTERRUPT_ENABLE | SLOT_COMMAND_ENABLE;

    #[test]
    fn pcie_6_7_an_empty_slot_has_no_power_and_no_link() {
        let (config, slot) = slot();
        assert!(!slot.link_is_up(&config));
        assert_eq!(status(&config), 0);
        assert_eq!(slot.power_indicator(&config), PowerIndicator::Off);
        assert_eq!(config.u32(AT + 0x14) >> 19, 5);
    }

    #[test]
    fn pcie_6_7_a_card_that_is_there_from_the_beginning_has_power_and_is_no_event() {
        let (mut config, mut slot) = slot();
        assert_eq!(slot.populate(&mut config), Outcome { link: Some(true), ejected: false });
        assert_eq!(status(&config), SLOT_PRESENT);
        assert_eq!(slot.power_indicator(&config), PowerIndicator::On);
    }

    #[test]
    fn pcie_6_7_plug_as_linux_pciehp_goes_through_it() {
        let (mut config, mut slot) = slot();
        control(&mut config, &mut slot, PCIEHP | SLOT_POWER_OFF | SLOT_POWER_INDICATOR_OFF);
        assert!(slot.interrupt(&config));
        assert_eq!(take(&mut config), SLOT_COMMAND_COMPLETED);
        assert!(!slot.interrupt(&config));
        assert_eq!(slot.insert(&mut config).link, None, "no link without power");
        assert!(slot.interrupt(&config));
        assert_eq!(take(&mut config), SLOT_BUTTON | SLOT_PRESENCE_CHANGED);
        let on = control(&mut config, &mut slot, PCIEHP | SLOT_POWER_INDICATOR_OFF);
        assert_eq!(on, Outcome { link: Some(true), ejected: false });
        assert_eq!(take(&mut config), SLOT_COMMAND_COMPLETED | SLOT_LINK_CHANGED);
        assert!(slot.link_is_up(&config));
    }

    #[test]
    fn pcie_6_7_a_card_in_a_slot_with_power_is_told_by_its_link_without_the_button() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        control(&mut config, &mut slot, PCIEHP);
        slot.take_out(&mut config);
        take(&mut config);
        assert_eq!(slot.insert(&mut config).link, Some(true));
        assert!(slot.interrupt(&config));
        assert_eq!(take(&mut config), SLOT_LINK_CHANGED | SLOT_PRESENCE_CHANGED);
    }

    #[test]
    fn pcie_6_7_unplug_is_over_when_the_guest_takes_the_power_off() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        control(&mut config, &mut slot, PCIEHP | SLOT_POWER_INDICATOR_ON);
        take(&mut config);
        assert_eq!(slot.ask_back(&mut config), Outcome::default());
        assert!(slot.interrupt(&config));
        assert_eq!(take(&mut config), SLOT_BUTTON);
        // It blinks for five seconds, in which nothing else happens.
        assert_eq!(control(&mut config, &mut slot, PCIEHP | 0x0200), Outcome::default());
        assert_eq!(slot.power_indicator(&config), PowerIndicator::Blinking);
        let off = control(&mut config, &mut slot, PCIEHP | 0x0200 | SLOT_POWER_OFF);
        assert_eq!(off, Outcome { link: Some(false), ejected: true });
        assert_eq!(status(&config) & SLOT_PRESENT, 0);
        let events = take(&mut config);
        assert_eq!(events, SLOT_COMMAND_COMPLETED | SLOT_LINK_CHANGED | SLOT_PRESENCE_CHANGED);
    }

    #[test]
    fn pcie_6_7_power_off_that_nobody_asked_for_leaves_the_card_in() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        let off = control(&mut config, &mut slot, SLOT_POWER_OFF);
        assert_eq!(off, Outcome { link: Some(false), ejected: false });
        assert_eq!(status(&config) & SLOT_PRESENT, SLOT_PRESENT);
        assert_eq!(control(&mut config, &mut slot, 0).link, Some(true));
        control(&mut config, &mut slot, SLOT_POWER_OFF);
        // Without power there is nobody to ask.
        assert!(slot.ask_back(&mut config).ejected);
    }

    #[test]
    fn pcie_6_7_a_surprise_is_told_afterwards() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        control(&mut config, &mut slot, PCIEHP);
        take(&mut config);
        assert_eq!(slot.take_out(&mut config), Outcome { link: Some(false), ejected: true });
        assert!(slot.interrupt(&config));
        assert_eq!(take(&mut config), SLOT_LINK_CHANGED | SLOT_PRESENCE_CHANGED);
    }

    #[test]
    fn pcie_6_7_3_4_an_interrupt_needs_event_its_enable_and_the_enable_of_all() {
        for (event, enable) in [
            (SLOT_BUTTON, SLOT_BUTTON_ENABLE),
            (SLOT_PRESENCE_CHANGED, SLOT_PRESENCE_ENABLE),
            (SLOT_COMMAND_COMPLETED, SLOT_COMMAND_ENABLE),
            (SLOT_LINK_CHANGED, SLOT_LINK_ENABLE),
        ] {
            for wanted in [0, enable, SLOT_INTERRUPT_ENABLE, enable | SLOT_INTERRUPT_ENABLE, PCIEHP & !enable]
            {
                let (mut config, mut slot) = slot();
                control(&mut config, &mut slot, wanted);
                take(&mut config);
                assert!(!slot.interrupt(&config));
                config.set_bits(AT + EXP_SLOT_STATUS, event, true);
                let both = wanted == enable | SLOT_INTERRUPT_ENABLE;
                assert_eq!(slot.interrupt(&config), both, "{event:#x} {wanted:#x}");
            }
        }
    }

    #[test]
    fn pcie_7_5_3_7_a_disabled_link_is_down() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        config.write(AT + EXP_LINK_CONTROL, &[0x10, 0]);
        assert_eq!(slot.written(&mut config, AT + EXP_LINK_CONTROL, 2).link, Some(false));
        assert_eq!(status(&config), SLOT_PRESENT | SLOT_LINK_CHANGED);
        config.write(AT + EXP_LINK_CONTROL, &[0, 0, 0, 0]);
        assert_eq!(slot.written(&mut config, AT + EXP_LINK_CONTROL, 4).link, Some(true));
    }

    #[test]
    fn a_reset_finishes_an_unplug_that_was_under_way() {
        let (mut config, mut slot) = slot();
        slot.populate(&mut config);
        slot.ask_back(&mut config);
        config.reset();
        assert!(slot.reset(&mut config).ejected);
        assert_eq!(status(&config), 0);
        slot.populate(&mut config);
        config.reset();
        assert_eq!(slot.reset(&mut config), Outcome { link: Some(true), ejected: false });
    }
}
