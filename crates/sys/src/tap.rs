//! Network interfaces whose frames a process exchanges (Linux `Documentation/networking/tuntap.rst`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::ioctl::{IntegerSetter, Setter, Updater, ioctl};

/// Requests and flags of `linux/if_tun.h`.
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;
const TUN_F_TSO_ECN: usize = 8;

/// The most bytes of an interface's name.
pub const NAME_LENGTH: usize = 15;

/// `struct ifreq`, of which the kernel reads and writes name and flags; the rest is padding for its union.
#[repr(C)]
struct Request {
    name: [u8; NAME_LENGTH + 1],
    flags: u16,
    padding: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: u16) -> io::Result<Self> {
        let mut request = Request { name: [0; NAME_LENGTH + 1], flags, padding: [0; 22] };
        if name.len() > NAME_LENGTH || name.contains(['\0', '/']) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        request.name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        Ok(request)
    }
}

/// One queue of the interface `name`, which is made if there is none; of a new one, if the name is empty. Each frame is
/// preceded by a virtio header of `header` bytes. Reads and writes do not block.
pub fn open(name: &str, multi_queue: bool, header: i32) -> io::Result<(File, String)> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    let mut request = Request::new(name, flags)?;
    let nonblock = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).write(true).custom_flags(nonblock).open("/dev/net/tun")?;
    // SAFETY: the kernel reads and writes one `struct ifreq` (40 bytes), which `Request` is laid out as.
    unsafe { ioctl(&file, Updater::<TUNSETIFF, Request>::new(&mut request)) }?;
    // SAFETY: the kernel reads one int.
    unsafe { ioctl(&file, Setter::<TUNSETVNETHDRSZ, i32>::new(header)) }?;
    let name = request.name.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
    Ok((file, name))
}

/// Says which frames the reader of a queue takes unfinished; this holds for all queues of the interface.
pub fn set_offloads(queue: &File, checksum: bool, tso4: bool, tso6: bool) -> io::Result<()> {
    let mut flags = 0;
    if checksum {
        flags |= TUN_F_CSUM;
        flags |= if tso4 { TUN_F_TSO4 } else { 0 };
        flags |= if tso6 { TUN_F_TSO6 } else { 0 };
        flags |= if tso4 || tso6 { TUN_F_TSO_ECN } else { 0 };
    }
    // SAFETY: the argument is the value itself, no memory is touched.
    unsafe { ioctl(queue, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }?;
    Ok(())
}

/// Whether the host sends frames to a queue of an interface with several.
pub fn set_enabled(queue: &File, enabled: bool) -> io::Result<()> {
    let request = Request::new("", if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE })?;
    // SAFETY: the kernel reads one `struct ifreq` (40 bytes), which `Request` is laid out as.
    unsafe { ioctl(queue, Setter::<TUNSETQUEUE, Request>::new(request)) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_long_as_the_kernel_reads() {
        assert_eq!(size_of::<Request>(), 40);
    }

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["sixteen-bytes-xx", "a/b", "a\0b"] {
            assert_eq!(open(name, false, 12).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
