//! ACPI tables: what Linux has to be told since nothing else tells it. Processors and the I/O APIC (MADT), where PCI
//! configuration space is in memory (MCFG), power (FADT), and in the DSDT the PCI host: its windows, its wires, and that native
//! hot plug is the operating system's.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, Memory32Fixed, Method, Name, Package,
    PackageBuilder, ResourceTemplate, Return, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_device::pci::ECAM_BUS;

use crate::Result;
use crate::layout::{
    ACPI, ECAM, HIGH_RAM, IO_APIC, LOCAL_APIC, PCI_IRQS, PCI_MEMORY, PCI_MEMORY_64, PCI_PORTS, POWER,
    POWER_IRQ,
};
use crate::power;

const OEM: [u8; 6] = *b"BACKPL";
const TABLE: [u8; 8] = *b"VMM     ";

/// Boot architecture flags (ACPI 6.5, 5.2.9.3): there is no VGA to look for, and no CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// The tables' bytes, for address [`ACPI`]; the root pointer is at their beginning.
pub(crate) fn tables(cpus: u8, last_bus: u8) -> Result<Vec<u8>> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(ALIGN)] };
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    dsdt.append_slice(&definitions(last_bus));
    let dsdt = tables.add(dsdt.as_slice());
    // Its lock has to be aligned to 64 bytes (5.2.10), as all is here.
    let facs = tables.put(&FACS::new());
    let fadt = tables.put(&fadt(u32::try_from(dsdt)?, u32::try_from(facs)?));
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, IO_APIC, 0));
    let madt = tables.put(&madt);
    let mut mcfg = MCFG::new(OEM, TABLE, 1);
    mcfg.add_ecam(ECAM, 0, 0, last_bus);
    let mcfg = tables.put(&mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = tables.put(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    tables.bytes.splice(..root.len(), root);
    if tables.bytes.len() as u64 > HIGH_RAM - ACPI {
        return Err("the ACPI tables do not fit".into());
    }
    Ok(tables.bytes)
}

const ALIGN: usize = 64;

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table, and says where it is.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len();
        self.bytes.extend(table);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        ACPI + at as u64
    }

    fn put(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.add(&bytes)
    }
}

fn fadt(dsdt: u32, facs: u32) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        // No buttons in the fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::try_from(POWER_IRQ).unwrap_or_default().into();
    fadt.pm1a_evt_blk = u32::from(POWER + power::EVENTS).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(POWER + power::CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(POWER + power::RESET));
    fadt.reset_value = power::RESET_VALUE;
    // Worse than any real processor: no such states.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.finalize()
}

/// What is in the DSDT.
fn definitions(last_bus: u8) -> Vec<u8> {
    let mut aml = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&power::SOFT_OFF, &power::SOFT_OFF, &0_u8, &0_u8]))
        .to_aml_bytes(&mut aml);
    // Linux uses configuration space in memory only where these resources have it (PCI Firmware 3.3, 4.1.2).
    let bytes = (u32::from(last_bus) + 1) << ECAM_BUS.trailing_zeros();
    let ecam = Memory32Fixed::new(true, u32::try_from(ECAM).unwrap_or(u32::MAX), bytes);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
    let board = Device::new("MBRD".into(), vec![&id, &resources]);
    Scope::new("_SB_".into(), vec![&board, &Host { last_bus }]).to_aml_bytes(&mut aml);
    aml
}

/// The PCI host.
struct Host {
    last_bus: u8,
}

impl Aml for Host {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let cacheable = AddressSpaceCacheable::NotCacheable;
        let windows =
            [*PCI_MEMORY.start(), *PCI_MEMORY.end()].map(|end| u32::try_from(end).unwrap_or(u32::MAX));
        let buses = AddressSpace::new_bus_number(0_u16, u16::from(self.last_bus));
        let config = IO::new(0xcf8, 0xcf8, 1, 8);
        let ports = AddressSpace::new_io(*PCI_PORTS.start(), *PCI_PORTS.end(), None);
        let memory = AddressSpace::new_memory(cacheable, true, windows[0], windows[1], None);
        let large = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            *PCI_MEMORY_64.start(),
            *PCI_MEMORY_64.end(),
            None,
        );
        let resources = ResourceTemplate::new(vec![&buses, &config, &ports, &memory, &large]);
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &0_u8),
                &Name::new("_BBN".into(), &0_u8),
                &Name::new("_UID".into(), &0_u8),
                &Name::new("_CRS".into(), &resources),
                &Name::new("_PRT".into(), &wires()),
                // Whatever of native PCI Express the operating system asks for is its own (PCI Firmware 3.3, 4.5.1): hot plug
                // above all. Nobody else here would do it.
                &Method::new("_OSC".into(), 4, true, vec![&Return::new(&Arg(3))]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Which interrupt each pin of each device is: as the root complex wires them (PCI-to-PCI Bridge 1.2, 9.1).
fn wires() -> PackageBuilder {
    let mut all = PackageBuilder::new();
    for device in 0..32_u32 {
        for (pin, _) in (0_u8..).zip(PCI_IRQS) {
            let wire = (device as usize + usize::from(pin)) % PCI_IRQS.len();
            let irq = PCI_IRQS.get(wire).copied().map_or(0, u32::from);
            all.add_element(&Package::new(vec![&(device << 16 | 0xffff), &pin, &0_u8, &irq]));
        }
    }
    all
}
