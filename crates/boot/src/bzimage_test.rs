//! Loading bzImages made here.

use super::*;
use crate::testing::{BZIMAGE_PAYLOAD as PAYLOAD, boot, bzimage, read};
use arch::registers::{cr0, cr4, gpr};

fn params(ram: &Ram) -> boot_params {
    ram.view().read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap()
}

#[test]
fn the_kernel_is_entered_in_64_bit_mode_with_the_zero_page_in_rsi() {
    let (ram, state) = boot(128 << 20, &bzimage(|_| ()), None, "console=ttyS0").unwrap();
    assert_eq!(state.rip, (16 << 20) + 0x200);
    assert_eq!(state.gpr[gpr::RSI], layout::BOOT_PARAMS);
    assert_eq!(state.cr0 & (cr0::PE | cr0::PG), cr0::PE | cr0::PG);
    assert_eq!(state.cr4, cr4::PAE);
    assert_eq!(state.msrs, [(arch::msr::MTRR_DEF_TYPE, 0x806), (arch::msr::EFER, 0x500)]);
    assert!(state.segments[1].long() && state.segments[1].selector == 0x10);
    assert_eq!(state.rflags, 2, "interrupts are off");
    assert_eq!(read::<4>(&ram, (16 << 20) + 0x200), 0x80u32.to_le_bytes());
    assert_eq!(read::<14>(&ram, layout::COMMAND_LINE), *b"console=ttyS0\0");
}

#[test]
fn the_zero_page_tells_what_was_loaded() {
    let (ram, _) = boot(6 << 30, &bzimage(|_| ()), Some(&[7; 5000]), "quiet").unwrap();
    let params = params(&ram);
    let header = params.hdr;
    assert_eq!({ header.cmd_line_ptr }, layout::COMMAND_LINE as u32);
    assert_eq!({ header.type_of_loader }, 0xff);
    assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI);
    assert_eq!({ header.ramdisk_size }, 5000);
    let start = { header.ramdisk_image };
    assert_eq!((start % 4096, start), (0, 0x8000_0000 - 8192), "as high as initrd_addr_max allows");
    assert_eq!(read::<5>(&ram, u64::from(start) + 4995), [7; 5]);
    let map: Vec<_> =
        params.e820_table[..params.e820_entries.into()].iter().map(|e| (e.addr, e.size, e.r#type)).collect();
    let expected: Vec<_> = layout::memory_map(&ram).iter().map(|r| (r.start, r.size, r.kind as u32)).collect();
    assert_eq!(map, expected);
}

#[test]
fn the_zero_page_tells_where_the_screen_is() {
    let screen = screen_info_of(Framebuffer { address: 0xfd00_0000, width: 1024, height: 768 });
    assert_eq!(({ screen.orig_video_isVGA }, { screen.lfb_base }, { screen.lfb_depth }), (0x23, 0xfd00_0000, 32));
    assert_eq!(({ screen.lfb_width }, { screen.lfb_height }, { screen.lfb_linelength }), (1024, 768, 4096));
    assert_eq!({ screen.lfb_size }, 48, "in units of 64 KiB");
    let (ram, _) = boot(64 << 20, &bzimage(|_| ()), None, "").unwrap();
    assert_eq!({ params(&ram).screen_info.orig_video_isVGA }, 0, "without an adapter there is none");
}

#[test]
fn firmware_tables_are_in_place() {
    let (ram, _) = boot(64 << 20, &bzimage(|_| ()), None, "").unwrap();
    assert_eq!(read::<8>(&ram, layout::ACPI), *b"RSD PTR ");
    assert_eq!(read::<5>(&ram, layout::SMBIOS), *b"_SM3_");
    assert_eq!(read::<2>(&ram, 0x40e), 0x9fc0u16.to_le_bytes());
}

#[test]
fn a_relocatable_kernel_moves_down_where_ram_ends_early() {
    let (ram, state) = boot(16 << 20, &bzimage(|_| ()), None, "").unwrap();
    assert_eq!(state.rip, (2 << 20) + 0x200);
    assert_eq!(read::<4>(&ram, (2 << 20) + 4), 1u32.to_le_bytes());
    let error = boot(16 << 20, &bzimage(|h| h.relocatable_kernel = 0), None, "").err().unwrap().to_string();
    assert!(error.contains("24 MiB") && error.contains("16 MiB"), "{error}");
}

#[test]
fn a_signature_behind_the_kernel_is_not_loaded() {
    let mut file = bzimage(|_| ());
    file.extend([0xee; 4096]);
    let (ram, _) = boot(64 << 20, &file, None, "").unwrap();
    assert_eq!(read::<16>(&ram, (16 << 20) + PAYLOAD as u64 + 16), [0; 16]);
}

#[test]
fn a_kernel_without_a_64_bit_entry_is_entered_in_32_bit_protected_mode() {
    let changes: [fn(&mut setup_header); 2] = [|h| h.version = 0x20a, |h| h.xloadflags = 0];
    for change in changes {
        let (_, state) = boot(64 << 20, &bzimage(change), None, "").unwrap();
        assert_eq!((state.rip, state.gpr[gpr::RSI]), (16 << 20, layout::BOOT_PARAMS));
        assert_eq!(state.cr0 & (cr0::PE | cr0::PG), cr0::PE);
        assert!(!state.segments[1].long() && state.segments[1].default_big());
    }
}

#[test]
fn kernels_of_old_protocols_are_refused() {
    let changes: [fn(&mut setup_header); 2] = [|h| h.version = 0x206, |h| h.loadflags = 0];
    for change in changes {
        assert!(matches!(boot(64 << 20, &bzimage(change), None, ""), Err(Error::OldKernel { .. })));
    }
}

#[test]
fn headers_that_make_no_sense_are_refused() {
    let changes: [fn(&mut setup_header); 6] = [
        |h| h.kernel_alignment = 0,
        |h| h.kernel_alignment = 3 << 20,
        |h| h.pref_address = 0x1000,
        |h| h.syssize = 0,
        |h| h.init_size = u32::MAX,
        |h| (h.pref_address, h.relocatable_kernel) = (u64::MAX, 0),
    ];
    for change in changes {
        let error = boot(64 << 20, &bzimage(change), None, "").err().unwrap();
        assert!(matches!(error, Error::BadHeader { .. } | Error::KernelTooLarge { .. }), "{error}");
    }
}

#[test]
fn a_kernel_that_breaks_off_is_called_cut_off() {
    let whole = bzimage(|_| ());
    for length in [0x206, 0x230, 0x400, 0x800, whole.len() - 16] {
        let error = boot(64 << 20, &whole[..length], None, "").err().unwrap();
        assert!(matches!(error, Error::Truncated { .. }), "{length:#x}: {error}");
    }
}

#[test]
fn the_last_paragraph_may_be_incomplete() {
    let whole = bzimage(|_| ());
    assert!(boot(64 << 20, &whole[..whole.len() - 8], None, "").is_ok());
}

#[test]
fn a_ram_disk_that_does_not_fit_is_refused_with_the_room_there_is() {
    let initrd = vec![1; 25 << 20];
    let error = boot(32 << 20, &bzimage(|_| ()), Some(&initrd), "").err().unwrap().to_string();
    assert!(error.contains("initrd") && error.contains(&(25 << 20).to_string()), "{error}");
    assert!(error.contains(&(22 << 20).to_string()), "room is counted with the kernel as low as it goes: {error}");
    boot(32 << 20, &bzimage(|_| ()), Some(&initrd[..22 << 20]), "").unwrap();
}

#[test]
fn the_command_line_may_be_as_long_as_the_kernel_says_and_2047_bytes_at_most() {
    let at_most = |size, length| boot(64 << 20, &bzimage(|h| h.cmdline_size = size), None, &"x".repeat(length));
    assert!(at_most(2047, 2047).is_ok());
    assert!(at_most(4096, 2048).err().unwrap().to_string().contains("at most 2047"));
    assert!(at_most(255, 256).err().unwrap().to_string().contains("at most 255"));
    assert!(matches!(boot(64 << 20, &bzimage(|_| ()), None, "a\0b"), Err(Error::CommandLineZero)));
}
