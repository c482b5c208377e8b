//! Why there is no hardware-assisted machine, in one line that says what to do.

use std::io;

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no /dev/kvm (no hardware virtualization, or its kernel module is not loaded)")]
    Absent,
    #[error("no permission to open /dev/kvm: {advice}")]
    Denied { advice: String },
    #[error("can't open /dev/kvm: {0}")]
    Open(io::Error),
    #[error("/dev/kvm is there but is not KVM's device: {0}")]
    NotKvm(io::Error),
    #[error("/dev/kvm has API version {0}, where every KVM since Linux 2.6.22 has 12")]
    ApiVersion(i32),
    #[error("this host's KVM lacks {0}: it needs a newer kernel")]
    Missing(String),
    #[error("this host's KVM allows {most} vCPUs in a machine, which is less than {asked}")]
    Vcpus { asked: u32, most: usize },
    #[error("this host's KVM has {most} memory slots, which is less than the {needed} that this machine needs")]
    Slots { needed: usize, most: usize },
    #[error("KVM refused to {what}: {source}")]
    Call { what: String, source: io::Error },
    #[error("/dev/kvm is no use for ordinary kernels: {0}")]
    Unusable(String),
    #[error(transparent)]
    Model(#[from] arch::cpuid::Error),
    #[error("the vCPU state is not valid: {0}")]
    State(String),
}

impl Error {
    /// For `map_err` on a call of the kernel that was to do `what`.
    pub(crate) fn call(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        let what = what.into();
        move |error| Error::Call { what, source: io::Error::from_raw_os_error(error.errno()) }
    }
}

impl From<Error> for engine::Error {
    /// For who has asked for this engine and for no other.
    fn from(error: Error) -> Self {
        match error {
            Error::State(why) => engine::Error::State(why),
            error => engine::Error::Unsupported { engine: "kvm", why: error.to_string() },
        }
    }
}
