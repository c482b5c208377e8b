//! What KVM's failures mean, for people.

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use memory::Ram;
use memory::vm_memory::{Bytes, GuestAddress};

/// Longest x86 instruction.
const LONGEST: usize = 15;

/// KVM_EXIT_FAIL_ENTRY.
pub fn failed_entry(reason: u64) -> String {
    // Intel: bit 31 and the basic exit reason 33 (Intel SDM 3C 26.8).
    const INVALID_GUEST_STATE: u64 = 1 << 31 | 33;
    match reason {
        INVALID_GUEST_STATE => {
            "the processor refused to enter the guest: its state is not valid for virtualization; older processors can't \
             run all real-mode code"
                .into()
        }
        _ => format!("the processor refused to enter the guest (reason {reason:#x} of the hardware)"),
    }
}

/// EFAULT of KVM_RUN, and KVM_EXIT_MEMORY_FAULT.
pub fn memory_fault(address: Option<u64>) -> String {
    let place = address.map(|address| format!(" at guest-physical address {address:#x}")).unwrap_or_default();
    format!(
        "KVM can't get the guest's memory{place}: the host may be out of memory, or over a limit of its control group"
    )
}

/// KVM_EXIT_INTERNAL_ERROR.
pub fn internal_error(fd: &mut VcpuFd, ram: &Ram) -> String {
    // SAFETY: KVM_RUN has just returned for KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this part of the union.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal.data.get(..(internal.ndata as usize).min(internal.data.len())).unwrap_or_default();
    let words: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
    match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            let at = position(fd);
            let bytes = reported(data).or_else(|| fetch(fd, ram)).map(|bytes| hex(&bytes));
            let bytes = bytes.map_or("unreadable".into(), |bytes| format!("bytes {bytes}"));
            format!("KVM can't emulate the guest's instruction at {at} ({bytes})")
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => {
            format!("KVM met two exceptions at once at {} ({})", position(fd), words.join(" "))
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            format!("KVM can't deliver an event to the guest at {} ({})", position(fd), words.join(" "))
        }
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            format!(
                "the processor left the guest at {} for a reason that KVM does not know ({})",
                position(fd),
                words.join(" ")
            )
        }
        other => format!("KVM reports internal error {other} at {} ({})", position(fd), words.join(" ")),
    }
}

fn position(fd: &VcpuFd) -> String {
    match (fd.get_sregs(), fd.get_regs()) {
        (Ok(sregs), Ok(regs)) => format!("{:#x}:{:#x}", sregs.cs.selector, regs.rip),
        _ => "an unknown place".into(),
    }
}

/// The instruction's bytes, where the kernel has put them behind its flags: a length and fifteen bytes.
fn reported(data: &[u64]) -> Option<Vec<u8>> {
    let (flags, rest) = data.split_first()?;
    if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return None;
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (length, bytes) = bytes.split_first()?;
    bytes.get(..usize::from(*length).min(LONGEST)).filter(|bytes| !bytes.is_empty()).map(<[u8]>::to_vec)
}

/// The bytes at the vCPU's instruction pointer, as many as there are up to the page's end.
fn fetch(fd: &VcpuFd, ram: &Ram) -> Option<Vec<u8>> {
    let (sregs, regs) = (fd.get_sregs().ok()?, fd.get_regs().ok()?);
    let linear = sregs.cs.base.wrapping_add(regs.rip);
    let at = fd.translate_gva(linear).ok().filter(|t| t.valid != 0)?.physical_address;
    let length = LONGEST.min(4096 - (at & 0xfff) as usize);
    let mut bytes = vec![0; length];
    ram.view().read_slice(&mut bytes, GuestAddress(at)).ok()?;
    Some(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_an_instruction_are_taken_from_the_kernels_report() {
        assert_eq!(
            reported(&[1, u64::from_le_bytes([3, 0x0f, 0x01, 0xf8, 9, 9, 9, 9]), 0]).unwrap(),
            [0x0f, 0x01, 0xf8]
        );
        assert_eq!(reported(&[0, 3]), None);
        assert_eq!(reported(&[1]), None);
        assert_eq!(reported(&[1, 0xff, u64::MAX]).unwrap().len(), LONGEST);
        assert_eq!(hex(&[0x0f, 0x01, 0xf8]), "0f 01 f8");
    }
}
