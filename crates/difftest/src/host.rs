//! Which processor the cases run on natively.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

/// AMD's or Hygon's, as the guest's then is: it differs from Intel's where the manuals do, and in what they leave open.
pub fn is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    // The first letters of the vendor: "Auth", "Hygo".
    *AMD.get_or_init(|| matches!(&__cpuid(0).ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}
