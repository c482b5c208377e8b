//! Random bytes run as kernels, in every mode a processor can be in: whatever they do, the machine resets, powers off
//! or runs on until it is ended. The monitor never panics, never fails and never hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arch::registers::{cr0, cr4, efer, pte};
use arch::{CpuState, DescriptorTable, Segment, msr};
use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};

use crate::*;

const KERNELS: u64 = 10_000;
/// The environment variable that has the number of the only kernel to run.
const ONE_KERNEL: &str = "RINGER_KERNEL";
/// What a kernel may run before it is ended: long enough for thousands of blocks.
const RUN_TIME: Duration = Duration::from_millis(3);
/// By when a machine that was ended must be.
const END_TIME: Duration = Duration::from_secs(30);

const PAGE_TABLES: u64 = 0x1000;
const KERNEL: u64 = 0x1_0000;
const KERNEL_SIZE: usize = 0x8000;

/// First bytes of instructions that matter to a monitor, which pure chance meets too seldom.
const SENSITIVE: [&[u8]; 40] = [
    &[0x0f, 0x01, 0x10],             // lgdt
    &[0x0f, 0x01, 0x18],             // lidt
    &[0x0f, 0x01, 0xd9],             // vmmcall
    &[0x0f, 0x01, 0xd1],             // xsetbv
    &[0x0f, 0x01, 0xf8],             // swapgs
    &[0x0f, 0x01, 0xf9],             // rdtscp
    &[0x0f, 0x00, 0xd8],             // ltr
    &[0x0f, 0x05],                   // syscall
    &[0x0f, 0x07],                   // sysret
    &[0x0f, 0x0b],                   // ud2
    &[0x0f, 0x20, 0xc0],             // mov eax, cr0
    &[0x0f, 0x22, 0xc0],             // mov cr0, eax
    &[0x0f, 0x22, 0xd8],             // mov cr3, eax
    &[0x0f, 0x22, 0xe0],             // mov cr4, eax
    &[0x0f, 0x23, 0xf8],             // mov dr7, eax
    &[0x0f, 0x30],                   // wrmsr
    &[0x0f, 0x32],                   // rdmsr
    &[0x0f, 0x34],                   // sysenter
    &[0x0f, 0xa2],                   // cpuid
    &[0x0f, 0xae, 0x20],             // xsave
    &[0x0f, 0xae, 0x28],             // xrstor
    &[0x0f, 0xc7, 0x08],             // cmpxchg8b
    &[0xf3, 0xa4],                   // rep movsb
    &[0xf3, 0xab],                   // rep stosd
    &[0x9b, 0xdb, 0xe3],             // finit
    &[0x9d],                         // popf
    &[0xcc],                         // int3
    &[0xcd, 0x80],                   // int 0x80
    &[0xcf],                         // iret
    &[0xcb],                         // retf
    &[0xe6, 0x20],                   // out 0x20, al
    &[0xee],                         // out dx, al
    &[0xec],                         // in al, dx
    &[0x6d],                         // insd
    &[0xf4],                         // hlt
    &[0xfb],                         // sti
    &[0x8e, 0xd0],                   // mov ss, ax
    &[0xea],                         // jmp far
    &[0x62, 0xf1, 0x7c, 0x48, 0x10], // vmovups zmm
    &[0x48, 0xb8, 0, 0, 0xe0, 0xfe], // mov rax, the local APIC
];

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn kernel(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(KERNEL_SIZE + 8);
        // In some kernels every other instruction is a sensitive one, in others nearly none.
        let density = self.below(16);
        while bytes.len() < KERNEL_SIZE {
            if self.below(16) < density {
                bytes.extend_from_slice(SENSITIVE[self.below(SENSITIVE.len() as u64) as usize]);
            } else {
                let count = 1 + self.below(6) as usize;
                bytes.extend_from_slice(&self.next().to_le_bytes()[..count]);
            }
        }
        bytes.truncate(KERNEL_SIZE);
        bytes
    }
}

/// Four levels of page tables that map the first GiB, and 3 to 4 GiB where the devices are, each at its own address.
fn write_page_tables(ram: &Ram) {
    let flags = pte::P | pte::W | pte::U;
    let entry = |address: u64, value: u64| ram.view().write_obj(value, GuestAddress(address)).unwrap();
    entry(PAGE_TABLES, (PAGE_TABLES + 0x1000) | flags);
    for gigabyte in [0, 3] {
        let directory = PAGE_TABLES + 0x2000 + gigabyte / 3 * 0x1000;
        entry(PAGE_TABLES + 0x1000 + gigabyte * 8, directory | flags);
        for index in 0..512 {
            entry(directory + index * 8, gigabyte << 30 | index << 21 | flags | pte::PS);
        }
    }
}

/// Registers to start with: real mode, flat 32-bit protected mode, or 64-bit mode.
fn entry_state(random: &mut Random) -> CpuState {
    let mut state = CpuState::reset();
    for register in &mut state.gpr {
        *register = match random.below(4) {
            0 => random.next(),
            1 => random.below(1 << 16),
            2 => 0xfee0_0000 + random.below(0x400),
            _ => KERNEL + random.below(1 << 20),
        };
    }
    let mode = random.below(3);
    if mode == 0 {
        state.segments = [Segment::real_mode((KERNEL >> 4) as u16, false); 6];
        state.segments[1] = Segment::real_mode((KERNEL >> 4) as u16, true);
        state.rip = 0;
        state.gpr.iter_mut().for_each(|register| *register &= 0xffff_ffff);
        return state;
    }
    state.segments = [Segment::flat_data(0x10, 0); 6];
    state.segments[1] = Segment::flat_code(0x08, mode == 2, 0);
    state.gdtr = DescriptorTable { base: KERNEL + random.below(0x1000), limit: 0xff };
    state.idtr = DescriptorTable { base: KERNEL + random.below(0x1000), limit: 0xfff };
    state.rip = KERNEL;
    state.cr0 = cr0::PE | cr0::ET | cr0::NE;
    if mode == 2 {
        state.cr0 |= cr0::PG | cr0::WP;
        state.cr3 = PAGE_TABLES;
        state.cr4 = cr4::PAE | cr4::OSFXSR;
        state.msrs.push((msr::EFER, efer::LME | efer::LMA | efer::SCE | efer::NXE));
    } else {
        state.gpr.iter_mut().for_each(|register| *register &= 0xffff_ffff);
    }
    state
}

#[test]
fn random_kernels_neither_break_nor_hang_the_machine() {
    let (first, kernels) = match std::env::var(ONE_KERNEL) {
        Ok(number) => (number.parse().unwrap(), 1),
        Err(_) => (0, KERNELS),
    };
    let number = Arc::new(AtomicU64::new(first));
    let current = number.clone();
    let ram = Ram::new(16 << 20).unwrap();
    let selection = select_engine(Accel::Translate, &ram, translator::Config::default(), false).unwrap();
    let loader = Box::new(move |ram: &Ram| {
        let mut random = Random(current.load(Ordering::SeqCst));
        ram.view().write_slice(&random.kernel(), GuestAddress(KERNEL)).unwrap();
        write_page_tables(ram);
        Ok(entry_state(&mut random))
    });
    let serial = [Some(Box::new(std::io::sink()) as _), None, None, None];
    let mut machine = Machine::assemble(super::parts(&ram, 1, serial), true, ram, &*selection.engine, loader).unwrap();
    let control = machine.control.clone();
    let watched = number.clone();
    std::thread::spawn(move || {
        let (mut kernel, mut since) = (u64::MAX, Instant::now());
        loop {
            std::thread::sleep(RUN_TIME);
            let now = watched.load(Ordering::SeqCst);
            if now != kernel {
                (kernel, since) = (now, Instant::now());
                continue;
            }
            if since.elapsed() > END_TIME {
                eprintln!("kernel {kernel} hangs the machine");
                std::process::abort();
            }
            control.request(Request::End);
        }
    });
    let mut failures = Vec::new();
    for kernel in first..first + kernels {
        if let Err(error) = machine.run() {
            failures.push(format!("kernel {kernel}: {error}"));
        }
        number.store(kernel + 1, Ordering::SeqCst);
        machine.control.take_request();
        machine.chipset.reset();
        machine.load().unwrap();
    }
    assert!(
        failures.is_empty(),
        "{} failures, the first of them: {:#?}",
        failures.len(),
        &failures[..failures.len().min(20)]
    );
}
