//! The paravirtual devices besides disks and network, as the command line asks for them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::stdio::stdout;
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use virtio::VirtioDevice;
use virtio::balloon::Balloon;
use virtio::console::Console;
use virtio::entropy::Entropy;
use virtio::fs::{FileSystem, MAX_TAG, ShareError};
use virtio::vsock::{GUEST_CIDS, Vsock};

use crate::cleanup::{self, Guard};
use crate::disk::split_path;

/// A directory of the host for the guest.
#[derive(Clone, Debug)]
pub struct ShareArg {
    path: PathBuf,
    /// The name by which the guest mounts it.
    tag: String,
    read_only: bool,
}

/// Parses `DIRECTORY[,tag=NAME][,ro]`.
pub fn parse_share(text: &str) -> Result<ShareArg, String> {
    let (path, settings) = split_path(text);
    if path.is_empty() {
        return Err("the path of a directory is missing".into());
    }
    let mut share = ShareArg { path: path.into(), tag: "share".into(), read_only: false };
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match setting.split_once('=').unwrap_or((setting, "")) {
            ("ro", "") => share.read_only = true,
            ("tag", tag) if (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_graphic()) => {
                share.tag = tag.into();
            }
            ("tag", _) => return Err(format!("a tag has 1 to {MAX_TAG} ASCII characters, and no space")),
            _ => return Err(format!("\"{setting}\" is not known: allowed after the path are tag=NAME and ro")),
        }
    }
    Ok(share)
}

/// Where the guest's sockets lead.
#[derive(Clone, Debug)]
pub struct VsockArg {
    pub path: PathBuf,
    cid: u64,
}

/// Parses `PATH[,cid=N]`.
pub fn parse_vsock(text: &str) -> Result<VsockArg, String> {
    let (path, settings) = split_path(text);
    if path.is_empty() {
        return Err("the path of a Unix socket is missing".into());
    }
    let mut vsock = VsockArg { path: path.into(), cid: GUEST_CIDS.start };
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        let cid = setting.strip_prefix("cid=").ok_or_else(|| format!("\"{setting}\" is not known: there is cid=N"))?;
        vsock.cid = cid.parse().ok().filter(|cid| GUEST_CIDS.contains(cid)).ok_or("a cid is a number from 3 on")?;
    }
    Ok(vsock)
}

/// Makes the socket device. Its socket is removed when the process ends, and when the guard goes.
pub fn vsock(arg: &VsockArg) -> io::Result<(Arc<dyn VirtioDevice>, Guard)> {
    let device = Vsock::new(&arg.path, arg.cid)?;
    let path = arg.path.clone();
    Ok((Arc::new(device), cleanup::register(move || _ = fs::remove_file(path))))
}

/// A tag that more than one directory has.
pub fn tag_of_two(shares: &[ShareArg]) -> Option<&str> {
    let mut tags = HashSet::new();
    shares.iter().map(|share| share.tag.as_str()).find(|tag| !tags.insert(*tag))
}

/// Makes a device of each directory.
pub fn shares(shares: &[ShareArg]) -> Result<Vec<Arc<dyn VirtioDevice>>, ShareError> {
    let device = |share: &ShareArg| {
        let device = FileSystem::new(&share.path, &share.tag, share.read_only)?;
        Ok(Arc::new(device) as Arc<dyn VirtioDevice>)
    };
    shares.iter().map(device).collect()
}

/// What every machine has: random numbers, and a balloon that is asked to hold `bytes`, which is also returned by itself.
pub fn common(bytes: u64) -> ([Arc<dyn VirtioDevice>; 2], Arc<Balloon>) {
    let balloon = Arc::new(Balloon::new());
    balloon.set_target(bytes);
    ([Arc::new(Entropy::new()), balloon.clone()], balloon)
}

/// Tells the guest how large the terminal on stdout is, now and whenever that changes. Without one, nothing happens.
pub fn follow_terminal_size(console: &Arc<Console>) -> io::Result<()> {
    let tell = |console: &Console| {
        if let Ok(size) = tcgetwinsize(stdout()) {
            console.resize(size.ws_col, size.ws_row);
        }
    };
    tell(console);
    let mut changes = Signals::new([SIGWINCH])?;
    let console = Arc::downgrade(console);
    wake::thread("terminal-size").spawn(move || {
        for _ in changes.forever() {
            let Some(console) = console.upgrade() else { return };
            tell(&console);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_directory_with_a_tag() {
        let share = parse_share("/home/a,,b,tag=home,ro").unwrap();
        assert_eq!((share.path.to_str(), share.tag.as_str(), share.read_only), (Some("/home/a,b"), "home", true));
        assert_eq!(parse_share(".").unwrap().tag, "share");
        let shares = |texts: &[&str]| texts.iter().map(|text| parse_share(text).unwrap()).collect::<Vec<_>>();
        assert_eq!(tag_of_two(&shares(&["a", "b,tag=b", "c"])), Some("share"));
        assert_eq!(tag_of_two(&shares(&["a", "b,tag=b"])), None);
        for text in ["", ",ro", "x,rw", "x,tag=", "x,tag=a b", "x,tag=1234567890123456789012345678901234567"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_vsock_is_a_path_with_a_context_identifier() {
        let vsock = parse_vsock("/run/v,cid=42").unwrap();
        assert_eq!((vsock.path.to_str(), vsock.cid), (Some("/run/v"), 42));
        assert_eq!(parse_vsock("v").unwrap().cid, 3);
        for text in ["", ",cid=3", "v,cid=2", "v,cid=4294967295", "v,cid=x", "v,port=1"] {
            assert!(parse_vsock(text).is_err(), "{text}");
        }
    }
}
