//! The x86 architecture as data: what a processor's state is made of and what its constants are called.
//!
//! This crate has no behaviour. [`CpuState`] is the one neutral form of a vCPU's state: engines import it, run, and
//! export it again, so that a state taken from one engine can be resumed on another, and a test can set one up, run an
//! instruction, and compare. Start reading at [`state`]; the other modules are the names of bits.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod exception;
pub mod msr;
pub mod registers;
pub mod state;

pub use exception::{Exception, Vector};
pub use state::{CpuState, DescriptorTable, Segment, SegmentRegister};
