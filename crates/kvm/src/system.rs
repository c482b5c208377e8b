//! /dev/kvm: opened with advice where it can't be, and its capabilities, asked before anything depends on them.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;
use std::{env, io};

use kvm_bindings::*;
use kvm_ioctls::Kvm;

use crate::Error;

const DEVICE: &CStr = c"/dev/kvm";

/// What the engine can't be without: number, name.
const NEEDED: [(u32, &str); 15] = [
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
    (KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ"),
    (KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    (KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP"),
    (KVM_CAP_X2APIC_API, "KVM_CAP_X2APIC_API"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// An open /dev/kvm that has everything that is needed.
pub struct System {
    pub kvm: Kvm,
}

impl System {
    pub fn open() -> Result<Self, Error> {
        // SAFETY: the path is a valid C string.
        let fd = unsafe { libc::open(DEVICE.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::Absent,
                Some(libc::EACCES | libc::EPERM) => Error::Denied { advice: advice() },
                _ => Error::Open(error),
            });
        }
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let kvm = unsafe { Kvm::from_raw_fd(fd) };
        match kvm.get_api_version() {
            version if version == KVM_API_VERSION as i32 => {}
            version if version < 0 => return Err(Error::NotKvm(io::Error::last_os_error())),
            version => return Err(Error::ApiVersion(version)),
        }
        let system = System { kvm };
        let missing: Vec<_> =
            NEEDED.iter().filter(|(number, _)| system.capability(*number) == 0).map(|(_, name)| *name).collect();
        if missing.is_empty() { Ok(system) } else { Err(Error::Missing(missing.join(", "))) }
    }

    /// What the kernel answers for a capability: 0 if it isn't there, else 1 or a number that it has.
    pub fn capability(&self, number: u32) -> u32 {
        self.kvm.check_extension_raw(number.into()).try_into().unwrap_or(0)
    }
}

/// What a user does who may not open /dev/kvm: its group is who may.
fn advice() -> String {
    let Ok(device) = fs::metadata("/dev/kvm") else { return "ask the host's administrator".into() };
    if device.mode() & 0o060 != 0o060 || device.gid() == 0 {
        return "only root may; ask the host's administrator for access to it".into();
    }
    let group = fs::read_to_string("/etc/group")
        .ok()
        .and_then(|groups| group_name(&groups, device.gid()))
        .unwrap_or_else(|| device.gid().to_string());
    let user = env::var("USER").ok().filter(|user| CString::new(user.as_str()).is_ok() && !user.is_empty());
    let user = user.as_deref().unwrap_or("$USER");
    format!("join the group {group} (sudo usermod -aG {group} {user}, then log in again)")
}

/// The name of a group in a file of /etc/group's format.
fn group_name(groups: &str, id: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_the_device_is_found_by_its_number() {
        let groups = "root:x:0:\nkvm:x:993:libvirt,me\nbroken\n";
        assert_eq!(group_name(groups, 993).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 994), None);
    }
}
