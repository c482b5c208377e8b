//! INT n and IRET in virtual-8086 mode (Intel SDM 3A 20.3): to the monitor, or with CR4.VME within the 8086 program,
//! which then has a virtual interrupt flag of its own.

use arch::registers::{cr4, gpr, rflags};
use arch::{Exception, SegmentRegister};

use super::{iopl, real_code_segment};
use crate::cpu::{Stop, Vcpu};
use crate::deliver::{Event, deliver};
use crate::descriptor::v8086_segment;
use crate::mmu::Stack;

pub fn int_n(cpu: &mut Vcpu, vector: u8) -> Result<(), Stop> {
    if cpu.cr4 & cr4::VME != 0 && !redirected_to_monitor(cpu, vector)? {
        return Ok(to_8086_handler(cpu, vector)?);
    }
    if iopl(cpu) < 3 {
        return Err(Exception::general_protection(0).into());
    }
    deliver(cpu, Event::SoftwareInterrupt(vector))
}

/// The bit of the software interrupt redirection bitmap, the 32 bytes below the I/O permission bitmap of the TSS.
fn redirected_to_monitor(cpu: &mut Vcpu, vector: u8) -> Result<bool, Exception> {
    let (context, base, limit) = (cpu.system_context(), cpu.tr.base, u64::from(cpu.tr.limit));
    let io_map = cpu.read_sized(base.wrapping_add(0x66) & 0xffff_ffff, 2, context)?;
    let offset = io_map.wrapping_sub(32).wrapping_add(u64::from(vector / 8));
    if offset > limit {
        return Err(Exception::general_protection(0));
    }
    let byte = cpu.read_sized(base.wrapping_add(offset) & 0xffff_ffff, 1, context)?;
    Ok(byte >> (vector % 8) & 1 != 0)
}

/// Methods 5 (IOPL 3) and 6 of Intel SDM 3A table 20-2: through the vector table at linear address 0.
fn to_8086_handler(cpu: &mut Vcpu, vector: u8) -> Result<(), Exception> {
    let target = cpu.read_sized(u64::from(vector) * 4, 4, cpu.context())?;
    let is_virtual = iopl(cpu) < 3;
    let mut image = cpu.rflags;
    if is_virtual {
        let interrupts = if image & rflags::VIF != 0 { rflags::IF } else { 0 };
        image = image & !rflags::IF | interrupts | rflags::IOPL;
    }
    let code = u64::from(cpu.seg(SegmentRegister::Cs).selector);
    let mut stack = Stack::current(cpu);
    let frame = [image, code, cpu.rip];
    stack.push_all(cpu, 2, &frame)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.rflags &= !(rflags::TF | rflags::RF | if is_virtual { rflags::VIF } else { rflags::IF });
    cpu.segments[SegmentRegister::Cs as usize] = v8086_segment((target >> 16) as u16);
    cpu.rip = target & 0xffff;
    Ok(())
}

/// IRET with IOPL below 3: only with VME and 16-bit operands, and never to where an interrupt that the monitor holds
/// back would be due.
pub fn iret(cpu: &mut Vcpu, size: usize) -> Result<(), Exception> {
    let refused = Exception::general_protection(0);
    if cpu.cr4 & cr4::VME == 0 || size != 2 {
        return Err(refused);
    }
    let mut stack = Stack::current(cpu);
    let mut frame = [0; 3];
    stack.pop_frame(cpu, 2, &mut frame)?;
    let [rip, selector, image] = frame;
    let enables = image & rflags::IF != 0;
    if enables && cpu.rflags & rflags::VIP != 0 || image & rflags::TF != 0 {
        return Err(refused);
    }
    let code = real_code_segment(cpu, selector as u16, rip)?;
    cpu.set_flags(rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT, image);
    cpu.set_flags(rflags::VIF, if enables { rflags::VIF } else { 0 });
    cpu.unblock_nmis();
    cpu.segments[SegmentRegister::Cs as usize] = code;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.rip = rip;
    Ok(())
}
