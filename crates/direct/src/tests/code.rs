//! The scan finds each instruction wherever it stands, and nothing else.

use iced_x86::code_asm::*;

use crate::PAGE_SIZE;
use crate::scan::{BEFORE, BEHIND, Sensitive, is_listed, sensitive};

/// Every instruction that the scan is to find, with prefixes and operands of several kinds.
const FOUND: [(&str, &[u8]); 35] = [
    ("cpuid", &[0x0f, 0xa2]),
    ("sysenter", &[0x0f, 0x34]),
    ("int 4", &[0xcd, 0x04]),
    ("int 80h", &[0xcd, 0x80]),
    ("lar eax, cx", &[0x0f, 0x02, 0xc1]),
    ("lsl eax, cx", &[0x0f, 0x03, 0xc1]),
    ("lsl r8, r9", &[0x4d, 0x0f, 0x03, 0xc1]),
    ("lsl eax, [rax]", &[0x0f, 0x03, 0x00]),
    ("smsw eax", &[0x0f, 0x01, 0xe0]),
    ("sgdt [rax]", &[0x0f, 0x01, 0x00]),
    ("sgdt [rbp + 8]", &[0x0f, 0x01, 0x45, 0x08]),
    ("sidt [rax]", &[0x0f, 0x01, 0x08]),
    ("sidt [rax + 80h]", &[0x0f, 0x01, 0x88, 0x80, 0, 0, 0]),
    ("smsw [rax]", &[0x0f, 0x01, 0x20]),
    ("xgetbv", &[0x0f, 0x01, 0xd0]),
    ("rdpkru", &[0x0f, 0x01, 0xee]),
    ("wrpkru", &[0x0f, 0x01, 0xef]),
    ("vmcall", &[0x0f, 0x01, 0xc1]),
    ("vmfunc", &[0x0f, 0x01, 0xd4]),
    ("vmmcall", &[0x0f, 0x01, 0xd9]),
    ("rdpid rax", &[0xf3, 0x0f, 0xc7, 0xf8]),
    ("rdpid r15", &[0xf3, 0x41, 0x0f, 0xc7, 0xff]),
    ("rdtscp", &[0x0f, 0x01, 0xf9]),
    ("rdpru", &[0x0f, 0x01, 0xfd]),
    ("xsavec [rax]", &[0x0f, 0xc7, 0x20]),
    ("xsavec64 [rdi + 8]", &[0x48, 0x0f, 0xc7, 0x67, 0x08]),
    ("xsave [rax]", &[0x0f, 0xae, 0x20]),
    ("xsave64 [rsp]", &[0x48, 0x0f, 0xae, 0x24, 0x24]),
    ("xsave [fs:rax]", &[0x64, 0x0f, 0xae, 0x20]),
    ("xrstor [rax]", &[0x0f, 0xae, 0x28]),
    ("xrstor64 [rip + 0]", &[0x48, 0x0f, 0xae, 0x2d, 0, 0, 0, 0]),
    ("xsaveopt [rax]", &[0x0f, 0xae, 0x30]),
    ("xsaveopt64 [rdi + 40h]", &[0x48, 0x0f, 0xae, 0x77, 0x40]),
    ("xsaveopt64 [r12]", &[0x49, 0x0f, 0xae, 0x34, 0x24]),
    ("xrstor64 [rsp + 40h]", &[0x48, 0x0f, 0xae, 0x6c, 0x24, 0x40]),
];

/// Instructions that may run, or that stop by themselves; some have the bytes of those that may not.
const NOT_FOUND: [(&str, &[u8]); 29] = [
    ("syscall", &[0x0f, 0x05]),
    ("int 3", &[0xcd, 0x03]),
    ("int 20h", &[0xcd, 0x20]),
    ("mov eax, 80cdh", &[0xb8, 0xcd, 0x80, 0x00, 0x00]),
    ("rdtsc", &[0x0f, 0x31]),
    ("rdpmc", &[0x0f, 0x33]),
    ("ud2", &[0x0f, 0x0b]),
    ("int3", &[0xcc]),
    ("xtest", &[0x0f, 0x01, 0xd6]),
    ("cmpxchg16b [rax]", &[0x48, 0x0f, 0xc7, 0x08]),
    ("rdrand eax", &[0x0f, 0xc7, 0xf0]),
    ("rdseed eax", &[0x0f, 0xc7, 0xf8]),
    ("fxsave [rax]", &[0x0f, 0xae, 0x00]),
    ("ldmxcsr [rax]", &[0x0f, 0xae, 0x10]),
    ("clflush [rax]", &[0x0f, 0xae, 0x38]),
    ("clwb [rax]", &[0x66, 0x0f, 0xae, 0x30]),
    ("mfence", &[0x0f, 0xae, 0xf0]),
    ("rdfsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
    ("invlpg [rax]", &[0x0f, 0x01, 0x38]),
    ("lgdt [rax]", &[0x0f, 0x01, 0x10]),
    ("sldt eax", &[0x0f, 0x00, 0xc0]),
    ("mov eax, 0a20fh", &[0xb8, 0x0f, 0xa2, 0x00, 0x00]),
    ("jmp +10fh", &[0xe9, 0x0f, 0x01, 0x00, 0x00]),
    ("je +30fh", &[0x0f, 0x84, 0x0f, 0x03, 0x00, 0x00]),
    ("call +34xx0fh", &[0xe8, 0x0f, 0x34, 0x12, 0x00]),
    ("lea rax, [rip + 20fh]", &[0x48, 0x8d, 0x05, 0x0f, 0x02, 0x00, 0x00]),
    ("mov byte ptr [rbx + 0fh], 0a2h", &[0xc6, 0x43, 0x0f, 0xa2]),
    ("mov rax, imm64", &[0x48, 0xb8, 0x00, 0x0f, 0x01, 0xd0, 0x0f, 0xa2, 0x0f, 0x34]),
    ("cmp dword ptr [rdi + 0fh], imm", &[0x81, 0x7f, 0x0f, 0x03, 0xc0, 0x00, 0x00]),
];

/// Ordinary code of a page and a half: a function again and again.
fn ordinary_code() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut round = a.create_label();
    a.push(rbp).unwrap();
    a.mov(rbp, rsp).unwrap();
    a.xor(eax, eax).unwrap();
    a.set_label(&mut round).unwrap();
    a.movzx(ecx, byte_ptr(rdi + rax)).unwrap();
    a.add(qword_ptr(rsi + rcx * 8 + 0x120), 1).unwrap();
    a.inc(rax).unwrap();
    a.cmp(rax, rdx).unwrap();
    a.jb(round).unwrap();
    a.movups(xmm0, xmmword_ptr(rsp + 0x18)).unwrap();
    a.pop(rbp).unwrap();
    a.ret().unwrap();
    let function = a.assemble(0x1000).unwrap();
    function.iter().copied().cycle().take(6144 / function.len() * function.len()).collect()
}

/// Where the function's instructions begin, in the function.
fn beginnings(code: &[u8]) -> Vec<usize> {
    let decoder = iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE);
    decoder.into_iter().map(|instruction| instruction.ip() as usize).collect()
}

#[test]
fn sensitive_instructions_are_found_wherever_an_instruction_can_begin() {
    let code = ordinary_code();
    assert!(sensitive(&code, 0).is_none());
    for at in beginnings(&code) {
        for (name, bytes) in FOUND {
            let code = [&code[..at], bytes, &code[at..]].concat();
            assert!(!sensitive(&code, 0).is_none(), "{name} at {at}");
        }
    }
}

#[test]
fn other_instructions_are_not_found_whatever_bytes_they_have() {
    let code = ordinary_code();
    for at in beginnings(&code).into_iter().filter(|&at| at > 32) {
        for (name, bytes) in NOT_FOUND {
            let code = [&code[..at], bytes, &code[at..]].concat();
            assert!(sensitive(&code, 0).is_none(), "{name} at {at}");
        }
    }
    assert!(sensitive(&[], 0).is_none());
}

#[test]
fn instructions_across_the_join_of_two_pages_belong_to_both() {
    let code = ordinary_code();
    let beginnings = beginnings(&code);
    for (name, bytes) in FOUND {
        for &at in beginnings.iter().filter(|&&at| (4000..4200).contains(&at)) {
            let code = [&code[..at], bytes, &code[at..]].concat();
            // The page from each byte of the instruction on, with what is before it.
            let opcode = at + bytes.iter().position(|&byte| matches!(byte, 0x0f | 0xcd)).unwrap();
            for page in at..opcode + 2 {
                assert!(!sensitive(&code[page - BEFORE..], BEFORE).is_none(), "{name} at {at}, page from {page}");
            }
            // And a page behind it has nothing of it.
            assert!(sensitive(&code[opcode + 4 - BEFORE..], BEFORE).is_none(), "{name} at {at}");
        }
    }
}

#[test]
fn the_scan_says_where_instructions_begin_that_can_be_guarded() {
    let code = ordinary_code();
    for at in beginnings(&code).into_iter().filter(|&at| at > 32) {
        for (name, bytes) in FOUND {
            let code = [&code[..at], bytes, &code[at..]].concat();
            let found = sensitive(&code, 0);
            let (cpuids, others) = if name == "cpuid" { (vec![at as u64], vec![]) } else { (vec![], vec![at as u64]) };
            let expected = Sensitive { cpuids: Some(cpuids), others: Some(others), led: vec![] };
            assert_eq!(found, expected, "{name} at {at}");
            // A page that begins in its midst.
            let found = sensitive(&code, at + 1);
            let places = if name == "cpuid" { found.cpuids } else { found.others };
            assert!(places.is_none(), "{name} at {at}: {places:?}");
        }
    }
}

/// A function that asks for several leaves, one after the other, is left or comes to all of them by the first.
#[test]
fn the_scan_says_which_instructions_others_lead_to() {
    let code = ordinary_code();
    let function = beginnings(&code).into_iter().find(|&at| at > 32 && code[at - 1] == 0xc3).unwrap();
    // mov eax, 1; cpuid; je +1; xgetbv; cpuid; ret; cpuid
    let asks = [0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0x74, 1, 0x0f, 0x01, 0xd0, 0x0f, 0xa2, 0xc3, 0x0f, 0xa2];
    let found = sensitive(&[&code[..function], &asks, &code[function..]].concat(), 0);
    let [first, xgetbv, second, other] = [5, 9, 12, 15].map(|at| (function + at) as u64);
    let expected =
        Sensitive { cpuids: Some(vec![first, second, other]), others: Some(vec![xgetbv]), led: vec![xgetbv, second] };
    assert_eq!(found, expected);
}

#[test]
fn an_instruction_with_nothing_before_it_is_found() {
    for (name, bytes) in FOUND {
        assert!(!sensitive(bytes, 0).is_none(), "{name}");
    }
}

/// The code of this very program: compiled code, with what the standard library asks of processors.
#[test]
fn the_scan_agrees_with_decoding_from_the_beginning() {
    const PAGE: usize = PAGE_SIZE as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let program = std::env::current_exe().unwrap();
    let code = maps.lines().find(|line| line.contains("r-xp") && line.ends_with(program.to_str().unwrap())).unwrap();
    let (start, end) = code.split_whitespace().next().unwrap().split_once('-').unwrap();
    let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
    // SAFETY: this program's own code, which stays mapped and is never written.
    let code = unsafe { std::slice::from_raw_parts(start as *const u8, end - start) };
    let (mut listed, mut agree, mut missed) = (0, 0, 0);
    let mut pages = vec![false; code.len() / PAGE];
    for instruction in &mut iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE) {
        if is_listed(&instruction) {
            pages[instruction.ip() as usize / PAGE] = true;
            pages[(instruction.next_ip() as usize - 1) / PAGE] = true;
        }
    }
    for (index, &expected) in pages.iter().enumerate() {
        let (from, page) = ((index * PAGE).saturating_sub(BEFORE), index * PAGE);
        let bytes = &code[from..(page + PAGE + BEHIND).min(code.len())];
        let found = !sensitive(bytes, page - from).is_none();
        listed += usize::from(expected);
        agree += usize::from(found == expected);
        missed += usize::from(expected && !found);
    }
    assert!(pages.len() > 100 && listed > 0, "{listed} of {} pages", pages.len());
    assert_eq!(missed, 0);
    assert!(agree * 100 >= pages.len() * 99, "{agree} of {}", pages.len());
}
