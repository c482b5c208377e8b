//! For tests: kernels made here, and what comes of booting them.

use std::path::PathBuf;

use arch::CpuState;
use arch::cpuid::Topology;
use linux_loader::loader::bootparam::setup_header;
use memory::Ram;
use memory::vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::{BootConfig, Error, load};

const SETUP_SECTORS: u8 = 3;
pub const BZIMAGE_PAYLOAD: usize = 64 << 10;

/// A bzImage whose protected-mode part counts up.
pub fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: SETUP_SECTORS,
        syssize: (BZIMAGE_PAYLOAD / 16) as u32,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 2 << 20,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 16 << 20,
        init_size: 8 << 20,
        ..setup_header::default()
    };
    // The jump's second byte: where the header ends, from 0x202.
    header.jump = (0x6c_u16) << 8 | 0xeb;
    change(&mut header);
    let mut file = vec![0; (usize::from(SETUP_SECTORS) + 1) * 512];
    let bytes = header.as_slice();
    file[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
    file.extend((0..BZIMAGE_PAYLOAD / 4).flat_map(|i| (i as u32).to_le_bytes()));
    file
}

/// Files that live as long as this does.
pub struct Files(tempfile::TempDir);

impl Files {
    pub fn new() -> Self {
        Files(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn add(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

/// One processor, no screen.
pub fn config(kernel: PathBuf, initrd: Vec<PathBuf>, command_line: &str) -> BootConfig {
    BootConfig { kernel, initrd, command_line: command_line.into(), cpus: Topology::of_cores(1), screen: None }
}

/// Boots a machine with `ram` bytes from files of these contents.
pub fn boot(ram: u64, kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> Result<(Ram, CpuState), Error> {
    let files = Files::new();
    let initrd = initrd.into_iter().map(|bytes| files.add("initrd", bytes)).collect();
    let config = config(files.add("kernel", kernel), initrd, command_line);
    let ram = Ram::new(ram).unwrap();
    load(&ram, &config).map(|state| (ram, state))
}

pub fn read<const N: usize>(ram: &Ram, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.view().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// Boots 2000 variants of a kernel with bytes of its first 4 KiB changed or its end cut off, the same in each run for
/// one `seed`. What is wrong is refused, what is not boots; nothing panics.
pub fn mutate(kernel: &[u8], seed: u64) {
    let mut state = seed;
    // xorshift64*
    let mut random = |below: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    };
    let files = Files::new();
    let ram = Ram::new(64 << 20).unwrap();
    for _ in 0..2000 {
        let mut bytes = kernel.to_vec();
        for _ in 0..=random(8) {
            let at = random(bytes.len().min(4096));
            bytes[at] = [0, 1, 0x7f, 0x80, 0xff, random(256) as u8][random(6)];
        }
        if random(8) == 0 {
            bytes.truncate(random(bytes.len()));
        }
        let config = config(files.add("kernel", &bytes), Vec::new(), "quiet");
        if let Err(error) = load(&ram, &config) {
            assert!(!error.to_string().contains('\n'));
        }
    }
}
