//! `--boot order=`: which devices firmware tries, and in which order.

/// A kind of device that can be booted from, by the letter that people know from QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// a: floppy drives.
    Floppy,
    /// c: disks.
    Disk,
    /// d: CD-ROM drives.
    CdRom,
    /// n: network cards.
    Network,
}

const LETTERS: [(char, Kind); 4] = [('c', Kind::Disk), ('a', Kind::Floppy), ('d', Kind::CdRom), ('n', Kind::Network)];

/// The kinds in the order in which they are tried; those that are not named come last, in the usual order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootOrder(Vec<Kind>);

/// Parses `order=LETTERS`.
pub fn parse(text: &str) -> Result<BootOrder, String> {
    let wrong =
        || "allowed is order=LETTERS, of a (floppy), c (disk), d (CD-ROM) and n (network), each once".to_owned();
    let letters = text.strip_prefix("order=").filter(|letters| !letters.is_empty()).ok_or_else(wrong)?;
    let mut order = Vec::new();
    for letter in letters.chars() {
        let kind = LETTERS.iter().find(|(known, _)| *known == letter).map(|(_, kind)| *kind);
        order.push(kind.filter(|kind| !order.contains(kind)).ok_or_else(wrong)?);
    }
    Ok(BootOrder(order))
}

impl BootOrder {
    /// Puts devices, which are given by kind and path, into their order. Of one kind, the first of the machine is first.
    pub fn sort(&self, devices: Vec<(Kind, String)>) -> Vec<String> {
        let usual = LETTERS.iter().map(|(_, kind)| *kind);
        let rest = usual.filter(|kind| !self.0.contains(kind));
        let order: Vec<Kind> = self.0.iter().copied().chain(rest).collect();
        let of = |wanted: &Kind| {
            let wanted = *wanted;
            devices.iter().filter(move |(kind, _)| *kind == wanted).map(|(_, path)| path.clone())
        };
        order.iter().flat_map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_comes_first() {
        let devices = || {
            let devices = [(Kind::Disk, "c1"), (Kind::Disk, "c2"), (Kind::CdRom, "d"), (Kind::Network, "n")];
            devices.map(|(kind, path)| (kind, path.to_owned())).to_vec()
        };
        assert_eq!(BootOrder::default().sort(devices()), ["c1", "c2", "d", "n"]);
        assert_eq!(parse("order=nd").unwrap().sort(devices()), ["n", "d", "c1", "c2"]);
        for text in ["order=", "cdn", "order=x", "order=cc"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
