//! The smallest things that a machine can boot.

/// Where kernels are loaded, and their code there.
const LOAD: u32 = 0x10_0000;

/// An ELF file with a PVH entry (Xen `docs/misc/pvh.pandoc`): `code` begins in 32-bit protected mode without paging.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u32 = 64 + 2 * 56;
    const NOTE: u32 = 20;
    let entry = LOAD + HEADERS + NOTE;
    let size = u64::from(HEADERS + NOTE) + code.len() as u64;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |out: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    let word = |out: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    let long = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    // An executable for x86-64, its program headers behind this one.
    half(&mut out, &[2, 62]);
    word(&mut out, &[1]);
    long(&mut out, &[entry.into(), 64, 0]);
    word(&mut out, &[0]);
    half(&mut out, &[64, 56, 2, 0, 0, 0]);
    // The whole file is loaded; the note is in it.
    let (load, note) = (u64::from(LOAD), u64::from(HEADERS));
    word(&mut out, &[1, 7]);
    long(&mut out, &[0, load, load, size, size, 0x1000]);
    word(&mut out, &[4, 4]);
    long(&mut out, &[note, load + note, load + note, NOTE.into(), NOTE.into(), 4]);
    // XEN_ELFNOTE_PHYS32_ENTRY
    word(&mut out, &[4, 4, 18]);
    out.extend(b"Xen\0");
    word(&mut out, &[entry]);
    out.extend(code);
    out
}

/// Writes '!' to port 0x3f8 and halts.
pub fn first_instruction() -> Vec<u8> {
    // mov dx, 0x3f8; mov al, '!'; out dx, al; hlt; jmp to the hlt
    elf(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd])
}

/// Jumps to where no memory is.
pub fn astray() -> Vec<u8> {
    // mov eax, 0xd0000000; jmp eax
    elf(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0])
}

/// Reads all memory from 2 MiB to 256 MiB again and again.
pub fn reader() -> Vec<u8> {
    // again: mov edi, 0x200000; next: mov eax, [edi]; add edi, 4096; cmp edi, 0x10000000; jb next; jmp again
    elf(&[
        0xbf, 0, 0, 0x20, 0, 0x8b, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff, 0, 0, 0, 0x10, 0x72, 0xf0, 0xeb, 0xe9,
    ])
}

/// A disk whose first sector has the BIOS read the second, writes that to port 0x3f8 and resets the machine.
pub fn boot_disk(text: &str) -> Vec<u8> {
    #[rustfmt::skip]
    const CODE: &[u8] = &[
        0x31, 0xc0,             // xor ax, ax
        0x8e, 0xd8,             // mov ds, ax
        0x8e, 0xd0,             // mov ss, ax
        0xbc, 0x00, 0x7c,       // mov sp, 0x7c00
        0xbe, 0x2a, 0x7c,       // mov si, packet
        0xb4, 0x42,             // mov ah, 0x42: extended read
        0xcd, 0x13,             // int 0x13
        0x72, 0x0f,             // jc end
        0xfa,                   // cli: at its ticks SeaBIOS sends what it still has for the same port
        0xbe, 0x00, 0x7e,       // mov si, 0x7e00
        0xac,                   // next: lodsb
        0x84, 0xc0,             // test al, al
        0x74, 0x06,             // jz end
        0xba, 0xf8, 0x03,       // mov dx, 0x3f8
        0xee,                   // out dx, al
        0xeb, 0xf5,             // jmp next
        0xba, 0xf9, 0x0c,       // end: mov dx, 0xcf9
        0xb0, 0x06,             // mov al, 6
        0xee,                   // out dx, al
        0xf4,                   // hlt
        0xeb, 0xfd,             // jmp to the hlt
        0x10, 0, 1, 0,          // packet: one sector
        0x00, 0x7e, 0, 0,       // to 0:0x7e00
        1, 0, 0, 0, 0, 0, 0, 0, // from sector 1
    ];
    let mut disk = vec![0; 1 << 20];
    disk.splice(..CODE.len(), CODE.iter().copied());
    disk.splice(510..512, [0x55, 0xaa]);
    disk.splice(512..512 + text.len(), text.bytes());
    disk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_entry_is_its_first_instruction() {
        let kernel = first_instruction();
        let word = |at: usize| u32::from_le_bytes(kernel[at..at + 4].try_into().unwrap());
        let entry = word(24);
        assert_eq!(kernel[(entry - LOAD) as usize..][..2], [0x66, 0xba]);
        assert_eq!(word(64 + 2 * 56 + 16), entry, "the note says so too");
        assert_eq!(kernel.len(), word(64 + 32) as usize);
    }

    #[test]
    fn the_boot_sectors_packet_is_where_it_says() {
        let disk = boot_disk("text");
        let packet = usize::from(u16::from_le_bytes([disk[10], disk[11]])) - 0x7c00;
        assert_eq!(disk[packet..packet + 4], [0x10, 0, 1, 0]);
        assert_eq!((disk.len() % 512, &disk[512..517]), (0, &b"text\0"[..]));
    }
}
