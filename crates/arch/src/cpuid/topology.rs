//! How the processors of a machine are spread over packages: what CPUID and the firmware's tables say of them.

/// `sockets` packages of `cores` cores with `threads` threads each. A processor's APIC id is its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// `None` where there is no processor, or numbers would not do as APIC ids: from these the processors themselves
    /// find out who shares what, by cutting off low bits (Intel SDM 3A 9.9.3), so that what is followed by more of its
    /// kind has to be a power of two.
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Option<Self> {
        let package = cores.checked_mul(threads)?;
        let all = package.checked_mul(sockets)?;
        let fits = (all == package || package.is_power_of_two()) && (package == threads || threads.is_power_of_two());
        (all > 0 && fits).then_some(Topology { sockets, cores, threads })
    }

    /// One package of `cores` cores, at least one.
    pub fn of_cores(cores: u32) -> Self {
        Topology { sockets: 1, cores: cores.max(1), threads: 1 }
    }

    /// How many processors there are.
    pub fn count(self) -> u32 {
        self.sockets * self.package()
    }

    pub fn sockets(self) -> u32 {
        self.sockets
    }

    /// In each package.
    pub fn cores(self) -> u32 {
        self.cores
    }

    /// In each core.
    pub fn threads(self) -> u32 {
        self.threads
    }

    /// How many processors a package has.
    pub fn package(self) -> u32 {
        self.cores * self.threads
    }

    /// APIC ids that a core takes.
    pub(super) fn core_ids(self) -> u32 {
        id_space(self.threads)
    }

    /// APIC ids that a package takes.
    pub(super) fn package_ids(self) -> u32 {
        id_space(self.package())
    }
}

impl Default for Topology {
    fn default() -> Self {
        Topology::of_cores(1)
    }
}

/// The next power of two.
fn id_space(members: u32) -> u32 {
    members.checked_next_power_of_two().unwrap_or(1 << 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_by_more_of_its_kind_is_a_power_of_two() {
        for (sockets, cores, threads) in [(1, 3, 1), (3, 1, 1), (2, 2, 1), (2, 1, 2), (1, 3, 2), (1, 1, 3), (3, 4, 2)] {
            let topology = Topology::new(sockets, cores, threads).unwrap();
            assert_eq!(topology.count(), sockets * cores * threads);
        }
        for (sockets, cores, threads) in [(2, 3, 1), (1, 2, 3), (2, 1, 3), (0, 1, 1), (1, 0, 1), (1, 1, 0)] {
            assert_eq!(Topology::new(sockets, cores, threads), None, "{sockets} {cores} {threads}");
        }
        assert_eq!(Topology::new(1 << 16, 1 << 16, 1), None);
    }

    #[test]
    fn ids_of_a_package_are_a_power_of_two() {
        assert_eq!([1, 2, 3, 5, 256].map(id_space), [1, 2, 4, 8, 256]);
        assert_eq!(id_space(u32::MAX), 1 << 31);
    }
}
