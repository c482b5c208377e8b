//! Any bytes as a disk image, or an image that is right with any bytes changed.
#![no_main]

#[path = "../../crates/block/tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use block::{Disk, Format, Options, image};
use memory::vm_memory::VolatileSlice;

struct Bench {
    directory: PathBuf,
    sample: Vec<u8>,
}

static BENCH: LazyLock<Bench> = LazyLock::new(|| {
    // Panics of the image library are errors to us (`Qcow2::contain`); those of ours are not.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|place| place.file().contains("/imago-")) {
            report(panic);
        }
    }));
    let directory = tempfile::tempdir().expect("a temporary directory").keep();
    let path = directory.join("sample");
    image::create(&path, Format::Qcow2, Some(4 << 20), None).expect("an image");
    let disk = Disk::open(&Options::new(&path)).expect("a disk");
    let mut data = vec![0x5a; 4096];
    (0..4).for_each(|n| disk.write(&[VolatileSlice::from(data.as_mut_slice())], n << 20).expect("a write"));
    drop(disk);
    let sample = fs::read(&path).expect("an image");
    Bench { directory, sample }
});

/// Changes of an image: cluster, offset in it (most of what matters is at its start), how many bytes, the bytes.
fn change(image: &mut Vec<u8>, mut changes: &[u8]) {
    while let Some(([cluster, high, low, count], rest)) = changes.split_first_chunk() {
        let (bytes, rest) = rest.split_at(usize::from(count & 7).min(rest.len()));
        let within = usize::from(u16::from_be_bytes([*high, *low]));
        let within = if count & 0x80 == 0 { within & 0x7f } else { within };
        let at = (usize::from(*cluster) << 16 | within) % image.len();
        image.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        if count & 0x7f == 0x7f {
            image.truncate(at.max(1));
        }
        changes = rest;
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let bench = &*BENCH;
    match data.split_first() {
        Some((0, data)) => support::image_file(&bench.directory, data),
        Some((_, changes)) => {
            let mut image = bench.sample.clone();
            change(&mut image, changes);
            support::image_file(&bench.directory, &image);
        }
        None => {}
    }
});
