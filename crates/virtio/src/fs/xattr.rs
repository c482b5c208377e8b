//! Extended attributes (xattr(7)) of shared files.
//!
//! Only those of the `user.` kind are the guest's: what `security.`, `trusted.` and `system.` ones mean (capabilities of
//! programs, labels, access lists) they mean to the host, so the guest neither sees nor sets them.

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::nodes::{Node, Nodes};
use super::wire::Reply;

const OURS: &[u8] = b"user.";
/// The most bytes that a value, and a list of names, can have (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub const LONGEST: usize = 64 << 10;

/// The value of an attribute, or its size if `room` is 0.
pub fn get(nodes: &Nodes, node: &Node, name: &[u8], room: usize) -> Result<Reply, Errno> {
    if !name.starts_with(OURS) {
        // What the driver takes for "this file has none", and for "no file has any".
        let lists = name.starts_with(b"system.");
        return Err(if lists { Errno::OPNOTSUPP } else { Errno::NODATA });
    }
    let mut value = vec![0; LONGEST];
    let length = getxattr(nodes.path(node), name, &mut value)?;
    answer(value, length, room)
}

/// The names of all attributes, each with a zero after it, or their size if `room` is 0.
pub fn list(nodes: &Nodes, node: &Node, room: usize) -> Result<Reply, Errno> {
    let mut all = vec![0; LONGEST];
    let length = listxattr(nodes.path(node), &mut all)?;
    all.truncate(length);
    let names: Vec<u8> =
        all.split_inclusive(|byte| *byte == 0).filter(|name| name.starts_with(OURS)).flatten().copied().collect();
    let length = names.len();
    answer(names, length, room)
}

/// `flags`: `XATTR_CREATE` and `XATTR_REPLACE` of setxattr(2).
pub fn set(nodes: &Nodes, node: &Node, name: &[u8], value: &[u8], flags: u32) -> Result<Reply, Errno> {
    let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
    setxattr(nodes.path(node), ours(name)?, value, flags)?;
    Ok(Reply::default())
}

pub fn remove(nodes: &Nodes, node: &Node, name: &[u8]) -> Result<Reply, Errno> {
    removexattr(nodes.path(node), ours(name)?)?;
    Ok(Reply::default())
}

fn ours(name: &[u8]) -> Result<&[u8], Errno> {
    if name.starts_with(OURS) { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

fn answer(mut bytes: Vec<u8>, length: usize, room: usize) -> Result<Reply, Errno> {
    match room {
        // `struct fuse_getxattr_out`
        0 => Ok(Reply::default().u32(length as u32).u32(0)),
        _ if length > room => Err(Errno::RANGE),
        _ => {
            bytes.truncate(length);
            Ok(Reply(bytes))
        }
    }
}
