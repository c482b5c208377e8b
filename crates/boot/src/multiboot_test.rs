//! Loading kernels made here.

use super::*;
use crate::testing::{Files, config, read};
use arch::registers::{cr0, gpr};

const LOAD: u32 = 0x10_0000;

/// A kernel of the first kind with its header at 64, that brings its own addresses.
fn first(flags: u32) -> Vec<u8> {
    let mut kernel = vec![0xf4; 1000];
    let addresses = [LOAD + 64, LOAD, LOAD + 900, LOAD + 8192, LOAD + 16];
    let header = [MAGIC_1, flags, 0u32.wrapping_sub(MAGIC_1).wrapping_sub(flags)];
    kernel[64..96].copy_from_slice(&words(header.into_iter().chain(addresses)));
    kernel
}

/// A kernel of the second kind with these tags.
fn second(tags: &[u8]) -> Vec<u8> {
    let mut kernel = vec![0xf4; 2000];
    let length = 16 + tags.len() as u32 + 8;
    let mut header = words([MAGIC_2, 0, length, 0u32.wrapping_sub(MAGIC_2).wrapping_sub(length)]);
    header.extend(tags);
    header.extend(words([0, 8]));
    kernel[128..128 + header.len()].copy_from_slice(&header);
    kernel
}

fn address_tags() -> Vec<u8> {
    words([2, 24, LOAD + 128, LOAD, 0, 0, 3, 12, LOAD + 4, 0])
}

fn boot(kernel: &[u8], modules: &[&[u8]]) -> Result<(Ram, CpuState), Error> {
    let files = Files::new();
    let initrd = modules.iter().enumerate().map(|(i, bytes)| files.add(&format!("module{i}"), bytes)).collect();
    let config = config(files.add("kernel", kernel), initrd, "-v one");
    let ram = Ram::new(64 << 20).unwrap();
    crate::load(&ram, &config).map(|state| (ram, state))
}

#[test]
fn a_modules_arguments_are_told_with_its_name() {
    let files = Files::new();
    let kernel = files.add("kernel", &first(HAS_ADDRESSES | 3));
    let (plain, spaced) = (files.add("plain", &[1; 5]), files.add("a name", &[2; 6]));
    let with_arguments = format!("{} root=/dev/xvda quiet", plain.display());
    let config = |initrd| config(kernel.clone(), initrd, "");
    let ram = Ram::new(64 << 20).unwrap();
    let state = crate::load(&ram, &config(vec![with_arguments.clone().into(), spaced.clone()])).unwrap();
    let information = read::<INFORMATION_SIZE>(&ram, state.gpr[gpr::RBX]);
    let modules = read::<32>(&ram, word(&information, 24).into());
    assert_eq!(string(&ram, word(&modules, 8)), with_arguments);
    assert_eq!(read::<5>(&ram, word(&modules, 0).into()), [1; 5]);
    assert_eq!(string(&ram, word(&modules, 24)), spaced.display().to_string());
    assert_eq!(read::<6>(&ram, word(&modules, 16).into()), [2; 6]);
    let error = crate::load(&ram, &config(vec!["/nowhere quiet".into()])).err().unwrap().to_string();
    assert!(error.contains("/nowhere:") || error.contains("/nowhere "), "{error}");
}

fn string(ram: &Ram, address: u32) -> String {
    let bytes = read::<200>(ram, address.into());
    String::from_utf8(bytes.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn the_first_kind_is_told_of_memory_command_line_and_modules() {
    let (ram, state) = boot(&first(HAS_ADDRESSES | 3), &[&[1; 5000], &[2; 3]]).unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (u64::from(LOAD) + 16, BOOT_MAGIC_1.into()));
    assert_eq!((state.cr0 & (cr0::PE | cr0::PG), state.cr4), (cr0::PE, 0));
    assert!(state.segments[1].default_big());
    assert_eq!(read::<4>(&ram, u64::from(LOAD) + 896), [0xf4; 4]);
    assert_eq!(read::<4>(&ram, u64::from(LOAD) + 900), [0; 4], "what follows the loaded part is cleared");
    let information = read::<INFORMATION_SIZE>(&ram, state.gpr[gpr::RBX]);
    let at = |offset| word(&information, offset);
    assert_eq!((at(0), at(4), at(8)), (INFORMATION, 639, 63 << 10));
    assert!(string(&ram, at(16)).ends_with("kernel -v one"));
    assert_eq!(string(&ram, at(64)), "Ringer");
    assert_eq!(at(20), 2);
    let modules = read::<32>(&ram, at(24).into());
    assert_eq!((word(&modules, 0), word(&modules, 4)), (LOAD + 8192, LOAD + 8192 + 5000));
    assert_eq!((word(&modules, 16), word(&modules, 20)), (LOAD + 16384, LOAD + 16384 + 3));
    assert!(string(&ram, word(&modules, 24)).ends_with("module1"));
    assert_eq!(read::<3>(&ram, word(&modules, 16).into()), [2; 3]);
    let map = read::<24>(&ram, at(48).into());
    assert_eq!((word(&map, 0), word(&map, 12), word(&map, 20)), (20, layout::EBDA as u32, 1));
}

#[test]
fn the_second_kind_gets_a_list_of_tags() {
    let (ram, state) = boot(&second(&address_tags()), &[&[7; 10]]).unwrap();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (u64::from(LOAD) + 4, BOOT_MAGIC_2.into()));
    let information = read::<2048>(&ram, state.gpr[gpr::RBX]);
    let (total, mut at, mut kinds) = (word(&information, 0) as usize, 8, Vec::new());
    while at < total {
        let tag = &information[at..];
        kinds.push(word(tag, 0));
        match word(tag, 0) {
            told::MODULE => assert_eq!(read::<10>(&ram, word(tag, 8).into()), [7; 10]),
            told::NEW_RSDP => assert!(tag[8..].starts_with(b"RSD PTR ")),
            told::COMMAND_LINE => assert!(tag[8..word(tag, 4) as usize].ends_with(b"kernel -v one\0")),
            _ => {}
        }
        at += (word(tag, 4) as usize).next_multiple_of(8);
    }
    assert_eq!((at, kinds), (total, vec![1, 2, 3, 4, 6, 15, 0]));
}

#[test]
fn a_kernel_may_ask_for_low_memory_and_finds_its_modules_in_high_memory() {
    let low = words([2, 24, 0x8000 + 128, 0x8000, 0, 0, 3, 12, 0x8004, 0]);
    let (ram, state) = boot(&second(&low), &[&[7; 10]]).unwrap();
    assert_eq!((state.rip, read::<4>(&ram, 0x8000)), (0x8004, [0xf4; 4]));
    assert_eq!(read::<10>(&ram, layout::HIGH_MEMORY), [7; 10]);
}

#[test]
fn what_can_not_be_given_is_refused() {
    let error = |kernel: &[u8]| boot(kernel, &[]).err().unwrap().to_string();
    assert!(error(&first(HAS_ADDRESSES | 8)).contains("unknown"));
    assert!(error(&first(3)).contains("neither ELF nor"));
    let mut tags = address_tags();
    tags.extend(words([7, 8]));
    assert!(error(&second(&tags)).contains("--firmware"));
    let optional = words([1 << 16 | 7, 8]);
    assert!(boot(&second(&[address_tags(), optional].concat()), &[]).is_ok());
    let low = words([2, 24, 128, 0, 0, 0]);
    assert!(error(&second(&low)).contains("neither from 1 MiB on nor"));
    let across = words([2, 24, 0x7_f000 + 128, 0x7_f000, 0, 0x8_0001]);
    assert!(error(&second(&across)).contains("0x7f000 to 0x80001"));
    let backwards = words([2, 24, LOAD + 200, LOAD, 0, 0]);
    assert!(error(&second(&backwards)).contains("before its beginning"));
    let beyond = words([2, 24, LOAD + 128, LOAD, 0, u32::MAX]);
    assert!(error(&second(&beyond)).contains("does not fit"));
    let far = words([2, 24, LOAD + 128, LOAD, LOAD + 5000, 0]);
    assert!(error(&second(&far)).contains("cut off"));
}

#[test]
fn several_modules_are_for_multiboot_kernels_only() {
    let error = boot(&crate::testing::bzimage(|_| ()), &[&[1], &[2]]).err().unwrap();
    assert!(matches!(error, Error::OneInitrd { .. }), "{error}");
}

#[test]
fn mutated_kernels_never_panic() {
    crate::testing::mutate(&first(HAS_ADDRESSES | 3), 0x5eed);
    crate::testing::mutate(&second(&address_tags()), 0x5eee);
}
