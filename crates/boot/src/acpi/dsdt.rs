//! DSDT: the devices that no bus announces, and the PCI root bridge, as AML.

use acpi_tables::aml::*;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use chipset::constants as pc;
use chipset::i8042::{AUXILIARY_IRQ, KEYBOARD_IRQ};
use memory::Ram;

use super::{Inventory, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

const REVISION: u8 = 2;
/// The window for 64-bit BARs: this large, above all RAM, aligned to its size.
const HIGH_WINDOW: u64 = 64 << 30;
/// Device numbers on PCI bus 0, of which 0 is the host bridge.
const PCI_DEVICES: u8 = 32;
const PCI_PINS: u8 = 4;
/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0xf;
/// Each UART's scratch register (16550D datasheet 8.9).
const SCRATCH_OFFSET: u16 = 7;
const SCRATCH_VALUE: u8 = 0x5a;

/// AML that has been put into bytes: it borrows nothing, so it can be kept.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn encoded(aml: &dyn Aml) -> Encoded {
    Encoded(super::bytes(aml))
}

/// The table of a machine with that RAM.
pub fn dsdt(ram: &Ram, inventory: Inventory) -> Sdt {
    let mut code = Vec::new();
    soft_off(&mut code);
    let mut devices = Vec::new();
    root_bridge(&mut devices, ram);
    motherboard(&mut devices);
    legacy_devices(&mut devices);
    if inventory.keyboard {
        keyboard_controller(&mut devices);
    }
    for (number, (port, irq)) in (1..).zip(pc::SERIAL_PORTS) {
        serial_port(&mut devices, number, port, irq);
    }
    for id in 0..inventory.cpus {
        processor(&mut devices, id);
    }
    code.extend(Scope::raw("_SB_".into(), devices));
    let mut dsdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// `\_S5`: what to write into PM1a_CNT for soft-off.
fn soft_off(out: &mut dyn AmlSink) {
    let zero = ZERO;
    let values = Package::new(vec![&pc::S5_SLEEP_TYPE, &pc::S5_SLEEP_TYPE, &zero, &zero]);
    Name::new("_S5_".into(), &values).to_aml_bytes(out);
}

/// PCI bus 0 with everything below it.
fn root_bridge(out: &mut dyn AmlSink, ram: &Ram) {
    let config = pc::PCI_CONFIG_PORT;
    let high_start = layout::high_end(ram).next_multiple_of(HIGH_WINDOW);
    let resources = encoded(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, pc::ECAM_LAST_BUS.into()),
        &IO::new(config, config, 1, 8),
        &AddressSpace::new_io(0u16, config - 1, None),
        &AddressSpace::new_io(config + 8, u16::MAX, None),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            pc::PCI_MMIO_START as u32,
            (pc::PCI_MMIO_END - 1) as u32,
            None,
        ),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            high_start,
            high_start + HIGH_WINDOW - 1,
            None,
        ),
    ]));
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            // Cache-coherent DMA.
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &interrupt_routing()),
        ],
    )
    .to_aml_bytes(out);
}

/// `_PRT`: the I/O APIC input of each pin of each device. PCI lines reach nothing but the I/O APIC, so there are no link
/// devices and no choice.
fn interrupt_routing() -> PackageBuilder {
    const ANY_FUNCTION: u32 = 0xffff;
    let mut table = PackageBuilder::new();
    for device in 1..PCI_DEVICES {
        for pin in 0..PCI_PINS {
            let address = u32::from(device) << 16 | ANY_FUNCTION;
            let gsi = pc::pci_gsi(device, pin);
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    table
}

/// What is taken without belonging to a device: ECAM, power management, system control ports.
fn motherboard(out: &mut dyn AmlSink) {
    let pm_size = pc::PM_SIZE as u8;
    let resources = encoded(&ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, pc::ECAM_BASE as u32, pc::ECAM_SIZE as u32),
        &IO::new(pc::PM_BASE, pc::PM_BASE, 1, pm_size),
        &IO::new(pc::PORT_B, pc::PORT_B, 1, 1),
        &IO::new(pc::PORT_A, pc::PORT_A, 1, 1),
    ]));
    device(out, "MBRD", "PNP0C02", &resources);
}

/// The devices that every PC has. Not among them: the keyboard controller, which is there (for A20 and reset) but has
/// nothing plugged in. Announced, it would only be probed, at the cost of time-outs in each boot.
fn legacy_devices(out: &mut dyn AmlSink) {
    let (pic, pic2) = (0x20, 0xa0);
    let ports = |port, length| IO::new(port, port, 1, length);
    device(out, "PIC_", "PNP0000", &ResourceTemplate::new(vec![&ports(pic, 2), &ports(pic2, 2)]));
    device(out, "TMR_", "PNP0100", &ResourceTemplate::new(vec![&ports(pc::PIT_PORT, 4), &isa_irq(pc::PIT_IRQ)]));
    floppy_controller(out);
    let hpet = Memory32Fixed::new(false, pc::HPET_BASE as u32, pc::HPET_SIZE as u32);
    device(out, "HPET", "PNP0103", &ResourceTemplate::new(vec![&hpet]));
    device(out, "RTC_", "PNP0B00", &ResourceTemplate::new(vec![&ports(pc::RTC_PORT, 2), &isa_irq(pc::RTC_IRQ)]));
}

/// Keyboard and mouse, which share a controller; its ports are the keyboard's.
fn keyboard_controller(out: &mut dyn AmlSink) {
    let port = |port| IO::new(port, port, 1, 1);
    let (data, command) = (port(pc::I8042_DATA_PORT), port(pc::I8042_COMMAND_PORT));
    device(out, "KBD_", "PNP0303", &ResourceTemplate::new(vec![&data, &command, &isa_irq(KEYBOARD_IRQ)]));
    device(out, "MOU_", "PNP0F13", &ResourceTemplate::new(vec![&isa_irq(AUXILIARY_IRQ)]));
}

/// The IRQ descriptor (ACPI 6.5, 6.4.2.1) for an ISA interrupt, edge-triggered and active high. It names the ISA
/// number, which the MADT's overrides then turn into an I/O APIC input; the extended descriptor would name the input.
fn isa_irq(number: u8) -> Encoded {
    let [low, high] = (1u16 << (number & 15)).to_le_bytes();
    Encoded(vec![0x22, low, high])
}

fn device(out: &mut dyn AmlSink, name: &str, id: &str, resources: &dyn Aml) {
    Device::new(name.into(), vec![&Name::new("_HID".into(), &EISAName::new(id)), &Name::new("_CRS".into(), resources)])
        .to_aml_bytes(out);
}

/// The floppy controller, which is there if its main status register is.
fn floppy_controller(out: &mut dyn AmlSink) {
    let region = OpRegion::new("FREG".into(), OpRegionSpace::SystemIO, &0x3f4u16, &ONE);
    let field = Field::new(
        "FREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"MSR_", 8)],
    );
    let register = Path::new("MSR_");
    let nothing = Equal::new(&register, &0xffu8);
    let status = encoded(&Method::new(
        "_STA".into(),
        0,
        true,
        vec![&If::new(&nothing, vec![&Return::new(&ZERO)]), &Return::new(&PRESENT)],
    ));
    // The DMA descriptor (ACPI 6.5, 6.4.2.2): channel 2, 8 bits.
    let channel = Encoded(vec![0x2a, 1 << 2, 0]);
    let resources = encoded(&ResourceTemplate::new(vec![
        &IO::new(0x3f0, 0x3f0, 1, 6),
        &IO::new(0x3f7, 0x3f7, 1, 1),
        &isa_irq(6),
        &channel,
    ]));
    Device::new(
        "FDC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0700")),
            &region,
            &field,
            &status,
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(out);
}

/// A serial port, which says itself whether it is there: a scratch register that keeps what is written means a UART.
fn serial_port(out: &mut dyn AmlSink, number: u8, port: u16, irq: u8) {
    let scratch = port + SCRATCH_OFFSET;
    let region = OpRegion::new("SREG".into(), OpRegionSpace::SystemIO, &scratch, &ONE);
    let field = Field::new(
        "SREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"SCR_", 8)],
    );
    let register = Path::new("SCR_");
    let keeps = Equal::new(&register, &SCRATCH_VALUE);
    let status = encoded(&Method::new(
        "_STA".into(),
        0,
        true,
        vec![
            &Store::new(&register, &SCRATCH_VALUE),
            &If::new(&keeps, vec![&Return::new(&PRESENT)]),
            &Return::new(&ZERO),
        ],
    ));
    let resources =
        encoded(&ResourceTemplate::new(vec![&IO::new(port, port, 1, pc::SERIAL_SIZE as u8), &isa_irq(irq)]));
    Device::new(
        Path::new(&format!("COM{number}")),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &number),
            &region,
            &field,
            &status,
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(out);
}

/// A processor, whose `_UID` is the MADT's ACPI id.
fn processor(out: &mut dyn AmlSink, id: u32) {
    Device::new(
        Path::new(&format!("C{id:03X}")),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    )
    .to_aml_bytes(out);
}
