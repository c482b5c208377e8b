//! Which of a file system's kernels is booted.
//!
//! The link that the distribution keeps for this (`/vmlinuz` in Debian, `/boot/vmlinuz` elsewhere) decides; without
//! one it is the newest version.

use std::cmp::Ordering;

use crate::volume::Volume;

/// In the root of a system, and in a partition that is mounted on `/boot`.
const DIRECTORIES: [&str; 2] = ["/boot", "/"];
const LINKS: [&str; 2] = ["/vmlinuz", "/boot/vmlinuz"];
/// What the initial RAM disk of a kernel VERSION is called in Debian and Arch, SUSE, and Fedora.
const INITRDS: [(&str, &str); 3] = [("initrd.img-", ""), ("initrd-", ""), ("initramfs-", ".img")];

/// Paths of what is to be booted.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    pub path: String,
    pub initrd: Option<String>,
}

pub fn choose(volume: &Volume) -> Option<Kernel> {
    let linked = LINKS.iter().find_map(|link| volume.resolve(link));
    let path = linked.or_else(|| DIRECTORIES.iter().find_map(|directory| newest(volume, directory)))?;
    let (directory, name) = path.rsplit_once('/')?;
    let initrd = match name.strip_prefix("vmlinuz-") {
        Some(version) => {
            INITRDS.iter().find_map(|(before, after)| volume.resolve(&format!("{directory}/{before}{version}{after}")))
        }
        None => ["initrd.img", "initrd"].iter().find_map(|name| volume.resolve(&format!("{directory}/{name}"))),
    };
    Some(Kernel { path, initrd })
}

fn newest(volume: &Volume, directory: &str) -> Option<String> {
    let names = volume.names(directory);
    let mut kernels: Vec<_> = names.iter().filter(|n| n.starts_with("vmlinuz-") && !n.contains("rescue")).collect();
    kernels.sort_by(|a, b| compare_versions(b, a));
    kernels.iter().find_map(|name| volume.resolve(&format!("{}/{name}", directory.trim_end_matches('/'))))
}

/// Orders as people do: digits by their value, all else by its bytes.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() && !b.is_empty() {
        let (left, right) = (split(&mut a), split(&mut b));
        let order = match (left.parse::<u64>(), right.parse::<u64>()) {
            (Ok(left), Ok(right)) => left.cmp(&right),
            _ => left.cmp(right),
        };
        if order.is_ne() {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

/// Takes the leading run of digits or of other characters.
fn split<'a>(text: &mut &'a str) -> &'a str {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
    let (run, rest) = text.split_at(end);
    *text = rest;
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        let mut names = vec!["vmlinuz-6.1.0-9-amd64", "vmlinuz-6.10.0-1", "vmlinuz-6.1.0-13-amd64", "vmlinuz-5.19"];
        names.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(names, ["vmlinuz-5.19", "vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-13-amd64", "vmlinuz-6.10.0-1"]);
    }
}
