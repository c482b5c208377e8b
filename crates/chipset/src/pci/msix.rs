//! MSI-X (PCI local bus 3.0, 6.8.2): the table of messages and the pending bits.

/// Bytes of one table entry: message address, message data, vector control.
pub const ENTRY_SIZE: usize = 16;
const ADDRESS: usize = 0;
const DATA: usize = 8;
const CONTROL: usize = 12;
const MASKED: u8 = 1;
/// Message control register, in the capability.
pub const CONTROL_ENABLE: u16 = 1 << 15;
pub const CONTROL_MASK_ALL: u16 = 1 << 14;

/// A message to send: address and data.
pub type Message = (u64, u32);

/// The table and whether it is in use.
pub struct Msix {
    table: Vec<[u8; ENTRY_SIZE]>,
    pending: Vec<bool>,
    enabled: bool,
    all_masked: bool,
}

impl Msix {
    pub fn new(vectors: usize) -> Self {
        let mut msix = Msix { table: Vec::new(), pending: Vec::new(), enabled: false, all_masked: false };
        msix.table.resize(vectors, [0; ENTRY_SIZE]);
        msix.pending.resize(vectors, false);
        msix.reset();
        msix
    }

    /// All entries are masked, MSI-X is off.
    pub fn reset(&mut self) {
        self.table.fill([0; ENTRY_SIZE]);
        self.table.iter_mut().for_each(|entry| entry[CONTROL] = MASKED);
        self.pending.fill(false);
        (self.enabled, self.all_masked) = (false, false);
    }

    pub fn vectors(&self) -> usize {
        self.table.len()
    }

    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Takes the message control register. Returns the messages that became free.
    pub fn set_control(&mut self, control: u16) -> Vec<Message> {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.all_masked = control & CONTROL_MASK_ALL != 0;
        (0..self.table.len()).filter_map(|vector| self.release(vector)).collect()
    }

    /// Reads the table from byte `offset`; zeros where it has ended.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let Some(entry) = self.table.get(offset / ENTRY_SIZE) else { return };
        data.iter_mut().zip(entry.iter().skip(offset % ENTRY_SIZE)).for_each(|(to, from)| *to = *from);
    }

    /// Writes the table, within one entry. Returns the message that became free.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) -> Option<Message> {
        let entry = self.table.get_mut(offset / ENTRY_SIZE)?;
        entry.iter_mut().skip(offset % ENTRY_SIZE).zip(data).for_each(|(to, from)| *to = *from);
        self.release(offset / ENTRY_SIZE)
    }

    /// Reads the pending bits from byte `offset`.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index).saturating_mul(8);
            let bits = self.pending.iter().skip(first).take(8);
            *byte = bits.enumerate().fold(0, |bits, (bit, pending)| bits | u8::from(*pending) << bit);
        }
    }

    /// An interrupt by `vector`: the message to send now, if it is not masked.
    pub fn raise(&mut self, vector: u16) -> Option<Message> {
        let vector = usize::from(vector);
        *self.pending.get_mut(vector)? = true;
        self.release(vector)
    }

    fn release(&mut self, vector: usize) -> Option<Message> {
        let (entry, pending) = (self.table.get(vector)?, self.pending.get_mut(vector)?);
        let open = self.enabled && !self.all_masked && entry[CONTROL] & MASKED == 0;
        if !*pending || !open {
            return None;
        }
        *pending = false;
        let mut address = [0; 8];
        let mut data = [0; 4];
        address.copy_from_slice(&entry[ADDRESS..DATA]);
        data.copy_from_slice(&entry[DATA..CONTROL]);
        Some((u64::from_le_bytes(address), u32::from_le_bytes(data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(msix: &mut Msix, vector: usize) -> Option<Message> {
        msix.write_table(vector * ENTRY_SIZE, &0xfee0_1000u32.to_le_bytes());
        msix.write_table(vector * ENTRY_SIZE + DATA, &0x41u32.to_le_bytes());
        msix.write_table(vector * ENTRY_SIZE + CONTROL, &[0; 4])
    }

    #[test]
    fn a_masked_vector_waits_and_is_sent_once() {
        let mut msix = Msix::new(10);
        assert!(msix.set_control(CONTROL_ENABLE).is_empty());
        assert_eq!((msix.raise(9), msix.raise(9)), (None, None));
        let mut bits = [0; 4];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0, 2, 0, 0]);
        assert_eq!(open(&mut msix, 9), Some((0xfee0_1000, 0x41)));
        assert!(msix.set_control(CONTROL_ENABLE).is_empty());
        assert_eq!(msix.raise(9), Some((0xfee0_1000, 0x41)));
    }

    #[test]
    fn the_function_mask_holds_everything_back() {
        let mut msix = Msix::new(2);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        open(&mut msix, 1);
        assert_eq!(msix.raise(1), None);
        assert_eq!(msix.set_control(CONTROL_ENABLE).len(), 1);
    }

    #[test]
    fn there_is_nothing_beyond_the_table() {
        let mut msix = Msix::new(1);
        assert_eq!(msix.raise(1), None);
        assert_eq!(msix.write_table(ENTRY_SIZE, &[0; 4]), None);
        let mut data = [1; 8];
        msix.read_table(usize::MAX - 16, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_pending(usize::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
