//! Answers FUSE requests.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::mem::MaybeUninit;

use memory::file;
use rustix::fs::{
    self, AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::nodes::{Node, Nodes, checked};
use super::wire::{
    ENTRY, Fields, Header, IN_HEADER, MAJOR, MINOR, OPEN_KILL_SUIDGID, OUT_HEADER, Reply, WRITE_KILL_SUIDGID, init,
    opcode, set,
};
use super::xattr;
use crate::Chain;

/// The most bytes of one READ or WRITE, and how many pages those are.
const MAX_TRANSFER: u32 = 1 << 20;
const MAX_PAGES: u16 = (MAX_TRANSFER >> 12) as u16;
/// The longest request without data: a header and two names.
const MAX_REQUEST: usize = 16 << 10;
/// What is before the data of a WRITE.
const WRITE_HEADER: usize = IN_HEADER + 40;
/// The most bytes of one COPY_FILE_RANGE: others wait meanwhile.
const MAX_COPY: u64 = 16 << 20;
/// Seconds for which the driver may believe what it was told of a file.
const VALID: u64 = 1;
/// Permission bits that may be set: not set-user-ID and set-group-ID, which would mean more to the host than to the guest.
const PERMISSIONS: u32 = 0o1777;
/// The most bytes of directory entries in one answer.
const MAX_ENTRIES: usize = 64 << 10;

type Answer = Result<Reply, Errno>;

/// Serves one directory.
pub struct Server {
    nodes: Nodes,
    read_only: bool,
    /// Ringer runs as root: files can be given to other users.
    owners: bool,
}

impl Server {
    pub fn new(nodes: Nodes, read_only: bool) -> Self {
        Server { nodes, read_only, owners: rustix::process::geteuid().is_root() }
    }

    /// The driver has forgotten everything.
    pub fn start_over(&self) {
        self.nodes.clear();
    }

    /// Answers one request; returns how many bytes of its writable part were written. `None`: it is none.
    pub fn answer(&self, chain: &Chain) -> Option<u32> {
        let mut first = [0; IN_HEADER];
        let length = chain.read_at(0, &mut first);
        let header = Header::parse(&mut Fields::new(first.get(..length)?))?;
        let most = match header.opcode {
            opcode::WRITE => WRITE_HEADER,
            opcode::SETXATTR => MAX_REQUEST + xattr::LONGEST,
            _ => MAX_REQUEST,
        };
        let mut request = vec![0; chain.readable_len().min(most) - IN_HEADER];
        let length = chain.read_at(IN_HEADER, &mut request);
        let mut fields = Fields::new(request.get(..length)?);
        match header.opcode {
            opcode::FORGET => {
                fields.u64().into_iter().for_each(|lookups| self.nodes.forget(header.node, lookups));
                return Some(0);
            }
            opcode::BATCH_FORGET => {
                self.forget_many(&mut fields);
                return Some(0);
            }
            // A request is never interrupted: each ends by itself.
            opcode::INTERRUPT => return Some(0),
            opcode::READ => return Some(self.read(&header, &mut fields, chain)),
            _ => {}
        }
        let answer = match header.opcode {
            opcode::WRITE => self.write(&mut fields, chain),
            _ => self.dispatch(&header, &mut fields),
        };
        Some(match answer {
            Ok(reply) => reply_with(chain, &header, &reply.0),
            Err(error) => reply_error(chain, &header, error),
        })
    }

    fn forget_many(&self, fields: &mut Fields<'_>) {
        let Some(count) = fields.u32() else { return };
        let _ = fields.u32();
        for _ in 0..count {
            let (Some(node), Some(lookups)) = (fields.u64(), fields.u64()) else { return };
            self.nodes.forget(node, lookups);
        }
    }

    fn dispatch(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let changes = matches!(
            header.opcode,
            opcode::SETATTR
                | opcode::SYMLINK
                | opcode::MKNOD
                | opcode::MKDIR
                | opcode::UNLINK
                | opcode::RMDIR
                | opcode::RENAME
                | opcode::RENAME2
                | opcode::LINK
                | opcode::CREATE
                | opcode::FALLOCATE
                | opcode::SETXATTR
                | opcode::REMOVEXATTR
                | opcode::COPY_FILE_RANGE
        );
        if changes && self.read_only {
            return Err(Errno::ROFS);
        }
        match header.opcode {
            opcode::INIT => initialize(fields),
            opcode::DESTROY => {
                self.start_over();
                Ok(Reply::default())
            }
            opcode::LOOKUP => {
                let parent = self.nodes.directory(header.node)?;
                self.entry(&parent, fields.text().ok_or(Errno::INVAL)?)
            }
            opcode::GETATTR => Ok(attributes(&fs::fstat(&self.nodes.get(header.node)?)?)),
            opcode::SETATTR => self.set_attributes(header, fields),
            opcode::READLINK => {
                let target = fs::readlinkat(self.nodes.get(header.node)?, "", Vec::new())?;
                Ok(Reply(target.into_bytes()))
            }
            opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::LINK => self.make(header, fields),
            opcode::UNLINK => self.remove(header, fields, AtFlags::empty()),
            opcode::RMDIR => self.remove(header, fields, AtFlags::REMOVEDIR),
            opcode::RENAME | opcode::RENAME2 => self.rename(header, fields),
            opcode::OPEN => self.open(header, fields),
            opcode::OPENDIR => {
                let file = self.nodes.open(&*self.nodes.directory(header.node)?, OFlags::DIRECTORY)?;
                Ok(opened(self.nodes.insert_handle(file)?))
            }
            opcode::CREATE => self.create(header, fields),
            opcode::READDIR | opcode::READDIRPLUS => self.read_directory(header, fields),
            opcode::RELEASE | opcode::RELEASEDIR => {
                self.nodes.remove_handle(fields.u64().ok_or(Errno::INVAL)?);
                Ok(Reply::default())
            }
            opcode::FLUSH => Ok(Reply::default()),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(fields),
            opcode::STATFS => {
                let directory = self.nodes.open(&*self.nodes.directory(super::nodes::ROOT)?, OFlags::DIRECTORY)?;
                Ok(Reply::default().statfs(&fs::fstatvfs(directory)?))
            }
            opcode::FALLOCATE => self.allocate(fields),
            opcode::LSEEK => self.seek(fields),
            opcode::COPY_FILE_RANGE => self.copy(fields),
            opcode::SYNCFS if self.read_only => Ok(Reply::default()),
            opcode::SYNCFS => {
                fs::syncfs(self.nodes.open(&*self.nodes.directory(super::nodes::ROOT)?, OFlags::DIRECTORY)?)?;
                Ok(Reply::default())
            }
            opcode::GETXATTR | opcode::SETXATTR | opcode::LISTXATTR | opcode::REMOVEXATTR => {
                self.extended_attributes(header, fields)
            }
            // The driver then does without, or by itself.
            _ => Err(Errno::NOSYS),
        }
    }

    /// The answer that tells the driver of a file in a directory.
    fn entry(&self, parent: &Node, name: &[u8]) -> Answer {
        let (number, stat) = self.nodes.look_up(parent, name)?;
        Ok(Reply::default().node(number, VALID, &stat))
    }

    /// Gives a new file its owner and exactly its permissions, whatever our own umask.
    fn finish(&self, header: &Header, parent: &Node, name: &[u8], mode: Option<u32>) -> Answer {
        if self.owners {
            let owner = (Some(user(header.uid)?), Some(group(header.gid)?));
            fs::chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        let entry = self.nodes.look_up(parent, name)?;
        let node = self.nodes.get(entry.0)?;
        let mut stat = entry.1;
        if let Some(mode) = mode.filter(|_| node.kind != FileType::Symlink) {
            let mode = Mode::from_raw_mode(mode & PERMISSIONS);
            self.nodes.by_name(&node, |directory, name| fs::chmodat(directory, name, mode, AtFlags::empty()))?;
            stat = fs::fstat(&*node)?;
        }
        Ok(Reply::default().node(entry.0, VALID, &stat))
    }

    fn make(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let parent = self.nodes.directory(header.node)?;
        let invalid = Errno::INVAL;
        let (name, mode) = match header.opcode {
            opcode::SYMLINK => {
                let name = checked(fields.text().ok_or(invalid)?)?;
                fs::symlinkat(fields.text().ok_or(invalid)?, &*parent, name)?;
                (name, None)
            }
            opcode::LINK => {
                let node = self.nodes.get(fields.u64().ok_or(invalid)?)?;
                let name = checked(fields.text().ok_or(invalid)?)?;
                self.nodes.by_name(&node, |directory, path| {
                    fs::linkat(directory, path, &*parent, name, AtFlags::SYMLINK_FOLLOW)
                })?;
                return self.entry(&parent, name);
            }
            opcode::MKDIR => {
                let mode = fields.u32().ok_or(invalid)?;
                fields.u32().ok_or(invalid)?;
                let name = checked(fields.text().ok_or(invalid)?)?;
                fs::mkdirat(&*parent, name, Mode::from_raw_mode(mode & 0o700))?;
                (name, Some(mode))
            }
            _ => {
                let mode = fields.u32().ok_or(invalid)?;
                fields.skip(12).ok_or(invalid)?;
                let name = checked(fields.text().ok_or(invalid)?)?;
                let kind = FileType::from_raw_mode(mode);
                if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
                    return Err(Errno::PERM);
                }
                fs::mknodat(&*parent, name, kind, Mode::from_raw_mode(mode & 0o600), 0)?;
                (name, Some(mode))
            }
        };
        self.finish(header, &parent, name, mode)
    }

    fn remove(&self, header: &Header, fields: &mut Fields<'_>, flags: AtFlags) -> Answer {
        let parent = self.nodes.directory(header.node)?;
        fs::unlinkat(&*parent, checked(fields.text().ok_or(Errno::INVAL)?)?, flags)?;
        Ok(Reply::default())
    }

    fn rename(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let invalid = Errno::INVAL;
        let new_parent = self.nodes.directory(fields.u64().ok_or(invalid)?)?;
        let mut flags = RenameFlags::empty();
        if header.opcode == opcode::RENAME2 {
            flags = RenameFlags::from_bits_truncate(fields.u32().ok_or(invalid)?);
            fields.u32().ok_or(invalid)?;
            // A whiteout is a device.
            if flags.contains(RenameFlags::WHITEOUT) {
                return Err(invalid);
            }
        }
        let old = checked(fields.text().ok_or(invalid)?)?;
        let new = checked(fields.text().ok_or(invalid)?)?;
        fs::renameat_with(&*self.nodes.directory(header.node)?, old, &*new_parent, new, flags)?;
        Ok(Reply::default())
    }

    /// How a file is opened of all that the guest may ask: its own kernel cares for the rest.
    fn flags(&self, asked: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(asked) & (OFlags::ACCMODE | OFlags::TRUNC);
        let writes = flags.contains(OFlags::TRUNC) || flags & OFlags::ACCMODE != OFlags::RDONLY;
        if writes && self.read_only { Err(Errno::ROFS) } else { Ok(flags) }
    }

    fn open(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let node = self.nodes.get(header.node)?;
        let (flags, more) = (fields.u32().ok_or(Errno::INVAL)?, fields.u32().ok_or(Errno::INVAL)?);
        let file = self.open_node(&node, self.flags(flags)?, more)?;
        Ok(opened(self.nodes.insert_handle(file)?))
    }

    /// `more`: flags of the protocol itself.
    fn open_node(&self, node: &Node, flags: OFlags, more: u32) -> Result<File, Errno> {
        let file = self.nodes.open(node, flags)?;
        if more & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            take_privileges(&file)?;
        }
        Ok(file)
    }

    fn create(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let invalid = Errno::INVAL;
        let (flags, mode) = (fields.u32().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
        let (_umask, more) = (fields.u32().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
        let name = checked(fields.text().ok_or(invalid)?)?;
        let parent = self.nodes.directory(header.node)?;
        let wanted = self.flags(flags)?;
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        let fixed = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(&*parent, name, wanted | fixed, Mode::from_raw_mode(mode & 0o600)) {
            Ok(file) => {
                let entry = self.finish(header, &parent, name, Some(mode))?;
                let opened = opened(self.nodes.insert_handle(file.into())?);
                Ok(Reply([entry.0, opened.0].concat()))
            }
            // Somebody on the host was faster, or the guest's cache is old.
            Err(Errno::EXIST) if !exclusive => {
                let entry = self.entry(&parent, name)?;
                let number = Fields::new(&entry.0).u64().ok_or(invalid)?;
                let file = self.open_node(&*self.nodes.get(number)?, wanted, more)?;
                Ok(Reply([entry.0, opened(self.nodes.insert_handle(file)?).0].concat()))
            }
            Err(error) => Err(error),
        }
    }

    fn set_attributes(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let change = Change::parse(fields).ok_or(Errno::INVAL)?;
        let node = self.nodes.get(header.node)?;
        let has = |bit| change.valid & bit != 0;
        if has(set::MODE) {
            let mode = Mode::from_raw_mode(change.mode & PERMISSIONS);
            self.nodes.by_name(&node, |directory, name| fs::chmodat(directory, name, mode, AtFlags::empty()))?;
        }
        if has(set::UID | set::GID) {
            let old = fs::fstat(&*node)?;
            let uid = Some(change.uid).filter(|&uid| has(set::UID) && uid != old.st_uid).map(user).transpose()?;
            let gid = Some(change.gid).filter(|&gid| has(set::GID) && gid != old.st_gid).map(group).transpose()?;
            if uid.is_some() || gid.is_some() {
                fs::chownat(&*node, "", uid, gid, AtFlags::EMPTY_PATH)?;
            }
        }
        if has(set::SIZE) {
            let file = match node.kind {
                _ if has(set::FH) => self.nodes.handle(change.handle)?,
                FileType::RegularFile => self.nodes.open(&node, OFlags::WRONLY)?.into(),
                _ => return Err(Errno::INVAL),
            };
            fs::ftruncate(&*file, change.size)?;
            if has(set::KILL_SUIDGID) {
                take_privileges(&file)?;
            }
        }
        if has(set::ATIME | set::MTIME) {
            let time = |(seconds, nanoseconds): (u64, u32), wanted, now| Timespec {
                tv_sec: seconds as i64,
                tv_nsec: match () {
                    () if !has(wanted) => UTIME_OMIT,
                    () if has(now) => UTIME_NOW,
                    () => nanoseconds.min(999_999_999).into(),
                },
            };
            let times = Timestamps {
                last_access: time(change.access, set::ATIME, set::ATIME_NOW),
                last_modification: time(change.modification, set::MTIME, set::MTIME_NOW),
            };
            fs::utimensat(&*node, "", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(attributes(&fs::fstat(&*node)?))
    }

    /// Reads straight into the guest's memory.
    fn read(&self, header: &Header, fields: &mut Fields<'_>, chain: &Chain) -> u32 {
        let result = (|| {
            let invalid = Errno::INVAL;
            let file = self.nodes.handle(fields.u64().ok_or(invalid)?)?;
            let (offset, size) = (fields.u64().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
            let room = chain.writable_len().checked_sub(OUT_HEADER).ok_or(invalid)?;
            let length = room.min(size.min(MAX_TRANSFER) as usize);
            file::read_at(&file, &chain.writable_slices(OUT_HEADER, length), offset).map_err(|e| errno(&e))
        })();
        match result {
            Ok(count) => {
                write_header(chain, header, OUT_HEADER + count, 0);
                (OUT_HEADER + count) as u32
            }
            Err(error) => reply_error(chain, header, error),
        }
    }

    /// Writes straight from the guest's memory.
    fn write(&self, fields: &mut Fields<'_>, chain: &Chain) -> Answer {
        if self.read_only {
            return Err(Errno::ROFS);
        }
        let invalid = Errno::INVAL;
        let file = self.nodes.handle(fields.u64().ok_or(invalid)?)?;
        let (offset, size) = (fields.u64().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
        let how = fields.u32().ok_or(invalid)?;
        let room = chain.readable_len().checked_sub(WRITE_HEADER).ok_or(invalid)?;
        let data = chain.readable_slices(WRITE_HEADER, room.min(size.min(MAX_TRANSFER) as usize));
        let count = file::write_at(&file, &data, offset).map_err(|e| errno(&e))?;
        if how & WRITE_KILL_SUIDGID != 0 {
            take_privileges(&file)?;
        }
        Ok(Reply::default().u32(count as u32).u32(0))
    }

    /// Reads names (READDIR), or names with what a LOOKUP of each would answer (READDIRPLUS).
    fn read_directory(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let invalid = Errno::INVAL;
        let plus = header.opcode == opcode::READDIRPLUS;
        let directory = if plus { Some(self.nodes.directory(header.node)?) } else { None };
        let before = if plus { ENTRY } else { 0 };
        let file = self.nodes.handle(fields.u64().ok_or(invalid)?)?;
        let (offset, size) = (fields.u64().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
        let size = (size as usize).min(MAX_ENTRIES);
        fs::seek(&*file, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&*file, &mut buffer);
        let mut reply = Reply::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if reply.0.len() + before + (24 + name.len()).next_multiple_of(8) > size {
                break;
            }
            if let Some(directory) = &directory {
                // Where there is no answer, the driver asks if it wants to know.
                let node = if self.nodes.plenty() { self.nodes.look_up(directory, name).ok() } else { None };
                reply = match node {
                    Some((number, stat)) => reply.node(number, VALID, &stat),
                    None => reply.zeros(ENTRY),
                };
            }
            // DT_* are the type bits of a mode, or 0.
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            reply = reply.entry(entry.ino(), entry.next_entry_cookie(), kind, name);
        }
        Ok(reply)
    }

    fn sync(&self, fields: &mut Fields<'_>) -> Answer {
        let file = self.nodes.handle(fields.u64().ok_or(Errno::INVAL)?)?;
        let only_data = fields.u32().ok_or(Errno::INVAL)? & 1 != 0;
        if only_data {
            fs::fdatasync(&*file)?
        } else {
            fs::fsync(&*file)?
        }
        Ok(Reply::default())
    }

    fn allocate(&self, fields: &mut Fields<'_>) -> Answer {
        let invalid = Errno::INVAL;
        let file = self.nodes.handle(fields.u64().ok_or(invalid)?)?;
        let (offset, length) = (fields.u64().ok_or(invalid)?, fields.u64().ok_or(invalid)?);
        let flags = FallocateFlags::from_bits(fields.u32().ok_or(invalid)?).ok_or(Errno::OPNOTSUPP)?;
        fs::fallocate(&*file, flags, offset, length)?;
        Ok(Reply::default())
    }

    fn seek(&self, fields: &mut Fields<'_>) -> Answer {
        /// lseek(2)
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let invalid = Errno::INVAL;
        let file = self.nodes.handle(fields.u64().ok_or(invalid)?)?;
        let offset = fields.u64().ok_or(invalid)?;
        let to = match fields.u32() {
            Some(SEEK_DATA) => SeekFrom::Data(offset),
            Some(SEEK_HOLE) => SeekFrom::Hole(offset),
            // All others the driver does by itself.
            _ => return Err(invalid),
        };
        Ok(Reply::default().u64(fs::seek(&*file, to)?))
    }

    /// Copies on the host, without a way through the guest.
    fn copy(&self, fields: &mut Fields<'_>) -> Answer {
        let mut number = || fields.u64().ok_or(Errno::INVAL);
        let (from, mut from_offset, _node) = (self.nodes.handle(number()?)?, number()?, number()?);
        let (to, mut to_offset) = (self.nodes.handle(number()?)?, number()?);
        let length = number()?.min(MAX_COPY) as usize;
        let count = fs::copy_file_range(&*from, Some(&mut from_offset), &*to, Some(&mut to_offset), length)?;
        Ok(Reply::default().u32(count as u32).u32(0))
    }

    fn extended_attributes(&self, header: &Header, fields: &mut Fields<'_>) -> Answer {
        let invalid = Errno::INVAL;
        let node = self.nodes.get(header.node)?;
        let mut number = || fields.u32().ok_or(invalid);
        match header.opcode {
            opcode::REMOVEXATTR => xattr::remove(&self.nodes, &node, fields.text().ok_or(invalid)?),
            opcode::LISTXATTR => xattr::list(&self.nodes, &node, number()? as usize),
            opcode::GETXATTR => {
                let (room, _) = (number()? as usize, number()?);
                xattr::get(&self.nodes, &node, fields.text().ok_or(invalid)?, room)
            }
            _ => {
                let (size, flags) = (number()? as usize, number()?);
                let name = fields.text().ok_or(invalid)?;
                xattr::set(&self.nodes, &node, name, fields.bytes(size).ok_or(invalid)?, flags)
            }
        }
    }
}

/// What SETATTR asks for.
struct Change {
    valid: u32,
    handle: u64,
    size: u64,
    /// Seconds and nanoseconds.
    access: (u64, u32),
    modification: (u64, u32),
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let valid = fields.u32()?;
        fields.u32()?;
        let (handle, size) = (fields.u64()?, fields.u64()?);
        fields.u64()?;
        let (access, modification) = (fields.u64()?, fields.u64()?);
        fields.u64()?;
        let (access, modification) = ((access, fields.u32()?), (modification, fields.u32()?));
        fields.u32()?;
        let mode = fields.u32()?;
        fields.u32()?;
        let (uid, gid) = (fields.u32()?, fields.u32()?);
        Some(Change { valid, handle, size, access, modification, mode, uid, gid })
    }
}

fn initialize(fields: &mut Fields<'_>) -> Answer {
    let invalid = Errno::INVAL;
    let (major, _minor) = (fields.u32().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
    let (read_ahead, offered) = (fields.u32().ok_or(invalid)?, fields.u32().ok_or(invalid)?);
    if major < MAJOR {
        return Err(Errno::PROTO);
    }
    let served = init::ASYNC_READ
        | init::ATOMIC_O_TRUNC
        | init::BIG_WRITES
        | init::AUTO_INVAL_DATA
        | init::DO_READDIRPLUS
        | init::READDIRPLUS_AUTO
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::HANDLE_KILLPRIV_V2
        | init::MAX_PAGES;
    // `struct fuse_init_out`: limits of background requests are the driver's own where we say 0; times are in nanoseconds.
    let reply = Reply::default().u32(MAJOR).u32(MINOR).u32(read_ahead).u32(offered & served).u16(0).u16(0);
    Ok(reply.u32(MAX_TRANSFER).u32(1).u16(MAX_PAGES).u16(0).zeros(32))
}

/// What the host's kernel does for others, but not for root: a file that is changed loses set-user-ID, and set-group-ID if
/// it is a program.
fn take_privileges(file: &File) -> Result<(), Errno> {
    let mode = fs::fstat(file)?.st_mode;
    let group = if mode & 0o010 == 0 { 0 } else { 0o2000 };
    let taken = mode & (0o4000 | group);
    if taken == 0 { Ok(()) } else { fs::fchmod(file, Mode::from_raw_mode(mode & !taken & 0o7777)) }
}

/// `struct fuse_attr_out`
fn attributes(stat: &Stat) -> Reply {
    Reply::default().u64(VALID).u32(0).u32(0).attributes(stat)
}

/// `struct fuse_open_out`
fn opened(handle: u64) -> Reply {
    Reply::default().u64(handle).u32(0).u32(0)
}

/// An owner. All ones is nobody's number: to chown(2) it means to leave the owner as it is.
fn user(number: u32) -> Result<Uid, Errno> {
    if number == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(number)) }
}

fn group(number: u32) -> Result<Gid, Errno> {
    if number == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(number)) }
}

fn errno(error: &std::io::Error) -> Errno {
    match error.kind() {
        _ if error.raw_os_error().is_some() => Errno::from_io_error(error).unwrap_or(Errno::IO),
        std::io::ErrorKind::InvalidInput => Errno::INVAL,
        _ => Errno::IO,
    }
}

fn write_header(chain: &Chain, header: &Header, length: usize, error: i32) {
    let bytes = Reply::default().u32(length as u32).u32(error as u32).u64(header.unique);
    chain.write_at(0, &bytes.0);
}

fn reply_with(chain: &Chain, header: &Header, body: &[u8]) -> u32 {
    if chain.writable_len() < OUT_HEADER + body.len() {
        return reply_error(chain, header, Errno::OVERFLOW);
    }
    write_header(chain, header, OUT_HEADER + body.len(), 0);
    chain.write_at(OUT_HEADER, body);
    (OUT_HEADER + body.len()) as u32
}

fn reply_error(chain: &Chain, header: &Header, error: Errno) -> u32 {
    if chain.writable_len() < OUT_HEADER {
        return 0;
    }
    write_header(chain, header, OUT_HEADER, -error.raw_os_error());
    OUT_HEADER as u32
}
