//! Images as users have them: made and read by this crate, and checked against `qemu-img` where that is installed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use block::{Cache, Disk, Error, Format, Options, image};
use memory::vm_memory::VolatileSlice;

const MIB: u64 = 1 << 20;

fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0xee; length];
    disk.read(&[VolatileSlice::from(data.as_mut_slice())], offset).unwrap();
    data
}

fn write(disk: &Disk, offset: u64, data: &[u8]) -> std::io::Result<()> {
    let mut data = data.to_vec();
    disk.write(&[VolatileSlice::from(data.as_mut_slice())], offset)
}

/// Bytes that differ everywhere and by `seed`.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn open(path: &Path, change: impl FnOnce(&mut Options)) -> Result<Disk, Error> {
    let mut options = Options::new(path);
    change(&mut options);
    Disk::open(&options)
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs `qemu-img` and gives its output; `None` where it isn't installed.
fn qemu_img(arguments: &[&str]) -> Option<String> {
    let output = Command::new("qemu-img").args(arguments).output().ok()?;
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A raw image with data at its start, in the middle and at its end.
fn sample(directory: &Path) -> (PathBuf, Vec<u8>) {
    let path = directory.join("sample.raw");
    let mut data = vec![0; 5 * MIB as usize + 512];
    data[..100_000].copy_from_slice(&pattern(1, 100_000));
    data[3_000_000..3_000_512].copy_from_slice(&pattern(2, 512));
    data[4_000_000..4_100_000].fill(b'x');
    let end = data.len();
    data[end - 512..].copy_from_slice(&pattern(3, 512));
    fs::write(&path, &data).unwrap();
    (path, data)
}

#[test]
fn what_is_written_is_read_again_after_reopening() {
    let directory = directory();
    for format in [Format::Raw, Format::Qcow2] {
        for cache in [Cache::WriteBack, Cache::WriteThrough, Cache::None] {
            let path = directory.path().join(format!("{format:?}{cache:?}"));
            image::create(&path, format, Some(64 * MIB), None).unwrap();
            let options = |options: &mut Options| (options.format, options.cache) = (Some(format), cache);
            let places = [0, 512, 65_024, MIB, 20 * MIB + 1536, 64 * MIB - 4096];
            {
                let disk = open(&path, options).unwrap();
                assert_eq!((disk.size(), disk.write_through()), (64 * MIB, cache == Cache::WriteThrough));
                places.iter().for_each(|place| write(&disk, *place, &pattern(*place, 4096)).unwrap());
                disk.discard(30 * MIB, MIB).unwrap();
                disk.write_zeroes(MIB, 512, false).unwrap();
                disk.write_zeroes(20 * MIB + 2048, 512, true).unwrap();
                disk.flush().unwrap();
            }
            let disk = open(&path, options).unwrap();
            let mut expected = pattern(0, 512);
            expected.extend(pattern(512, 4096));
            assert_eq!(read(&disk, 0, 4608), expected);
            assert_eq!(read(&disk, 65_024, 4096), pattern(65_024, 4096));
            assert_eq!(read(&disk, MIB, 512), [0; 512]);
            assert_eq!(read(&disk, MIB + 512, 3584), pattern(MIB, 4096)[512..]);
            assert_eq!(read(&disk, 20 * MIB + 2048, 512), [0; 512]);
            assert_eq!(read(&disk, 64 * MIB - 4096, 4096), pattern(64 * MIB - 4096, 4096));
            assert!(write(&disk, 64 * MIB - 512, &[0; 1024]).is_err(), "beyond the end");
            drop(disk);
            if format == Format::Qcow2 {
                let report = image::check(&path, false).unwrap();
                assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.details);
                qemu_img(&["check", "-q", path.to_str().unwrap()]);
            }
        }
    }
}

#[test]
fn images_of_qemu_hold_what_qemu_put_there() {
    let directory = directory();
    let (raw, data) = sample(directory.path());
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_string();
    let variants: [(&str, &[&str]); 7] = [
        ("v3", &[]),
        ("v2", &["-o", "compat=0.10"]),
        ("zlib", &["-c"]),
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
        ("lazy", &["-o", "lazy_refcounts=on"]),
        ("small", &["-o", "cluster_size=512,refcount_bits=1"]),
        ("large", &["-c", "-o", "cluster_size=2M,refcount_bits=64"]),
    ];
    for (name, arguments) in variants {
        let image = at(name);
        let command = [&["convert", "-O", "qcow2"], arguments, &[raw.to_str().unwrap(), &image]].concat();
        if qemu_img(&command).is_none() {
            return;
        }
        let report = image::check(Path::new(&image), false).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{name}: {:?}", report.details);
        let disk = open(Path::new(&image), |options| options.read_only = true).unwrap();
        assert_eq!(read(&disk, 0, data.len()), data, "{name}");
        drop(disk);
        // An image over it, as QEMU makes it, written by us.
        let over = at(&format!("{name}.over"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", &format!("./{name}"), "-F", "qcow2", &over]);
        let disk = open(Path::new(&over), |_| ()).unwrap();
        write(&disk, 4_000_256, &[7; 512]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read(&disk, 3_999_744, 512), data[3_999_744..4_000_256]);
        disk.flush().unwrap();
        drop(disk);
        qemu_img(&["check", "-q", &over]);
        let back = at("back");
        qemu_img(&["convert", "-O", "raw", &over, &back]);
        let mut expected = data.clone();
        expected[4_000_256..4_000_768].fill(7);
        assert!(fs::read(&back).unwrap() == expected, "{name}");
    }
    assert!(matches!(open(Path::new(&at("zstd")), |_| ()), Err(Error::Zstd { .. })));
}

#[test]
fn converting_keeps_the_data_and_the_holes() {
    let directory = directory();
    let (raw, data) = sample(directory.path());
    let (qcow2, back) = (directory.path().join("a.qcow2"), directory.path().join("b.raw"));
    let mut last = (0, 0);
    image::convert(&Options::new(&raw), &qcow2, Format::Qcow2, &mut |done, all| last = (done, all)).unwrap();
    assert_eq!(last, (data.len() as u64, data.len() as u64));
    image::convert(&Options::new(&qcow2), &back, Format::Raw, &mut |_, _| ()).unwrap();
    assert!(fs::read(&back).unwrap() == data);
    assert!(image::info(&qcow2, None).unwrap().allocated < MIB);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let refused = image::convert(&Options::new(&raw), &qcow2, Format::Qcow2, &mut |_, _| ());
    assert!(matches!(refused, Err(Error::Exists { .. })));
}

#[test]
fn a_compressed_image_holds_the_same_in_less() {
    let directory = directory();
    let raw = directory.path().join("disk.raw");
    let file = File::create(&raw).unwrap();
    // Over the ends of L2 tables, compressible in several degrees and not at all, and an odd end.
    let size = 1100 * MIB + 1536;
    file.set_len(size).unwrap();
    let words: Vec<u8> = (0..400_000u32).flat_map(|n| format!("line {} of {}\n", n, n % 97).into_bytes()).collect();
    for (offset, data) in [
        (0, &words[..]),
        (40 * MIB, &pattern(1, 300_000)[..]),
        (511 * MIB + 500_000, &words[..2_000_000]),
        (900 * MIB, &[b'x'; 3_000_000][..]),
        (size - 700, &pattern(2, 700)[..]),
    ] {
        file.write_all_at(data, offset).unwrap();
    }
    for compression in [image::Compression::Zlib, image::Compression::Zstd] {
        let packed = directory.path().join(format!("{compression:?}"));
        let mut last = (0, 0);
        let mut progress = |done, all| last = (done, all);
        image::compress(&Options::new(&raw), &packed, compression, &mut progress).unwrap();
        assert_eq!(last, (size, size));
        let info = image::info(&packed, None).unwrap();
        assert!(info.size == size && info.allocated < 6 * MIB, "{info:?}");
        let report = image::check(&packed, false).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.details);
        assert!(
            report.compressed_clusters > 150 && report.data_clusters - report.compressed_clusters < 8,
            "{report:?}"
        );
        let name = packed.to_str().unwrap();
        qemu_img(&["check", "-q", name]);
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), name]);
        let back = directory.path().join("back");
        image::convert(&Options::new(&packed), &back, Format::Raw, &mut |_, _| ()).unwrap();
        let (before, after) = (File::open(&raw).unwrap(), File::open(&back).unwrap());
        let (mut old, mut new) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        for offset in (0..size).step_by(MIB as usize) {
            let length = before.read_at(&mut old, offset).unwrap();
            after.read_exact_at(&mut new[..length], offset).unwrap();
            assert!(old[..length] == new[..length], "{compression:?} at {offset:#x}");
        }
        fs::remove_file(&back).unwrap();
        let again = image::compress(&Options::new(&raw), &packed, compression, &mut |_, _| ());
        assert!(matches!(again, Err(Error::Exists { .. })));
    }
    // What a guest writes to an image compressed by zlib lies beside the compressed clusters.
    let zlib = directory.path().join("Zlib");
    let disk = open(&zlib, |_| ()).unwrap();
    write(&disk, 1000 * 512, &[7; 4096]).unwrap();
    assert_eq!(read(&disk, 999 * 512, 512), words[999 * 512..1000 * 512]);
    drop(disk);
    assert_eq!(image::check(&zlib, false).unwrap().errors, 0);
}

#[test]
fn a_snapshot_leaves_the_image_as_it_was() {
    let directory = directory();
    let (raw, data) = sample(directory.path());
    let qcow2 = directory.path().join("a.qcow2");
    image::convert(&Options::new(&raw), &qcow2, Format::Qcow2, &mut |_, _| ()).unwrap();
    for path in [&raw, &qcow2] {
        let before = fs::read(path).unwrap();
        let disk = open(path, |options| options.snapshot = true).unwrap();
        // Two of them can share the image.
        let other = open(path, |options| options.snapshot = true).unwrap();
        write(&disk, 512, &[9; 1024]).unwrap();
        disk.flush().unwrap();
        assert_eq!(read(&disk, 0, 2048), [&data[..512], &[9; 1024], &data[1536..2048]].concat());
        assert_eq!(read(&other, 0, 2048), data[..2048]);
        assert!(matches!(open(path, |_| ()), Err(Error::Twice { .. })));
        drop((disk, other));
        assert!(fs::read(path).unwrap() == before);
    }
}

#[test]
fn an_image_has_one_writer() {
    let directory = directory();
    let (raw, _) = sample(directory.path());
    let writer = open(&raw, |_| ()).unwrap();
    assert!(matches!(open(&raw, |_| ()), Err(Error::Twice { .. })));
    assert!(matches!(open(&raw, |options| options.read_only = true), Err(Error::Twice { .. })));
    // QEMU heeds our locks, and we heed QEMU's.
    if let Ok(output) = Command::new("qemu-img").args(["resize", "-q", "-f", "raw"]).arg(&raw).arg("8M").output() {
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("lock"), "{output:?}");
    }
    drop(writer);
    let reader = open(&raw, |options| options.read_only = true).unwrap();
    assert!(write(&reader, 0, &[0; 512]).is_err());
    open(&raw, |options| options.read_only = true).unwrap();
}

#[test]
fn a_guest_cannot_make_a_raw_disk_look_like_qcow2() {
    let directory = directory();
    let (raw, data) = sample(directory.path());
    let mut sector = vec![0; 512];
    sector[..4].copy_from_slice(b"QFI\xfb");
    let disk = open(&raw, |_| ()).unwrap();
    assert_eq!(write(&disk, 0, &sector).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(read(&disk, 0, 512), data[..512]);
    write(&disk, 512, &sector).unwrap();
    sector[3] = 0;
    let long = [&sector[..], &pattern(8, 100_352 - 512)].concat();
    write(&disk, 0, &long).unwrap();
    assert!(read(&disk, 0, 100_352) == long);
    drop(disk);
    // Whoever names the format can write what they like, and gets what they named.
    sector[3] = 0xfb;
    write(&open(&raw, |options| options.format = Some(Format::Raw)).unwrap(), 0, &sector).unwrap();
    assert_eq!(read(&open(&raw, |options| options.format = Some(Format::Raw)).unwrap(), 0, 512), sector);
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    assert!(matches!(open(directory.path(), |options| options.read_only = true), Err(Error::NotAnImage { .. })));
    assert!(matches!(open(Path::new("/dev/null"), |_| ()), Err(Error::NotAnImage { .. })));
    assert!(matches!(open(&at("missing"), |_| ()), Err(Error::Io { .. })));
    Command::new("mkfifo").arg(at("pipe")).status().unwrap();
    assert!(matches!(open(&at("pipe"), |options| options.read_only = true), Err(Error::NotAnImage { .. })));
    File::create(at("empty")).unwrap();
    assert!(matches!(open(&at("empty"), |_| ()), Err(Error::Empty { .. })));
}

/// A qcow2 image that says it lies over `backing`.
fn image_over(path: &Path, backing: &str, format: &str) {
    image::create(path, Format::Qcow2, Some(MIB), None).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut length = [0; 4];
    file.read_exact_at(&mut length, 100).unwrap();
    let at = u64::from(u32::from_be_bytes(length));
    let mut extensions = Vec::new();
    if !format.is_empty() {
        extensions.extend(0xe279_2acau32.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let name_at = at + extensions.len() as u64;
    extensions.extend(backing.as_bytes());
    file.write_all_at(&extensions, at).unwrap();
    file.write_all_at(&name_at.to_be_bytes(), 8).unwrap();
    file.write_all_at(&(backing.len() as u32).to_be_bytes(), 16).unwrap();
}

#[test]
fn a_backing_file_outside_the_images_directory_needs_leave() {
    let (directory, elsewhere) = (directory(), directory());
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, vec![b's'; 4096]).unwrap();
    let at = |name: &str| directory.path().join(name);
    image_over(&at("absolute"), secret.to_str().unwrap(), "raw");
    std::os::unix::fs::symlink(&secret, at("link")).unwrap();
    image_over(&at("linked"), "link", "raw");
    image_over(&at("up"), "../../../../../../../../../../../../etc/passwd", "raw");
    for name in ["absolute", "linked", "up"] {
        assert!(matches!(open(&at(name), |_| ()), Err(Error::BackingOutside { .. })), "{name}");
    }
    let disk = open(&at("absolute"), |options| options.any_backing = true).unwrap();
    assert_eq!(read(&disk, 0, 512), [b's'; 512]);
    image_over(&at("device"), "/dev/zero", "raw");
    assert!(matches!(open(&at("device"), |options| options.any_backing = true), Err(Error::NotAnImage { .. })));
    fs::write(at("inside"), vec![b'i'; 4096]).unwrap();
    image_over(&at("unsaid"), "inside", "");
    assert!(matches!(open(&at("unsaid"), |_| ()), Err(Error::BackingFormat { .. })));
    image_over(&at("vmdk"), "inside", "vmdk");
    assert!(matches!(open(&at("vmdk"), |_| ()), Err(Error::UnknownFormat { .. })));
}

#[test]
fn a_chain_of_backing_files_ends() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    image_over(&at("self"), "self", "qcow2");
    image_over(&at("a"), "b", "qcow2");
    image_over(&at("b"), "a", "qcow2");
    // Also where the lock of the image itself stands in the way of opening it once more.
    for (name, read_only) in [("self", true), ("self", false), ("a", true), ("a", false)] {
        let opened = open(&at(name), |options| options.read_only = read_only);
        assert!(matches!(opened, Err(Error::BackingChain { .. })), "{name}, {read_only}");
    }
    image::create(&at("0"), Format::Qcow2, Some(MIB), None).unwrap();
    (1..20).for_each(|n| image_over(&at(&n.to_string()), &(n - 1).to_string(), "qcow2"));
    open(&at("15"), |_| ()).unwrap();
    assert!(matches!(open(&at("16"), |_| ()), Err(Error::BackingChain { .. })));
}

#[test]
fn a_shrunk_image_gives_errors_not_zeros() {
    let directory = directory();
    let (raw, _) = sample(directory.path());
    let qcow2 = directory.path().join("a.qcow2");
    image::convert(&Options::new(&raw), &qcow2, Format::Qcow2, &mut |_, _| ()).unwrap();
    for path in [&raw, &qcow2] {
        let disk = open(path, |_| ()).unwrap();
        read(&disk, 4_000_000 / 512 * 512, 4096);
        File::options().write(true).open(path).unwrap().set_len(300_000).unwrap();
        let mut data = vec![0; 4096];
        let error = disk.read(&[VolatileSlice::from(data.as_mut_slice())], 4_000_000 / 512 * 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{path:?}");
    }
}

#[test]
fn what_was_written_and_cut_off_gives_errors_not_zeros() {
    let directory = directory();
    let path = directory.path().join("disk");
    image::create(&path, Format::Qcow2, Some(4 * MIB), None).unwrap();
    let disk = open(&path, |_| ()).unwrap();
    let mut data = vec![7; 65536];
    let slices = [VolatileSlice::from(data.as_mut_slice())];
    disk.write(&slices, 2 * MIB).unwrap();
    // Nothing was read since: only the write knows how long the file was.
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 65536).unwrap();
    assert_eq!(disk.read(&slices, 2 * MIB).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert_eq!(disk.write(&slices, 2 * MIB).unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn the_last_part_of_a_sector_is_padded_with_zeros() {
    let directory = directory();
    let path = directory.path().join("odd");
    fs::write(&path, vec![5; 1000]).unwrap();
    for change in [|_: &mut Options| (), |options: &mut Options| options.snapshot = true] {
        let disk = open(&path, change).unwrap();
        assert_eq!(disk.size(), 1024);
        assert_eq!(read(&disk, 0, 1024), [vec![5; 1000], vec![0; 24]].concat());
    }
}

#[test]
fn resizing_says_when_data_would_go() {
    let directory = directory();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format!("{format:?}"));
        image::create(&path, format, Some(8 * MIB), None).unwrap();
        let options = Options::new(&path);
        write(&Disk::open(&options).unwrap(), 0, &pattern(1, 4096)).unwrap();
        assert_eq!(image::resize(&options, 16 * MIB, false).unwrap(), 8 * MIB);
        assert!(matches!(image::resize(&options, MIB, false), Err(Error::Shrink { .. })));
        image::resize(&options, MIB, true).unwrap();
        assert!(matches!(image::resize(&options, 1000, true), Err(Error::Size { .. })));
        assert_eq!(image::info(&path, Some(format)).unwrap().size, MIB);
        assert_eq!(read(&Disk::open(&options).unwrap(), 0, 4096), pattern(1, 4096));
    }
}

#[test]
fn wrong_reference_counts_are_found_and_mended() {
    let directory = directory();
    let path = directory.path().join("a");
    image::create(&path, Format::Qcow2, Some(64 * MIB), None).unwrap();
    let disk = open(&path, |_| ()).unwrap();
    (0..64).for_each(|n| write(&disk, n * MIB, &pattern(n, 4096)).unwrap());
    drop(disk);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut place = [0; 8];
    file.read_exact_at(&mut place, 48).unwrap();
    let table = u64::from_be_bytes(place);
    file.read_exact_at(&mut place, table).unwrap();
    let block = u64::from_be_bytes(place);
    // The sixth cluster is not counted, the hundredth is.
    file.write_all_at(&[0, 0], block + 2 * 6).unwrap();
    file.write_all_at(&[0, 1], block + 2 * 100).unwrap();
    let report = image::check(&path, false).unwrap();
    assert!(report.errors >= 1 && report.leaks == 1, "{report:?}");
    let report = image::check(&path, true).unwrap();
    assert_eq!((report.errors, report.leaks, report.dirty), (0, 0, false), "{:?}", report.details);
    qemu_img(&["check", "-q", path.to_str().unwrap()]);
    let disk = open(&path, |_| ()).unwrap();
    (0..64).for_each(|n| assert_eq!(read(&disk, n * MIB, 4096), pattern(n, 4096)));
    (0..64).for_each(|n| write(&disk, n * MIB + 512 * 1024, &pattern(n, 4096)).unwrap());
    drop(disk);
    qemu_img(&["check", "-q", path.to_str().unwrap()]);
}

#[test]
fn bitmaps_of_backup_programs_are_in_use() {
    let directory = directory();
    let path = directory.path().join("a");
    let name = path.to_str().unwrap();
    if qemu_img(&["create", "-q", "-f", "qcow2", name, "64M"]).is_none() {
        return;
    }
    for bitmap in ["first", "the second, with a longer name"] {
        qemu_img(&["bitmap", "--add", name, bitmap]);
    }
    write(&open(&path, |options| options.snapshot = true).unwrap(), 0, &[1; 512]).unwrap();
    // What is used and not counted is an error, and mended: nothing of the bitmaps may be given out again.
    let report = image::check(&path, false).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.details);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut place = [0; 8];
    file.read_exact_at(&mut place, 48).unwrap();
    let table = u64::from_be_bytes(place);
    file.read_exact_at(&mut place, table).unwrap();
    file.write_all_at(&[0, 1], u64::from_be_bytes(place) + 2 * 1000).unwrap();
    assert_eq!(image::check(&path, false).unwrap().leaks, 1);
    assert_eq!(image::check(&path, true).unwrap().leaks, 0);
    qemu_img(&["check", "-q", name]);
    // Who writes and does not keep them makes them invalid, and their clusters a leak.
    write(&open(&path, |_| ()).unwrap(), 0, &[1; 512]).unwrap();
    assert!(image::check(&path, false).unwrap().leaks > 0);
    assert_eq!(image::check(&path, true).unwrap().leaks, 0);
    qemu_img(&["check", "-q", name]);
}

#[test]
fn an_encrypted_image_is_refused() {
    let directory = directory();
    let path = directory.path().join("a");
    for method in [1u32, 2] {
        image::create(&path, Format::Qcow2, Some(MIB), None).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(&method.to_be_bytes(), 32).unwrap();
        let refused =
            |error| matches!(error, Some(Error::Qcow2 { source, .. }) if source.to_string().contains("encrypted"));
        assert!(refused(open(&path, |_| ()).err()));
        assert!(refused(image::check(&path, true).err()));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn ranges_of_every_kind_of_image_become_zero() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_string();
    let (old, new, raw) = (at("v2"), at("v3"), at("raw"));
    if qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &old, "4M"]).is_none() {
        return;
    }
    image::create(Path::new(&new), Format::Qcow2, Some(4 * MIB), None).unwrap();
    image::create(Path::new(&raw), Format::Raw, Some(4 * MIB), None).unwrap();
    for (name, format) in [(&old, Format::Qcow2), (&new, Format::Qcow2), (&raw, Format::Raw)] {
        for unmap in [false, true] {
            let disk = open(Path::new(name), |options| options.format = Some(format)).unwrap();
            write(&disk, 0, &vec![7; 4 << 20]).unwrap();
            disk.write_zeroes(65_536 - 512, (2 << 20) + 1024, unmap).unwrap();
            let zeros = read(&disk, 65_536 - 512, (2 << 20) + 1024);
            assert!(zeros.iter().all(|byte| *byte == 0), "{name} {unmap}");
            assert_eq!(
                (read(&disk, 65_536 - 1024, 512), read(&disk, 65_536 + (2 << 20) + 512, 512)),
                (vec![7; 512], vec![7; 512])
            );
            disk.flush().unwrap();
        }
    }
    qemu_img(&["check", "-q", &old]);
}

#[test]
fn a_dirty_image_is_mended_before_it_is_used() {
    let directory = directory();
    let path = directory.path().join("a");
    image::create(&path, Format::Qcow2, Some(MIB), None).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&1u64.to_be_bytes(), 72).unwrap();
    assert!(matches!(open(&path, |_| ()), Err(Error::Damaged { .. })));
    assert!(image::info(&path, None).unwrap().qcow2.unwrap().dirty);
    image::check(&path, true).unwrap();
    open(&path, |_| ()).unwrap();
}
