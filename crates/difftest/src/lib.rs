//! Compares the translator with the real processor, and holds the pieces that bare-metal tests are made of. Ships in nothing.
//!
//! The data flow: [`generate`] makes [`case`]s out of a seed; [`native`] runs a batch of them in a child process;
//! [`guest`] runs the same batch in a vCPU; [`case::differences`] says where they disagree. `tests/` drives this over every instruction form, over
//! sequences, and runs guests that exercise system behaviour.

pub mod bare;
pub mod case;
pub mod compare;
pub mod engines;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod local;
pub mod native;
pub mod program;
pub mod rng;
pub mod sequence;
