//! Where a PC has its devices: addresses, ports and interrupt lines, for this crate and for the tables that tell the
//! guest about them (ACPI, E820).

/// The I/O APIC (82093AA): one 4 KiB page.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
pub const IOAPIC_SIZE: u64 = 0x1000;
/// The I/O APIC's identifier after reset, for the MADT.
pub const IOAPIC_ID: u8 = 0;
/// Its inputs are the global system interrupts 0 to 23.
pub const IOAPIC_PINS: usize = 24;
/// The high precision event timers.
pub const HPET_BASE: u64 = 0xfed0_0000;
pub const HPET_SIZE: u64 = 0x400;
/// What its identity register holds, for the ACPI table: three comparators of 64 bits, legacy replacement.
pub const HPET_IDENTITY: u32 = 0x8086_a201;
/// Local APICs, which belong to the engine.
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;

/// PCI Express configuration space, memory-mapped: buses 0 to 255, of which only bus 0 has functions.
pub const ECAM_BASE: u64 = 0xb000_0000;
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// The last bus that ECAM decodes.
pub const ECAM_LAST_BUS: u8 = 0xff;
/// The window below 4 GiB for the memory BARs of PCI functions (end exclusive).
pub const PCI_MMIO_START: u64 = 0xc000_0000;
pub const PCI_MMIO_END: u64 = 0xfec0_0000;
/// The window for the I/O BARs of PCI functions (end exclusive).
pub const PCI_IO_START: u64 = 0x1000;
pub const PCI_IO_END: u64 = 0x1_0000;
/// Configuration mechanism #1 (PCI local bus 3.0, 3.2.2.3.2): address and data, eight ports in all.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;

/// Interrupt lines: 0 to 15 are the ISA IRQs, 16 to 23 the further inputs of the I/O APIC.
pub const PIT_IRQ: u8 = 0;
/// ISA IRQ 0 reaches the I/O APIC at this input: the MADT needs an interrupt source override 0 -> 2
/// (edge-triggered, active high, as the bus has it).
pub const PIT_GSI: u8 = 2;
pub const RTC_IRQ: u8 = 8;
/// The ACPI system control interrupt: level-triggered; the MADT needs an override 9 -> 9 (level, active high).
pub const SCI_IRQ: u8 = 9;
/// Interrupt lines of PCI functions: pin INTA..INTD of device d is line `PCI_GSI_BASE + (d + pin) % 8`, pin from 0; of the
/// chipset's own devices, from 25 on, `PCI_GSI_BASE + pin`. Level-triggered, active low in what ACPI says.
pub const PCI_GSI_BASE: u8 = 16;
pub const PCI_GSI_COUNT: u8 = 8;
const FIRST_CHIPSET_DEVICE: u8 = 25;

/// Serial ports COM1 to COM4: first port and IRQ.
pub const SERIAL_PORTS: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// Ports that each serial port decodes.
pub const SERIAL_SIZE: u16 = 8;
/// Input clock of the UARTs in Hz; a divisor of 1 gives 115200 baud.
pub const SERIAL_CLOCK_HZ: u32 = 1_843_200;

/// The 8254 timer and the system control port B.
pub const PIT_PORT: u16 = 0x40;
pub const PORT_B: u16 = 0x61;
/// Input clock of the 8254 in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Real-time clock: index and data port, and the CMOS cell that holds the century (FADT `CENTURY`).
pub const RTC_PORT: u16 = 0x70;
pub const RTC_CENTURY: u8 = 0x32;

/// The keyboard controller: data, and status/command.
pub const I8042_DATA_PORT: u16 = 0x60;
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// ACPI fixed hardware. `SMI_CMD` is 0 and SCI_EN always set: the machine starts in ACPI mode.
pub const PM_BASE: u16 = 0x600;
/// What the power-management block decodes in all, in ports.
pub const PM_SIZE: u16 = 0x80;
/// PM1a_EVT_BLK, 4 ports: status and enable.
pub const PM1A_EVENT_PORT: u16 = PM_BASE;
pub const PM1_EVENT_SIZE: u8 = 4;
/// PM1a_CNT_BLK, 2 ports.
pub const PM1A_CONTROL_PORT: u16 = PM_BASE + 4;
pub const PM1_CONTROL_SIZE: u8 = 2;
/// PM_TMR_BLK, 4 ports: 32 bits wide (FADT flag TMR_VAL_EXT).
pub const PM_TIMER_PORT: u16 = PM_BASE + 8;
pub const PM_TIMER_SIZE: u8 = 4;
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// SLP_TYP of soft-off, for the `\_S5` package.
pub const S5_SLEEP_TYPE: u8 = 5;

/// APM control and status: see [`crate::smi`].
pub const APM_PORT: u16 = 0xb2;

/// The reset control register: FADT RESET_REG, in I/O space, 8 bits wide.
pub const RESET_PORT: u16 = 0xcf9;
/// FADT RESET_VALUE.
pub const RESET_VALUE: u8 = 0x06;
/// System control port A: fast A20 gate and reset.
pub const PORT_A: u16 = 0x92;

/// The interrupt line of a PCI function on bus 0: of device `device` (0..32), interrupt pin `pin` (0 is INTA).
pub const fn pci_gsi(device: u8, pin: u8) -> u8 {
    let rotated = if device < FIRST_CHIPSET_DEVICE { device.wrapping_add(pin) } else { pin };
    PCI_GSI_BASE + rotated % PCI_GSI_COUNT
}
