//! x87 state that only system code looks at closely.

use difftest::bare::*;
use iced_x86::code_asm::*;

#[test]
fn the_saved_pointer_names_the_last_instruction_also_if_its_operand_crossed_pages() {
    if translator::host_is_amd() {
        // Such a processor keeps it in no saved state unless an exception is pending (AMD APM 2, 11.4.4), so that it is lost
        // whenever its kernel, or the engine, does something in between.
        return;
    }
    let mut bare = Bare::new(4 << 20);
    let pages = bare.pages(2);
    let rip = bare.kernel_code(CODE, |a| {
        let mut store = a.create_label();
        a.lea(rdx, ptr(store))?;
        a.mov(rbx, DIRECT + pages + 4092)?;
        a.mov(rcx, DIRECT + SCRATCH)?;
        a.fninit()?;
        a.fld1()?;
        a.set_label(&mut store)?;
        a.fstp(tbyte_ptr(rbx))?;
        a.fnstenv(ptr(rcx))?;
        a.mov(eax, dword_ptr(rcx + 12))?;
        a.mov(edx, edx)?;
        a.int3()
    });
    let state = bare.kernel_state(rip);
    let mut machine = Machine::with_state(bare, &state);
    assert_eq!(machine.run(), End::Exit);
    assert_eq!(machine.frame().vector, 3);
    let gpr = machine.state().gpr;
    assert_eq!(gpr[0], gpr[2]);
    assert_eq!(machine.bare.read_u64(pages + 4092), 1 << 63);
}
