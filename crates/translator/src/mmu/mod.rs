//! How the processor sees memory: segmentation, paging, and the operands of instructions.
//!
//! An access goes from an operand ([`operand`]: which segment, which offset) through segmentation ([`segmentation`]:
//! limits and canonical addresses, [`Vcpu::linear`]) to [`linear`] ([`Vcpu::read_linear`], [`Vcpu::write_linear`]),
//! which asks the software TLB and, where that has no answer, [`walk`]. Nothing is written before every page of an
//! access is known to allow it.
//!
//! [`Vcpu::linear`]: crate::Vcpu::linear
//! [`Vcpu::read_linear`]: crate::Vcpu::read_linear
//! [`Vcpu::write_linear`]: crate::Vcpu::write_linear

pub mod linear;
pub mod operand;
pub mod segmentation;
pub mod stack;
pub mod walk;

pub use segmentation::is_canonical;
pub use stack::Stack;
pub use walk::{Access, Mapping, walk};

#[cfg(test)]
mod tests;
