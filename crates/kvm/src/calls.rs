//! Calls of the kernel for vCPUs that kvm-ioctls has not, or only with a fixed size.

use kvm_bindings::*;
use kvm_ioctls::{Error, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn result(code: i32) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::last()) }
}

/// Queues an external interrupt of the 8259's for a vCPU that is ready for it.
pub fn queue_interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), Error> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the kernel reads the structure during the call.
    result(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) })
}

/// Reads the XSAVE area. `area` is at least as large as a `kvm_xsave`, and as KVM_CAP_XSAVE2 says where `extended`.
pub fn get_xsave(vcpu: &VcpuFd, area: &mut [u32], extended: bool) -> Result<(), Error> {
    if size_of_val(area) < size_of::<kvm_xsave>() {
        return Err(Error::new(libc::EINVAL));
    }
    let request = if extended { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
    // SAFETY: the area is as large as the kernel said it writes.
    result(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) })
}

/// Sets the XSAVE area, which is as large as for [`get_xsave`].
pub fn set_xsave(vcpu: &VcpuFd, area: &[u32]) -> Result<(), Error> {
    if size_of_val(area) < size_of::<kvm_xsave>() {
        return Err(Error::new(libc::EINVAL));
    }
    // SAFETY: the area is as large as the kernel said it reads.
    result(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) })
}

fn tsc_offset_at(address: u64) -> kvm_device_attr {
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: address, flags: 0 }
}

/// What the kernel adds to the host's time-stamp counter for the vCPU (Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_offset_at(&raw mut offset as u64);
    // SAFETY: the attribute has 64 bits, and `offset` is not used until the call is over.
    result(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_at(&raw const offset as u64);
    // SAFETY: the kernel reads the 64 bits of `offset` during the call.
    result(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}
