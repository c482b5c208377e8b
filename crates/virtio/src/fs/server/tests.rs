//! What a hostile driver can ask for, and must not get.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::fs::nodes::ROOT;

struct Share {
    server: Server,
    directory: tempfile::TempDir,
}

impl Share {
    fn new(read_only: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("shared")).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        let nodes = Nodes::new(&directory.path().join("shared"), 100).unwrap();
        Share { server: Server::new(nodes, read_only), directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("shared").join(name)
    }

    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let owner = rustix::process::geteuid().as_raw();
        let header = Header { opcode, unique: 1, node, uid: owner, gid: rustix::process::getegid().as_raw() };
        self.server.dispatch(&header, &mut Fields::new(body))
    }

    fn look_up(&self, node: u64, name: &str) -> Result<u64, Errno> {
        self.ask(opcode::LOOKUP, node, &text(name)).map(|reply| Fields::new(&reply.0).u64().unwrap())
    }
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

/// A body of numbers, each of 32 bits, and a name.
fn body(numbers: &[u32], name: &str) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).chain(text(name)).collect()
}

#[test]
fn no_name_leads_out_of_the_directory() {
    let share = Share::new(false);
    symlink(share.directory.path(), share.path("up")).unwrap();
    symlink("../secret", share.path("link")).unwrap();
    std::fs::create_dir(share.path("inner")).unwrap();
    let inner = share.look_up(ROOT, "inner").unwrap();
    for name in ["..", ".", "", "../secret", "inner/../../secret", "/etc/passwd", "up/secret"] {
        for node in [ROOT, inner] {
            assert_eq!(share.look_up(node, name), Err(Errno::INVAL), "{name}");
            let refused = |opcode, body: Vec<u8>| {
                assert_eq!(share.ask(opcode, node, &body).unwrap_err(), Errno::INVAL, "{opcode} {name}");
            };
            refused(opcode::CREATE, body(&[1, 0o644, 0, 0], name));
            refused(opcode::MKDIR, body(&[0o755, 0], name));
            refused(opcode::MKNOD, body(&[0o100644, 0, 0, 0], name));
            refused(opcode::UNLINK, text(name));
            refused(opcode::RMDIR, text(name));
            refused(opcode::SYMLINK, [text(name), text("x")].concat());
            refused(opcode::RENAME, [&body(&[1, 0], "link")[..], &text(name)].concat());
            refused(opcode::RENAME, [&body(&[1, 0], name)[..], &text("new")].concat());
            refused(opcode::LINK, body(&[inner as u32, 0], name));
        }
    }
    // Links are nodes of their own: neither walked through nor opened.
    let link = share.look_up(ROOT, "link").unwrap();
    let up = share.look_up(ROOT, "up").unwrap();
    assert_eq!(share.look_up(up, "secret"), Err(Errno::NOTDIR));
    assert_eq!(share.ask(opcode::OPEN, link, &body(&[0, 0], "")).unwrap_err(), Errno::NXIO);
    assert_eq!(share.ask(opcode::OPENDIR, up, &body(&[0, 0], "")).unwrap_err(), Errno::NOTDIR);
    assert_eq!(share.ask(opcode::READLINK, link, b"").unwrap().0, b"../secret");
    // What is created where a link is does not go through it.
    let create = share.ask(opcode::CREATE, ROOT, &body(&[0o1001, 0o644, 0, 0], "link"));
    assert_eq!(create.unwrap_err(), Errno::NXIO);
    let mut truncate = [set::SIZE, 0, 0, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    truncate.resize(88, 0);
    assert_eq!(share.ask(opcode::SETATTR, link, &truncate).unwrap_err(), Errno::INVAL);
    assert_eq!(std::fs::read(share.directory.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn files_are_made_without_set_user_id_and_devices_not_at_all() {
    let share = Share::new(false);
    share.ask(opcode::CREATE, ROOT, &body(&[1, 0o106755, 0, 0], "program")).unwrap();
    share.ask(opcode::MKDIR, ROOT, &body(&[0o2777, 0], "directory")).unwrap();
    share.ask(opcode::MKNOD, ROOT, &body(&[0o010644, 0, 0, 0], "pipe")).unwrap();
    for kind in [0o020000, 0o060000, 0o040000] {
        assert_eq!(share.ask(opcode::MKNOD, ROOT, &body(&[kind | 0o666, 0x103, 0, 0], "x")).unwrap_err(), Errno::PERM);
    }
    let mode = |name: &str| std::fs::metadata(share.path(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("program"), mode("directory"), mode("pipe")), (0o755, 0o777, 0o644));
    let node = share.look_up(ROOT, "program").unwrap();
    let mut change: Vec<u8> = set::MODE.to_le_bytes().to_vec();
    change.resize(88, 0);
    change[68..72].copy_from_slice(&0o104711u32.to_le_bytes());
    share.ask(opcode::SETATTR, node, &change).unwrap();
    assert_eq!(mode("program"), 0o711);
    // To open a pipe would wait for its other end.
    let pipe = share.look_up(ROOT, "pipe").unwrap();
    assert_eq!(share.ask(opcode::OPEN, pipe, &body(&[0, 0], "")).unwrap_err(), Errno::NXIO);
    assert_eq!(std::fs::metadata(share.path("program")).unwrap().uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn a_read_only_share_can_not_be_changed() {
    let share = Share::new(true);
    std::fs::write(share.path("file"), "data").unwrap();
    let node = share.look_up(ROOT, "file").unwrap();
    let names = [text("file"), text("new")].concat();
    let any = [opcode::SYMLINK, opcode::MKNOD, opcode::MKDIR, opcode::UNLINK, opcode::RMDIR, opcode::RENAME];
    for opcode in any.into_iter().chain([opcode::RENAME2, opcode::LINK, opcode::CREATE, opcode::SETATTR]).chain([
        opcode::SETXATTR,
        opcode::REMOVEXATTR,
        opcode::COPY_FILE_RANGE,
    ]) {
        assert_eq!(share.ask(opcode, ROOT, &names).unwrap_err(), Errno::ROFS, "{opcode}");
    }
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::TRUNC] {
        assert_eq!(share.ask(opcode::OPEN, node, &body(&[flags.bits(), 0], "")).unwrap_err(), Errno::ROFS);
    }
    share.ask(opcode::OPEN, node, &body(&[0, 0], "")).unwrap();
}

#[test]
fn descriptors_come_to_an_end_and_back_when_forgotten() {
    let share = Share::new(false);
    let mut nodes = Vec::new();
    for number in 0.. {
        std::fs::write(share.path(&number.to_string()), "").unwrap();
        match share.look_up(ROOT, &number.to_string()) {
            Ok(node) => nodes.push(node),
            Err(error) => {
                assert_eq!(error, Errno::NFILE);
                break;
            }
        }
    }
    // One is the shared directory's own.
    assert_eq!(nodes.len(), 99);
    assert_eq!(share.ask(opcode::OPEN, nodes[0], &body(&[0, 0], "")).unwrap_err(), Errno::NFILE);
    share.server.nodes.forget(nodes[1], 1);
    share.server.nodes.forget(ROOT, u64::MAX);
    share.ask(opcode::OPEN, nodes[0], &body(&[0, 0], "")).unwrap();
    assert_eq!(share.ask(opcode::GETATTR, nodes[1], b"").unwrap_err(), Errno::STALE);
    share.look_up(ROOT, "0").unwrap();
}

#[test]
fn directories_are_read_in_pieces() {
    let share = Share::new(false);
    for number in 0..300 {
        std::fs::write(share.path(&format!("file-with-a-name-{number}")), "").unwrap();
    }
    let opened = share.ask(opcode::OPENDIR, ROOT, &body(&[0, 0], "")).unwrap();
    let handle = Fields::new(&opened.0).u64().unwrap();
    let (mut names, mut offset) = (Vec::new(), 0u64);
    loop {
        let request: Vec<u8> =
            handle.to_le_bytes().into_iter().chain(offset.to_le_bytes()).chain(1000u32.to_le_bytes()).collect();
        let reply = share.ask(opcode::READDIR, ROOT, &request).unwrap().0;
        assert!(reply.len() <= 1000);
        if reply.is_empty() {
            break;
        }
        let mut rest = &reply[..];
        while !rest.is_empty() {
            let mut fields = Fields::new(rest);
            fields.u64().unwrap();
            offset = fields.u64().unwrap();
            let length = fields.u32().unwrap() as usize;
            names.push(String::from_utf8(rest[24..24 + length].to_vec()).unwrap());
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 302);
}

/// Numbers of 64 bits as a body.
fn wide(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

#[test]
fn a_directory_is_read_with_what_its_files_are() {
    let share = Share::new(false);
    std::fs::write(share.path("file"), "12345").unwrap();
    std::fs::create_dir(share.path("directory")).unwrap();
    let opened = share.ask(opcode::OPENDIR, ROOT, &body(&[0, 0], "")).unwrap();
    let handle = Fields::new(&opened.0).u64().unwrap();
    let reply = share.ask(opcode::READDIRPLUS, ROOT, &wide(&[handle, 0, 4096])).unwrap().0;
    let mut found = Vec::new();
    let mut rest = &reply[..];
    while !rest.is_empty() {
        let (entry, tail) = rest.split_at(ENTRY);
        let length = u32::from_le_bytes(tail[16..20].try_into().unwrap()) as usize;
        let number = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        found.push((String::from_utf8(tail[24..24 + length].to_vec()).unwrap(), number(0), number(48)));
        rest = &tail[(24 + length).next_multiple_of(8)..];
    }
    found.sort();
    let names: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, [".", "..", "directory", "file"]);
    assert_eq!((found[0].1, found[1].1), (0, 0), "the driver knows them");
    assert_eq!(found[3].2, 5, "the size");
    assert_eq!(share.look_up(ROOT, "file").unwrap(), found[3].1);
    // Told twice, so forgotten twice.
    share.server.nodes.forget(found[3].1, 1);
    assert!(share.ask(opcode::GETATTR, found[3].1, b"").is_ok());
    share.server.nodes.forget(found[3].1, 1);
    assert_eq!(share.ask(opcode::GETATTR, found[3].1, b"").unwrap_err(), Errno::STALE);
}

#[test]
fn attributes_of_users_are_kept_and_those_of_the_host_are_not_the_guests() {
    let share = Share::new(false);
    std::fs::write(share.path("file"), "").unwrap();
    let file = share.look_up(ROOT, "file").unwrap();
    let set = |name: &str, value: &[u8], flags: u32| {
        share.ask(opcode::SETXATTR, file, &[&body(&[value.len() as u32, flags], name)[..], value].concat())
    };
    let get = |name: &str, room: u32| share.ask(opcode::GETXATTR, file, &body(&[room, 0], name)).map(|reply| reply.0);
    let host = |name: &str| {
        let mut value = [0; 16];
        let length = fs::getxattr(share.path("file"), name, &mut value).unwrap();
        value[..length].to_vec()
    };
    for name in ["security.capability", "trusted.overlay.opaque", "system.posix_acl_access", "user", ""] {
        assert_eq!(set(name, b"value", 0).unwrap_err(), Errno::OPNOTSUPP, "{name}");
        assert_eq!(share.ask(opcode::REMOVEXATTR, file, &text(name)).unwrap_err(), Errno::OPNOTSUPP, "{name}");
    }
    assert_eq!(get("security.capability", 100).unwrap_err(), Errno::NODATA);
    assert_eq!(get("system.posix_acl_access", 100).unwrap_err(), Errno::OPNOTSUPP);
    let flags = fs::XattrFlags::empty();
    if fs::setxattr(share.path("file"), "user.host", b"12", flags) == Err(Errno::OPNOTSUPP) {
        // A file system without any.
        assert_eq!(set("user.a", b"value", 0).unwrap_err(), Errno::OPNOTSUPP);
        return;
    }
    set("user.a", b"value", 0).unwrap();
    assert_eq!(host("user.a"), b"value");
    assert_eq!(set("user.a", b"again", 1).unwrap_err(), Errno::EXIST, "XATTR_CREATE");
    assert_eq!(set("user.b", b"again", 2).unwrap_err(), Errno::NODATA, "XATTR_REPLACE");
    assert_eq!(get("user.host", 100).unwrap(), b"12");
    assert_eq!(get("user.a", 0).unwrap(), Reply::default().u32(5).u32(0).0);
    assert_eq!(get("user.a", 4).unwrap_err(), Errno::RANGE);
    let list = share.ask(opcode::LISTXATTR, file, &body(&[100, 0], "")).unwrap().0;
    let mut names: Vec<_> = list.split(|byte| *byte == 0).collect();
    names.sort();
    assert_eq!(names, [&b""[..], b"user.a", b"user.host"]);
    assert_eq!(share.ask(opcode::LISTXATTR, file, &body(&[0, 0], "")).unwrap().0, Reply::default().u32(17).u32(0).0);
    share.ask(opcode::REMOVEXATTR, file, &text("user.a")).unwrap();
    assert_eq!(get("user.a", 100).unwrap_err(), Errno::NODATA);
}

#[test]
fn files_are_copied_on_the_host_and_synced() {
    let share = Share::new(false);
    std::fs::write(share.path("from"), "0123456789").unwrap();
    std::fs::write(share.path("to"), "abcdefghij").unwrap();
    let open = |name: &str, flags: u32| {
        let opened = share.ask(opcode::OPEN, share.look_up(ROOT, name).unwrap(), &body(&[flags, 0], "")).unwrap();
        Fields::new(&opened.0).u64().unwrap()
    };
    let (from, to) = (open("from", 0), open("to", OFlags::WRONLY.bits()));
    let copied = share.ask(opcode::COPY_FILE_RANGE, ROOT, &wide(&[from, 2, 0, to, 5, 3, 0])).unwrap();
    assert_eq!(copied.0, Reply::default().u32(3).u32(0).0);
    assert_eq!(std::fs::read(share.path("to")).unwrap(), b"abcde234ij");
    assert_eq!(share.ask(opcode::COPY_FILE_RANGE, ROOT, &wide(&[to, 0, 0, from, 0, 3, 0])).unwrap_err(), Errno::BADF);
    share.ask(opcode::SYNCFS, ROOT, &wide(&[0])).unwrap();
}

#[test]
fn a_program_of_the_host_loses_its_privileges_when_it_is_changed() {
    let share = Share::new(false);
    let program = |mode: u32| {
        std::fs::write(share.path("program"), "program").unwrap();
        std::fs::set_permissions(share.path("program"), std::fs::Permissions::from_mode(mode)).unwrap();
        share.look_up(ROOT, "program").unwrap()
    };
    let mode = || std::fs::metadata(share.path("program")).unwrap().permissions().mode() & 0o7777;
    let flags = (OFlags::WRONLY | OFlags::TRUNC).bits();
    share.ask(opcode::OPEN, program(0o6755), &body(&[flags, OPEN_KILL_SUIDGID], "")).unwrap();
    assert_eq!(mode(), 0o755);
    let mut change = [0; 22];
    (change[0], change[4]) = (set::SIZE | set::KILL_SUIDGID, 3);
    share.ask(opcode::SETATTR, program(0o6745), &body(&change, "")).unwrap();
    // Set-group-ID without execution by the group means mandatory locking.
    assert_eq!(mode(), 0o2745);
    share.ask(opcode::CREATE, ROOT, &body(&[flags, 0o644, 0, OPEN_KILL_SUIDGID], "program")).unwrap();
    program(0o4755);
    share.ask(opcode::CREATE, ROOT, &body(&[flags, 0o644, 0, OPEN_KILL_SUIDGID], "program")).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn any_bytes_are_answered() {
    let share = Share::new(false);
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..50_000 {
        let length = next() as usize % 100;
        let bytes: Vec<u8> =
            (0..length).map(|_| if next() % 3 == 0 { next() as u8 } else { (next() % 3) as u8 }).collect();
        // Not SYNCFS, which takes its time.
        _ = share.ask((next() % 50) as u32, next() % 5, &bytes);
    }
    assert!(Path::new(&share.directory.path().join("secret")).exists());
    let outside = std::fs::read_dir(share.directory.path()).unwrap().count();
    assert_eq!(outside, 2);
}

#[test]
fn no_file_is_given_to_an_owner_that_can_not_be() {
    let share = Share::new(false);
    std::fs::write(share.path("file"), "").unwrap();
    let file = share.look_up(ROOT, "file").unwrap();
    for valid in [set::UID, set::GID] {
        let mut change = [0; 22];
        (change[0], change[19], change[20]) = (valid, u32::MAX, u32::MAX);
        assert_eq!(share.ask(opcode::SETATTR, file, &body(&change, "")).unwrap_err(), Errno::INVAL);
    }
}
