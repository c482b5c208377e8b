//! fw_cfg: what the monitor tells firmware, as numbered items and named files (QEMU `docs/specs/fw_cfg.rst`).
//!
//! A guest selects an item, and reads it byte by byte at the data port, or lets the device copy it by DMA. Items are made
//! before the machine starts; files of the host are read when the guest wants them. Only a [`Register`] can be written.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::View;
use memory::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Device;

/// Numbers of items that have one.
pub mod key {
    pub const SIGNATURE: u16 = 0x00;
    pub const FEATURES: u16 = 0x01;
    pub const UUID: u16 = 0x02;
    pub const RAM_SIZE: u16 = 0x03;
    pub const NO_GRAPHIC: u16 = 0x04;
    pub const CPUS: u16 = 0x05;
    pub const KERNEL_ADDRESS: u16 = 0x07;
    pub const KERNEL_SIZE: u16 = 0x08;
    pub const INITRD_ADDRESS: u16 = 0x0a;
    pub const INITRD_SIZE: u16 = 0x0b;
    pub const BOOT_MENU: u16 = 0x0e;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const KERNEL_ENTRY: u16 = 0x10;
    pub const KERNEL_DATA: u16 = 0x11;
    pub const INITRD_DATA: u16 = 0x12;
    pub const COMMAND_LINE_ADDRESS: u16 = 0x13;
    pub const COMMAND_LINE_SIZE: u16 = 0x14;
    pub const COMMAND_LINE_DATA: u16 = 0x15;
    pub const SETUP_ADDRESS: u16 = 0x16;
    pub const SETUP_SIZE: u16 = 0x17;
    pub const SETUP_DATA: u16 = 0x18;
    pub const DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
    /// Of the x86: interrupt source override of the timer, and what there was before `etc/e820`.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// The longest name of a file, without its final zero.
pub const MAX_NAME: usize = 55;
const MAX_FILES: usize = 0x1000;

/// Features: the ports, and DMA.
const FEATURES: u32 = 1 << 0 | 1 << 1;
/// What the DMA address register reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// The control word of a DMA request.
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;

/// Port offsets.
pub const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA: u64 = 4;
const DMA_LOW: u64 = 8;
/// First port, and how many are decoded: selector and data, DMA address.
pub const FW_CFG_PORT: u16 = 0x510;
pub const FW_CFG_SIZE: u16 = 12;

/// How an item is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    Number(u16),
    File(String),
}

/// An item that is a part of another device.
pub trait Register: Send + Sync {
    /// In bytes.
    fn size(&self) -> u64;
    /// The guest has selected it.
    fn select(&self) {}
    fn read(&self, offset: u64) -> u8;
    /// The guest writes bytes, all of them within the item. By itself nothing can be written.
    fn write(&self, _offset: u64, _bytes: &[u8]) {}
}

/// What an item holds.
pub enum Content {
    Bytes(Vec<u8>),
    /// So many bytes of a file, from an offset on.
    File {
        file: File,
        offset: u64,
        size: u64,
    },
    Register(Arc<dyn Register>),
}

/// The largest register; what is written at once is no longer.
const MAX_REGISTER: usize = 64;

impl Content {
    fn size(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File { size, .. } => *size,
            Content::Register(register) => register.size(),
        }
    }
}

pub struct Item {
    pub name: Name,
    pub content: Content,
}

impl Item {
    pub fn number(number: u16, bytes: impl Into<Vec<u8>>) -> Self {
        Item { name: Name::Number(number), content: Content::Bytes(bytes.into()) }
    }

    pub fn file(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Item { name: Name::File(name.into()), content: Content::Bytes(bytes.into()) }
    }
}

/// What any software can ask of the machine, whether firmware has started it or not.
pub fn facts(ram_size: u64, cpus: u32) -> Vec<Item> {
    let cpus = u16::try_from(cpus).unwrap_or(u16::MAX).to_le_bytes();
    vec![
        Item::number(key::RAM_SIZE, ram_size.to_le_bytes()),
        Item::number(key::UUID, [0; 16]),
        Item::number(key::NO_GRAPHIC, 0u16.to_le_bytes()),
        Item::number(key::CPUS, cpus),
        Item::number(key::MAX_CPUS, cpus),
    ]
}

#[derive(Default)]
struct State {
    selected: u16,
    offset: u64,
    /// The upper half of the DMA address.
    high: u32,
}

/// The device.
pub struct FwCfg {
    items: Vec<(u16, Content)>,
    view: View,
    state: Mutex<State>,
}

impl FwCfg {
    /// A device with these items, the directory of files among them. Of several with one name the first counts.
    pub fn new(view: View, items: Vec<Item>) -> Self {
        let mut numbered = vec![
            (key::SIGNATURE, Content::Bytes(b"QEMU".to_vec())),
            (key::FEATURES, Content::Bytes(FEATURES.to_le_bytes().to_vec())),
        ];
        let mut files = Vec::new();
        for item in items {
            match item.name {
                Name::Number(number) => numbered.push((number, item.content)),
                Name::File(name) => files.push((name, item.content)),
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        files.dedup_by(|later, first| later.0 == first.0);
        files.truncate(MAX_FILES);
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (number, (name, content)) in (key::FIRST_FILE..).zip(&files) {
            directory.extend(u32::try_from(content.size()).unwrap_or(u32::MAX).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; MAX_NAME + 1];
            field.iter_mut().zip(name.bytes().take(MAX_NAME)).for_each(|(to, from)| *to = from);
            directory.extend(field);
        }
        numbered.push((key::DIRECTORY, Content::Bytes(directory)));
        numbered.extend((key::FIRST_FILE..).zip(files).map(|(number, (_, content))| (number, content)));
        FwCfg { items: numbered, view, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn item(&self, number: u16) -> Option<&Content> {
        self.items.iter().find(|item| item.0 == number).map(|item| &item.1)
    }

    fn select(&self, state: &mut State, number: u16) {
        (state.selected, state.offset) = (number, 0);
        if let Some(Content::Register(register)) = self.item(number) {
            register.select();
        }
    }

    /// The next byte of the selected item; zeros behind its end.
    fn next_byte(&self, state: &mut State) -> u8 {
        let offset = state.offset;
        state.offset = offset.saturating_add(1);
        match self.item(state.selected) {
            Some(Content::Bytes(bytes)) => {
                usize::try_from(offset).ok().and_then(|offset| bytes.get(offset)).copied().unwrap_or(0)
            }
            Some(Content::File { file, offset: start, size }) if offset < *size => {
                let mut byte = [0];
                match std::os::unix::fs::FileExt::read_at(file, &mut byte, start.saturating_add(offset)) {
                    Ok(_) => byte[0],
                    Err(_) => 0,
                }
            }
            Some(Content::Register(register)) if offset < register.size() => register.read(offset),
            _ => 0,
        }
    }

    /// Carries out the request whose description is at `address`.
    fn transfer(&self, state: &mut State, address: u64) {
        let mut request = [0; 16];
        if self.view.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let [a, b, c, d, e, f, g, h, target @ ..] = request;
        let (control, length) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
        if control & DMA_SELECT != 0 {
            self.select(state, (control >> 16) as u16);
        }
        let done = if control & DMA_READ != 0 {
            self.copy(state, u64::from_be_bytes(target), length.into())
        } else {
            control & DMA_WRITE == 0 || self.store(state, u64::from_be_bytes(target), length.into())
        };
        if control & (DMA_READ | DMA_WRITE | DMA_SKIP) != 0 {
            state.offset = state.offset.saturating_add(length.into());
        }
        let result = if done { 0 } else { DMA_ERROR };
        // A request that lies where nothing can be written gets no answer.
        let _ = self.view.write_slice(&result.to_be_bytes(), GuestAddress(address));
    }

    /// Writes `length` bytes from guest memory to the selected item, if it takes them.
    fn store(&self, state: &State, source: u64, length: u64) -> bool {
        let Some(Content::Register(register)) = self.item(state.selected) else { return false };
        let mut buffer = [0; MAX_REGISTER];
        let bytes = usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length));
        let end = state.offset.saturating_add(length);
        let (Some(bytes), true) = (bytes, end <= register.size()) else { return false };
        if self.view.read_slice(bytes, GuestAddress(source)).is_err() {
            return false;
        }
        register.write(state.offset, bytes);
        true
    }

    /// Copies the next `length` bytes of the selected item to guest memory, with zeros behind its end. Says whether all
    /// could be.
    fn copy(&self, state: &State, target: u64, length: u64) -> bool {
        let item = self.item(state.selected);
        let left = item.map_or(0, Content::size).saturating_sub(state.offset).min(length);
        let copied = match item {
            Some(Content::Bytes(bytes)) => {
                let range = usize::try_from(state.offset).ok().map(|start| start..start.saturating_add(left as usize));
                let part = range.and_then(|range| bytes.get(range)).unwrap_or_default();
                self.view.write_slice(part, GuestAddress(target)).is_ok()
            }
            Some(Content::Register(register)) => {
                let bytes: Vec<u8> = (0..left).map(|index| register.read(state.offset.saturating_add(index))).collect();
                self.view.write_slice(&bytes, GuestAddress(target)).is_ok()
            }
            Some(Content::File { file, offset, .. }) if left > 0 => {
                let slices: Result<Vec<_>, _> = self.view.get_slices(GuestAddress(target), left as usize).collect();
                let start = offset.saturating_add(state.offset);
                slices.is_ok_and(|slices| {
                    memory::file::read_at(file, &slices, start).is_ok_and(|done| done as u64 == left)
                })
            }
            _ => true,
        };
        copied && self.clear(target.saturating_add(left), length - left)
    }

    fn clear(&self, mut at: u64, mut length: u64) -> bool {
        const ZEROS: [u8; 4096] = [0; 4096];
        while length > 0 {
            let part = length.min(ZEROS.len() as u64);
            if self.view.write_slice(&ZEROS[..part as usize], GuestAddress(at)).is_err() {
                return false;
            }
            (at, length) = (at.saturating_add(part), length - part);
        }
        true
    }
}

impl Device for FwCfg {
    fn width(&self) -> usize {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            DMA.. => {
                let bytes = DMA_SIGNATURE.iter().skip((offset - DMA) as usize);
                data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
            // The selector can't be read.
            SELECTOR => data.fill(0),
            _ => {
                data.fill(0);
                if let (DATA, Some(byte)) = (offset, data.first_mut()) {
                    *byte = self.next_byte(&mut self.lock());
                }
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (SELECTOR, &[low, high, ..]) => self.select(&mut state, u16::from_le_bytes([low, high])),
            (DMA, &[a, b, c, d]) => state.high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let address = u64::from(state.high) << 32 | u64::from(u32::from_be_bytes([a, b, c, d]));
                state.high = 0;
                self.transfer(&mut state, address);
            }
            _ => {}
        }
    }

    fn reset(&self) {
        *self.lock() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{poke, read, read8};
    use memory::Ram;

    fn device(ram: &Ram) -> FwCfg {
        let mut file = tempfile();
        std::io::Write::write_all(&mut file, b"0123456789").unwrap();
        let items = vec![
            Item::number(key::CPUS, 2u16.to_le_bytes()),
            Item::file("etc/b", *b"second"),
            Item::file("etc/a", *b"first"),
            Item { name: Name::Number(key::KERNEL_DATA), content: Content::File { file, offset: 2, size: 6 } },
        ];
        FwCfg::new(ram.view().clone(), items)
    }

    fn tempfile() -> File {
        let path = std::env::temp_dir().join(format!("fw-cfg-{:?}", std::thread::current().id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    fn select(device: &FwCfg, number: u16) {
        device.write(SELECTOR, &number.to_le_bytes());
    }

    fn bytes(device: &FwCfg, count: usize) -> Vec<u8> {
        (0..count).map(|_| read8(device, DATA)).collect()
    }

    /// Has a request carried out; its result.
    fn dma(device: &FwCfg, ram: &Ram, control: u32, length: u32, target: u64) -> u32 {
        let mut request = control.to_be_bytes().to_vec();
        request.extend(length.to_be_bytes());
        request.extend(target.to_be_bytes());
        ram.view().write_slice(&request, GuestAddress(0x1000)).unwrap();
        device.write(DMA, &[0; 4]);
        device.write(DMA_LOW, &0x1000u32.to_be_bytes());
        u32::from_be_bytes(ram.view().read_obj(GuestAddress(0x1000)).unwrap())
    }

    #[test]
    fn the_device_says_what_it_is_and_lists_its_files() {
        let ram = Ram::new(4 << 20).unwrap();
        let device = device(&ram);
        assert_eq!(bytes(&device, 6), b"QEMU\0\0");
        assert_eq!((read::<4>(&device, DMA), read::<4>(&device, DMA_LOW)), (*b"QEMU", *b" CFG"));
        select(&device, key::DIRECTORY);
        let directory = bytes(&device, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..18], *b"\0\0\0\x05\0\x20\0\0etc/a\0");
        assert_eq!(directory[68..82], *b"\0\0\0\x06\0\x21\0\0etc/b\0");
        select(&device, 0x21);
        assert_eq!(bytes(&device, 7), b"second\0");
        select(&device, key::KERNEL_DATA);
        assert_eq!(bytes(&device, 7), b"234567\0");
        select(&device, 0x7777);
        assert_eq!(bytes(&device, 2), [0, 0]);
    }

    #[test]
    fn dma_selects_skips_and_copies() {
        let ram = Ram::new(4 << 20).unwrap();
        let device = device(&ram);
        ram.view().write_slice(&[0xff; 16], GuestAddress(0x2000)).unwrap();
        assert_eq!(dma(&device, &ram, 0x20 << 16 | DMA_SELECT | DMA_SKIP, 2, 0), 0);
        assert_eq!(dma(&device, &ram, DMA_READ, 5, 0x2000), 0);
        let copied: [u8; 6] = ram.view().read_obj(GuestAddress(0x2000)).unwrap();
        assert_eq!(copied, *b"rst\0\0\xff");
        let control = u32::from(key::KERNEL_DATA) << 16 | DMA_SELECT | DMA_READ;
        assert_eq!(dma(&device, &ram, control, 8, 0x2000), 0);
        let copied: [u8; 9] = ram.view().read_obj(GuestAddress(0x2000)).unwrap();
        assert_eq!(copied, *b"234567\0\0\xff");
    }

    #[test]
    fn registers_are_written_and_know_when_they_are_selected() {
        #[derive(Default)]
        struct Echo(Mutex<([u8; 4], u32)>);
        impl Register for Echo {
            fn size(&self) -> u64 {
                4
            }
            fn select(&self) {
                self.0.lock().unwrap().1 += 1;
            }
            fn read(&self, offset: u64) -> u8 {
                self.0.lock().unwrap().0[offset as usize]
            }
            fn write(&self, offset: u64, bytes: &[u8]) {
                let end = offset as usize + bytes.len();
                self.0.lock().unwrap().0[offset as usize..end].copy_from_slice(bytes);
            }
        }
        let (ram, echo) = (Ram::new(4 << 20).unwrap(), Arc::new(Echo::default()));
        let name = Name::File("etc/echo".into());
        let device = FwCfg::new(ram.view().clone(), vec![Item { name, content: Content::Register(echo.clone()) }]);
        ram.view().write_slice(b"abcd", GuestAddress(0x2000)).unwrap();
        let select = u32::from(key::FIRST_FILE) << 16 | DMA_SELECT;
        assert_eq!(dma(&device, &ram, select | DMA_WRITE, 3, 0x2000), 0);
        assert_eq!(dma(&device, &ram, DMA_WRITE, 1, 0x2003), 0);
        assert_eq!(dma(&device, &ram, DMA_WRITE, 1, 0x2000), DMA_ERROR, "behind the end");
        assert_eq!(dma(&device, &ram, select | DMA_WRITE, u32::MAX, 0x2000), DMA_ERROR);
        super::tests::select(&device, key::FIRST_FILE);
        assert_eq!(bytes(&device, 5), b"abcd\0");
        assert_eq!(dma(&device, &ram, select | DMA_READ, 4, 0x3000), 0);
        assert_eq!(ram.view().read_obj::<[u8; 4]>(GuestAddress(0x3000)).unwrap(), *b"abcd");
        assert_eq!(echo.0.lock().unwrap().1, 4);
    }

    #[test]
    fn writes_and_impossible_targets_are_errors() {
        let ram = Ram::new(4 << 20).unwrap();
        let device = device(&ram);
        assert_eq!(dma(&device, &ram, DMA_WRITE, 1, 0x2000), DMA_ERROR);
        let control = u32::from(key::CPUS) << 16 | DMA_SELECT | DMA_READ;
        for target in [4 << 20, u64::MAX, (4 << 20) - 1] {
            assert_eq!(dma(&device, &ram, control, u32::MAX, target), DMA_ERROR);
        }
        device.write(DMA, &[0xff; 4]);
        device.write(DMA_LOW, &[0xff; 4]);
    }

    #[test]
    fn random_accesses_do_no_harm() {
        let ram = Ram::new(4 << 20).unwrap();
        poke(&device(&ram), FW_CFG_SIZE.into(), 100_000, |_| ());
    }
}
