//! What is plugged into the keyboard controller: a keyboard with 104 keys, and a mouse with a wheel and five buttons.
//!
//! Both are plain state machines: they take the bytes that the controller passes on and the events of whoever types and
//! points, and have bytes for the controller. [`crate::i8042`] owns them and says when.

pub mod codes;
pub mod keyboard;
pub mod mouse;

/// Answers of both devices.
pub const ACKNOWLEDGE: u8 = 0xfa;
pub const RESEND: u8 = 0xfe;
/// The self-test has passed.
pub const PASSED: u8 = 0xaa;
