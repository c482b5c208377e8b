//! What a hostile image file may hold: a fuzz target gives this function the fuzzer's bytes, a test a generator's.

use std::fs;
use std::path::Path;

use block::{Disk, Format, Options, image};
use memory::vm_memory::VolatileSlice;

/// Does with a file all that a machine and `ringer image` do with images. `directory` is for this alone.
pub fn image_file(directory: &Path, data: &[u8]) {
    let path = directory.join("image");
    fs::write(&path, data).unwrap();
    let _ = image::info(&path, None);
    let _ = image::check(&path, false);
    for (read_only, snapshot, format) in
        [(true, false, None), (false, true, Some(Format::Qcow2)), (false, false, Some(Format::Qcow2))]
    {
        let mut options = Options::new(&path);
        (options.read_only, options.snapshot, options.format) = (read_only, snapshot, format);
        if let Ok(disk) = Disk::open(&options) {
            use_disk(&disk);
        }
    }
    let _ = image::check(&path, true);
    let _ = fs::remove_file(&path);
}

fn use_disk(disk: &Disk) {
    let size = disk.size();
    let mut buffer = vec![0; 8192];
    let last = size.saturating_sub(8192) / 512 * 512;
    let places = [0, 512, 65_536, 1 << 20, size / 2 / 512 * 512, last];
    for place in places {
        let _ = disk.read(&[VolatileSlice::from(buffer.as_mut_slice())], place);
        let _ = disk.next_data(place);
    }
    for place in places {
        buffer.fill(place as u8);
        let _ = disk.write(&[VolatileSlice::from(buffer.as_mut_slice())], place);
        let _ = disk.read(&[VolatileSlice::from(buffer.as_mut_slice())], place);
    }
    let _ = disk.discard(0, 131_072.min(size));
    let _ = disk.write_zeroes(last, 512.min(size), true);
    let _ = disk.flush();
}
