//! Translation: from guest bytes to a block of host code.
//!
//! [`block::translate`] decodes instructions ([`decode`], [`classify`]) up to a branch, a page's end or a limit, finds where flags are live
//! ([`liveness`]), and emits for each instruction: the address and TLB check of its memory operand ([`operand`]) and the
//! instruction itself ([`reencode`]), or a branch ([`control`]), or a call into `semantics`. Slow paths stand behind the
//! block's body, checks of loops before it ([`steady`]), and of the code itself where nobody watches it ([`checked`]). Programs' code can run
//! at whatever address it is mapped ([`relative`]). All host code is made by [`asm`].

pub mod asm;
mod behind;
mod bits;
pub mod block;
pub mod checked;
pub mod classify;
mod control;
pub mod decode;
pub mod facts;
#[cfg(test)]
mod golden;
pub mod groups;
mod level;
mod liveness;
mod operand;
pub mod reencode;
pub mod relative;
mod stack;
mod steady;
mod strings;
mod system;
