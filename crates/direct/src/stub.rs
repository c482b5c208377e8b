//! The program of a space's process: a loop that does the system calls of a list.
//!
//! ```text
//! entry: mov eax, pause       a process that has just begun waits for its tracer
//!        syscall
//!        jmp entry
//! next:  mov rax, [rbx]       the tracer starts a batch here: RBX is its first operation, R12 their number
//!        mov rdi, [rbx + 8]   ... rsi, rdx, r10, r8, r9
//! call:  syscall
//!        cmp rax, -4095       an error
//!        jae done
//!        add rbx, 64
//!        dec r12
//!        jnz next
//! done:  int3                 the batch is over: R12 is 0, or RAX says why RBX's operation failed
//!        rdpmc                those that are tried when a space is made
//!        cpuid
//! ```
//!
//! Guest code can jump here, but gains nothing: it runs under `PTRACE_SYSEMU`, where `syscall` is a stop and no more.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use iced_x86::code_asm::{CodeAssembler, r8, r9, r10, r12, rax, rbx, rdi, rdx, rsi};
use iced_x86::{BlockEncoderOptions, IcedError};

use crate::PAGE_SIZE;
use crate::operations::OPERATION;

/// Where the process has the stub's page.
pub const CODE: u64 = 0x6f5a_3c00_0000;
/// Calls return an error as a number from this one on (Linux, `MAX_ERRNO`).
pub const FIRST_ERROR: u64 = -4095i64 as u64;

/// The size of an ELF header, and of one of its program headers (System V ABI, "Object Files").
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// The program and its places.
pub struct Stub {
    /// An ELF executable.
    pub image: Vec<u8>,
    /// Where a batch begins.
    pub next: u64,
    /// The one `SYSCALL` of batches.
    pub call: u64,
    /// Where a batch has ended: behind its INT3.
    pub done: u64,
    /// Instructions that must not work.
    pub rdpmc: u64,
    /// One that need not, where the host can have it so.
    pub cpuid: u64,
}

impl Stub {
    /// The program, assembled when it is first needed.
    pub fn get() -> Result<&'static Stub, io::Error> {
        static STUB: OnceLock<Result<Stub, String>> = OnceLock::new();
        let stub = STUB.get_or_init(|| Stub::assemble().map_err(|error| error.to_string()));
        stub.as_ref().map_err(|error| io::Error::other(error.as_str()))
    }

    fn assemble() -> Result<Stub, IcedError> {
        let entry = CODE + ELF_HEADER + 2 * PROGRAM_HEADER;
        let mut a = CodeAssembler::new(64)?;
        let [mut start, mut next, mut call, mut done] = std::array::from_fn(|_| a.create_label());
        a.set_label(&mut start)?;
        a.mov(rax, libc::SYS_pause)?;
        a.syscall()?;
        a.jmp(start)?;
        a.set_label(&mut next)?;
        for (index, register) in [rax, rdi, rsi, rdx, r10, r8, r9].into_iter().enumerate() {
            a.mov(register, iced_x86::code_asm::qword_ptr(rbx + 8 * index as i32))?;
        }
        a.set_label(&mut call)?;
        a.syscall()?;
        a.cmp(rax, FIRST_ERROR as i32)?;
        a.jae(done)?;
        a.add(rbx, OPERATION as i32)?;
        a.dec(r12)?;
        a.jne(next)?;
        a.set_label(&mut done)?;
        a.int3()?;
        a.rdpmc()?;
        a.cpuid()?;
        let code = a.assemble_options(entry, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let [next, call, done] = [code.label_ip(&next)?, code.label_ip(&call)?, code.label_ip(&done)? + 1];
        Ok(Stub { image: elf(entry, &code.inner.code_buffer), next, call, done, rdpmc: done, cpuid: done + 2 })
    }

    /// The program as a file that can be executed, the same one for all spaces of this process.
    pub fn file(&self) -> io::Result<&'static File> {
        static FILE: OnceLock<File> = OnceLock::new();
        if let Some(file) = FILE.get() {
            return Ok(file);
        }
        let mut file = executable(c"ringer-direct")?;
        file.write_all(&self.image)?;
        // SAFETY: no memory is passed. From here on nobody can change the file.
        unsafe {
            let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
            libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals);
        }
        Ok(FILE.get_or_init(|| file))
    }
}

/// An empty file in memory that may be executed. Kernels before 6.3 don't know that this has to be asked for.
fn executable(name: &std::ffi::CStr) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    for flags in [flags | libc::MFD_EXEC, flags] {
        // SAFETY: the name is a C string.
        let descriptor = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if descriptor != -1 {
            // SAFETY: it is new, and of nobody else.
            return Ok(unsafe { File::from_raw_fd(descriptor) });
        }
    }
    Err(io::Error::last_os_error())
}

/// An executable of one page, which is mapped at [`CODE`] (System V ABI, "Object Files" and "Program Loading").
fn elf(entry: u64, code: &[u8]) -> Vec<u8> {
    let size = ELF_HEADER + 2 * PROGRAM_HEADER + code.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut half = |values: &[u16]| image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    // ET_EXEC, EM_X86_64, version 1; then entry, program headers' offset, section headers' offset, flags.
    half(&[2, 62, 1, 0]);
    image.extend([entry, ELF_HEADER, 0].iter().flat_map(|value| value.to_le_bytes()));
    let mut half = |values: &[u16]| image.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    half(&[0, 0, ELF_HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0]);
    // PT_LOAD, readable and executable: this whole file. PT_GNU_STACK, readable and writable: without it older kernels
    // make everything executable that is readable.
    let load = [0, CODE, CODE, size, size, PAGE_SIZE];
    let stack = [0, 0, 0, 0, 0, 16];
    for (kind, flags, words) in [(1u32, 5u32, load), (0x6474_e551, 6, stack)] {
        image.extend([kind, flags].iter().flat_map(|value| value.to_le_bytes()));
        image.extend(words.iter().flat_map(|value| value.to_le_bytes()));
    }
    image.extend(code);
    image
}
