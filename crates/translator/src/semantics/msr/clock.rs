//! The guest's time-stamp counter, and KVM's clock structures in guest memory (Linux `Documentation/virt/kvm/x86/msr.rst`).

use memory::PAGE_SIZE;

use crate::Vcpu;

/// The clock MSR's address bits; bit 0 turns the clock on.
const ENABLE: u64 = 1;

impl Vcpu {
    /// What RDTSC reads.
    pub fn guest_tsc(&self) -> u64 {
        self.machine.time.tsc().wrapping_add(self.msrs.tsc_adjust)
    }

    /// IA32_TSC_ADJUST moves this vCPU's counter and all that was computed from it.
    pub(super) fn set_tsc_adjust(&mut self, value: u64) {
        self.msrs.tsc_adjust = value;
        self.tsc_adjusted();
        self.write_kvm_clock();
    }

    pub(super) fn set_kvm_clock(&mut self, value: u64) {
        self.msrs.kvm_system_time = value;
        self.write_kvm_clock();
    }

    /// Fills this vCPU's clock structure, if the guest has named one. To be called again when the machine's counter was
    /// set ([`crate::time::Time::set_tsc`]).
    pub fn write_kvm_clock(&mut self) {
        self.fill_kvm_clock(false);
    }

    /// Tells the guest that its clock went on while the host did not run it, so that its watchdogs don't take that for a
    /// hang. The guest clears the flag.
    pub(crate) fn tell_pause(&mut self) {
        self.fill_kvm_clock(true);
    }

    fn fill_kvm_clock(&mut self, paused: bool) {
        let msr = self.msrs.kvm_system_time;
        if msr & ENABLE == 0 {
            return;
        }
        let contents = self.machine.time.kvm_clock(self.msrs.tsc_adjust).encode(paused);
        self.write_versioned(msr & !ENABLE, &contents);
    }

    /// The wall clock at the moment when the KVM clock read 0: seconds and nanoseconds. Written once for each write of the MSR.
    pub(super) fn write_kvm_wall_clock(&mut self, gpa: u64) {
        self.msrs.kvm_wall_clock = gpa;
        let wall = self.machine.time.boot_wall_ns();
        let mut contents = [0; 8];
        contents[..4].copy_from_slice(&((wall / 1_000_000_000) as u32).to_le_bytes());
        contents[4..].copy_from_slice(&((wall % 1_000_000_000) as u32).to_le_bytes());
        self.write_versioned(gpa, &contents);
    }

    /// Writes a version and `contents` behind it so that a reader on another vCPU can tell a torn reading: odd while it changes.
    fn write_versioned(&mut self, gpa: u64, contents: &[u8]) {
        let mut version = [0; 4];
        self.ram_read(gpa, &mut version);
        let odd = u32::from_le_bytes(version) | 1;
        self.ram_write(gpa, &odd.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.ram_write(gpa.wrapping_add(4), contents);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.ram_write(gpa, &odd.wrapping_add(1).to_le_bytes());
    }

    /// Reads RAM across pages; what is not RAM is left as it is.
    fn ram_read(&self, gpa: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = gpa.wrapping_add(i as u64);
            if self.ram(at).is_some() {
                self.phys_read(at, std::slice::from_mut(byte));
            }
        }
    }

    /// Writes RAM across pages; what is not RAM is skipped: a clock is no device's register.
    fn ram_write(&mut self, gpa: u64, data: &[u8]) {
        let mut rest = data;
        let mut at = gpa;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min((PAGE_SIZE - at % PAGE_SIZE) as usize));
            if self.ram(at).is_some() {
                self.phys_write(at, part);
            }
            at = at.wrapping_add(part.len() as u64);
            rest = after;
        }
    }
}
