//! The probe on whatever /dev/kvm this host has.

use std::time::{Duration, Instant};

use kvm::{Config, Error, Kvm};
use memory::Ram;

#[test]
fn the_probe_ends_in_time_and_leaves_ram_empty() {
    let ram = Ram::new(16 << 20).unwrap();
    let kvm = match Kvm::new(ram.clone(), Config { cpus: Default::default(), model: Default::default() }) {
        Ok(kvm) => kvm,
        Err(error @ (Error::Absent | Error::Denied { .. })) => return eprintln!("nothing to probe: {error}"),
        Err(error) => panic!("{error}"),
    };
    let begin = Instant::now();
    let verdict = kvm.probe().unwrap();
    let took = begin.elapsed();
    println!("{verdict:?} after {took:?}");
    // On a host that has any time for it 50 ms at most; this is for those that have none.
    assert!(took < Duration::from_secs(20), "{took:?}");
    let mut first = [0; 0x1_0000];
    memory::vm_memory::Bytes::read_slice(ram.view(), &mut first, memory::vm_memory::GuestAddress(0)).unwrap();
    assert!(first.iter().all(|byte| *byte == 0));
}
