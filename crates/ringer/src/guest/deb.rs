//! Reads single files out of Debian packages: an `ar` archive that holds a compressed tar archive (deb(5)).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use super::Error;

/// What a file is at most: a damaged package must not fill the memory.
const LARGEST: u64 = 256 << 20;

/// The first regular file in `package` whose path, without a leading `./`, satisfies `wanted`.
pub fn extract(package: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<u8>, Error> {
    let mut found = None;
    visit(package, &mut |path, file| {
        if found.is_none() && wanted(path) {
            found = Some(read(file)?);
        }
        Ok(found.is_none())
    })?;
    let missing =
        || Error::Package { package: package.into(), source: io::Error::other("the expected file is not in it") };
    found.ok_or_else(missing)
}

/// All kernel modules in `package` that are named (without their suffix) in `names`, in that order and uncompressed.
pub fn modules(package: &Path, names: &[&'static str]) -> Result<Vec<(&'static str, Vec<u8>)>, Error> {
    let mut found: Vec<Option<Vec<u8>>> = vec![None; names.len()];
    visit(package, &mut |path, file| {
        let Some((name, suffix)) = path.rsplit('/').next().and_then(|name| name.split_once(".ko")) else {
            return Ok(true);
        };
        let name = name.replace('-', "_");
        if let Some(place) = names.iter().position(|wanted| *wanted == name).and_then(|index| found.get_mut(index)) {
            *place = Some(read(decompress(suffix, file)?)?);
        }
        Ok(true)
    })?;
    Ok(names.iter().copied().zip(found).filter_map(|(name, data)| Some((name, data?))).collect())
}

/// Shows each regular file of a package to `visitor`, until that returns false.
fn visit(package: &Path, visitor: &mut dyn FnMut(&str, &mut dyn Read) -> io::Result<bool>) -> Result<(), Error> {
    let broken = |source| Error::Package { package: package.into(), source };
    let file = File::open(package).map_err(broken)?;
    let mut archive = ar::Archive::new(BufReader::new(file));
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(broken)?;
        let name = String::from_utf8_lossy(entry.header().identifier()).into_owned();
        if let Some(compression) = name.strip_prefix("data.tar") {
            let stream = decompress(compression, entry).map_err(broken)?;
            return visit_tar(stream, visitor).map_err(broken);
        }
    }
    Err(broken(io::Error::other("it has no data archive")))
}

fn decompress<'a>(suffix: &str, data: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    match suffix {
        "" => Ok(Box::new(data)),
        ".gz" => Ok(Box::new(flate2::read::GzDecoder::new(data))),
        ".xz" => Ok(Box::new(lzma_rust2::XzReader::new(data, true))),
        ".zst" => {
            Ok(Box::new(ruzstd::decoding::StreamingDecoder::new(data).map_err(|e| io::Error::other(e.to_string()))?))
        }
        other => Err(io::Error::other(format!("its data archive has an unknown compression ({other})"))),
    }
}

fn visit_tar(stream: impl Read, visitor: &mut dyn FnMut(&str, &mut dyn Read) -> io::Result<bool>) -> io::Result<()> {
    let mut archive = tar::Archive::new(stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        if entry.header().entry_type().is_file() && !visitor(path.trim_start_matches("./"), &mut entry)? {
            break;
        }
    }
    Ok(())
}

fn read(file: impl Read) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    file.take(LARGEST).read_to_end(&mut data)?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A package that holds `./bin/tool`.
    fn package(member: &str, compress: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::NamedTempFile {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o755);
        header.set_cksum();
        tar.append_data(&mut header, "./bin/tool", &b"hello"[..]).unwrap();
        let data = compress(tar.into_inner().unwrap());
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut archive = ar::Builder::new(file.reopen().unwrap());
        for (name, bytes) in [("debian-binary", &b"2.0\n"[..]), (member, &data)] {
            archive.append(&ar::Header::new(name.into(), bytes.len() as u64), bytes).unwrap();
        }
        file
    }

    fn gzip(data: Vec<u8>) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_file_is_found_in_plain_and_compressed_data() {
        for file in [package("data.tar", |data| data), package("data.tar.gz", gzip)] {
            assert_eq!(extract(file.path(), |path| path == "bin/tool").unwrap(), b"hello");
        }
    }

    #[test]
    fn modules_come_in_the_order_asked_for_and_what_is_built_in_is_left_out() {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, data) in [("lib/b-x.ko", b"b"), ("lib/a.ko", b"a"), ("lib/c.ko", b"c"), ("lib/a.txt", b"t")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, path, &data[..]).unwrap();
        }
        let data = tar.into_inner().unwrap();
        let file = package("data.tar", move |_| data.clone());
        let found = modules(file.path(), &["a", "missing", "b_x"]).unwrap();
        assert_eq!(found, [("a", b"a".to_vec()), ("b_x", b"b".to_vec())]);
    }

    #[test]
    fn a_package_without_the_file_or_truncated_is_an_error_that_names_it() {
        let file = package("data.tar.gz", gzip);
        let error = extract(file.path(), |path| path == "other").unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
        file.as_file().set_len(100).unwrap();
        assert!(extract(file.path(), |path| path == "bin/tool").is_err());
    }
}
