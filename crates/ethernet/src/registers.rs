//! Offsets and bits of registers (Intel PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual, 13;
//! Intel 82574 datasheet, 10).

/// All registers lie in this much memory.
pub const SIZE: u64 = 0x2_0000;

pub const CTRL: u64 = 0x0000;
/// The same register again, for drivers of the first cards.
pub const CTRL_COPY: u64 = 0x0004;
pub const STATUS: u64 = 0x0008;
pub const EECD: u64 = 0x0010;
pub const EERD: u64 = 0x0014;
pub const CTRL_EXT: u64 = 0x0018;
pub const MDIC: u64 = 0x0020;
pub const VET: u64 = 0x0038;
pub const ICR: u64 = 0x00c0;
pub const ITR: u64 = 0x00c4;
pub const ICS: u64 = 0x00c8;
pub const IMS: u64 = 0x00d0;
pub const IMC: u64 = 0x00d8;
pub const EIAC: u64 = 0x00dc;
pub const IAM: u64 = 0x00e0;
pub const IVAR: u64 = 0x00e4;
/// Five of them, one for each vector.
pub const EITR: u64 = 0x00e8;
pub const RCTL: u64 = 0x0100;
pub const TCTL: u64 = 0x0400;
pub const LEDCTL: u64 = 0x0e00;
pub const PBA: u64 = 0x1000;
pub const EEMNGCTL: u64 = 0x1010;
/// Receive ring 0 and transmit rings 0 and 1: low address, high, length, head, tail from there on.
pub const RX_RING: u64 = 0x2800;
pub const TX_RINGS: [u64; 2] = [0x3800, 0x3900];
pub const RING_HIGH: u64 = 0x04;
pub const RING_LENGTH: u64 = 0x08;
pub const RING_HEAD: u64 = 0x10;
pub const RING_TAIL: u64 = 0x18;
pub const STATISTICS: u64 = 0x4000;
pub const STATISTICS_END: u64 = 0x4128;
pub const RXCSUM: u64 = 0x5000;
pub const RFCTL: u64 = 0x5008;
pub const MULTICAST: u64 = 0x5200;
pub const ADDRESSES: u64 = 0x5400;
pub const ADDRESSES_END: u64 = 0x5480;
pub const VLANS: u64 = 0x5600;
pub const FACTPS: u64 = 0x5b30;
pub const SWSM: u64 = 0x5b50;

/// CTRL.
pub const CTRL_MASTER_DISABLE: u32 = 1 << 2;
pub const CTRL_LINK_UP: u32 = 1 << 6;
pub const CTRL_RESET: u32 = 1 << 26;
pub const CTRL_VLAN: u32 = 1 << 30;
pub const CTRL_PHY_RESET: u32 = 1 << 31;
/// STATUS: full duplex, link up, 1000 Mbit/s detected and in use.
pub const STATUS_LINK: u32 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 9;
pub const STATUS_MASTER_ENABLED: u32 = 1 << 19;
/// CTRL_EXT: interrupt acknowledge auto-mask.
pub const CTRL_EXT_IAME: u32 = 1 << 27;
pub const CTRL_EXT_EIAME: u32 = 1 << 24;
pub const CTRL_EXT_EE_RESET: u32 = 1 << 13;

/// Interrupt causes.
pub const TX_WRITTEN: u32 = 1 << 0;
pub const TX_EMPTY: u32 = 1 << 1;
pub const LINK_CHANGED: u32 = 1 << 2;
pub const RX_LOW: u32 = 1 << 4;
pub const RX_TIMER: u32 = 1 << 7;
pub const RX_QUEUE_0: u32 = 1 << 20;
pub const TX_QUEUE_0: u32 = 1 << 22;
pub const OTHER: u32 = 1 << 24;
pub const ASSERTED: u32 = 1 << 31;

/// RCTL.
pub const RCTL_ENABLE: u32 = 1 << 1;
pub const RCTL_UNICAST_ALL: u32 = 1 << 3;
pub const RCTL_MULTICAST_ALL: u32 = 1 << 4;
pub const RCTL_LONG: u32 = 1 << 5;
pub const RCTL_BROADCAST: u32 = 1 << 15;
pub const RCTL_VLAN_FILTER: u32 = 1 << 18;
pub const RCTL_SIZE_EXTENDED: u32 = 1 << 25;
pub const RCTL_STRIP_CRC: u32 = 1 << 26;
/// TCTL.
pub const TCTL_ENABLE: u32 = 1 << 1;
/// RXCSUM.
pub const RXCSUM_IP: u32 = 1 << 8;
pub const RXCSUM_TCP_UDP: u32 = 1 << 9;
/// The packet checksum's place in a descriptor holds something else.
pub const RXCSUM_NO_PACKET: u32 = 1 << 13;
/// RFCTL: descriptors have the extended form.
pub const RFCTL_EXTENDED: u32 = 1 << 15;

/// Statistics that are counted, by their offset.
pub const GOOD_RX: u64 = 0x4074;
pub const BROADCAST_RX: u64 = 0x4078;
pub const MULTICAST_RX: u64 = 0x407c;
pub const GOOD_TX: u64 = 0x4080;
pub const GOOD_RX_BYTES: u64 = 0x4088;
pub const GOOD_TX_BYTES: u64 = 0x4090;
pub const TOTAL_RX_BYTES: u64 = 0x40c0;
pub const TOTAL_TX_BYTES: u64 = 0x40c8;
pub const TOTAL_RX: u64 = 0x40d0;
pub const TOTAL_TX: u64 = 0x40d4;
pub const MULTICAST_TX: u64 = 0x40f0;
pub const BROADCAST_TX: u64 = 0x40f4;
pub const SEGMENTED_TX: u64 = 0x40f8;
