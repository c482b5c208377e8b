//! The firmware's image: what kind it is, and where its variables are.
//!
//! EFI firmware is flash: a firmware volume begins with its file system's signature. All else is a BIOS, a ROM.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use chipset::flash::{BLOCK_SIZE, Backing, Chip, Image, MAX_SIZE};

use super::FirmwareConfig;
use crate::Error;
use crate::file;

/// In the header of a firmware volume (UEFI PI 1.8, volume 3, 3.2.1.1): its signature, and its file system.
const VOLUME_SIGNATURE: u64 = 40;
const VOLUME_GUID: u64 = 16;
/// EFI_SYSTEM_NV_DATA_FV_GUID: the volume holds variables.
const VARIABLES_GUID: [u8; 16] =
    [0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50];
/// The processors start 16 bytes below the end: there is at least one jump.
const LEAST_SIZE: u64 = 0x1_0000;
const SMALL: u64 = 1 << 20;

/// Reads the image that the machine starts from.
pub fn load(config: &FirmwareConfig) -> Result<Image, Error> {
    let path = &config.image;
    let image = file::Image::open(path)?;
    let size = image.size();
    if !(LEAST_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(BLOCK_SIZE) {
        let why = format!("it has {size} bytes; firmware has 64 KiB to 16 MiB, in steps of 4 KiB");
        return Err(Error::Firmware { path: path.clone(), why });
    }
    let mut content = vec![0; size as usize];
    image.read_at(&mut content, 0)?;
    if content.get(content.len() - 16..).is_none_or(|vector| vector.iter().all(|b| *b == 0 || *b == 0xff)) {
        let why = "where a processor starts, 16 bytes below its end, it is empty".into();
        return Err(Error::Firmware { path: path.clone(), why });
    }
    if !has_volume(&content) {
        if config.variables.is_some() {
            let why = "it is no EFI firmware: it keeps no variables".into();
            return Err(Error::Firmware { path: path.clone(), why });
        }
        return Ok(Image::Rom(content));
    }
    if has_variables(&content) {
        // One image with code and variables: all of it is one chip.
        let (content, backing) = match &config.variables {
            Some(own) => open_variables(own, &content)?,
            None => (content, Backing::Volatile),
        };
        return Ok(Image::Flash(vec![Chip { content, backing }]));
    }
    let code = Chip { content, backing: Backing::ReadOnly };
    let template = match &config.variables_template {
        Some(template) => Some(read_variables(template)?),
        None => None,
    };
    let variables = match (&config.variables, template) {
        (Some(own), Some(template)) => open_variables(own, &template)?,
        (Some(own), None) if own.exists() => open_variables(own, &read_variables(own)?)?,
        (Some(own), None) => {
            let why =
                "it is not there, and there is nothing to make it from: copy the firmware's OVMF_VARS file".into();
            return Err(Error::Firmware { path: own.clone(), why });
        }
        (None, Some(template)) => (template, Backing::Volatile),
        (None, None) => return Ok(Image::Flash(vec![code])),
    };
    let (content, backing) = variables;
    if content.len() as u64 + code.content.len() as u64 > MAX_SIZE {
        let why = "with its variables it has more than 16 MiB".into();
        return Err(Error::Firmware { path: path.clone(), why });
    }
    Ok(Image::Flash(vec![code, Chip { content, backing }]))
}

fn has_volume(content: &[u8]) -> bool {
    let at = VOLUME_SIGNATURE as usize;
    // The first volume is at the start, or behind the padding of a combined image.
    content.chunks(0x1000).any(|chunk| chunk.get(at..at + 4) == Some(b"_FVH"))
}

fn has_variables(content: &[u8]) -> bool {
    let (guid, signature) = (VOLUME_GUID as usize, VOLUME_SIGNATURE as usize);
    content.get(guid..guid + 16) == Some(&VARIABLES_GUID) && content.get(signature..signature + 4) == Some(b"_FVH")
}

/// Reads a file with variables, and makes sure that it is one.
fn read_variables(path: &Path) -> Result<Vec<u8>, Error> {
    let image = file::Image::open(path)?;
    let size = image.size();
    let bad = |why: String| Error::Firmware { path: path.to_owned(), why };
    if size > MAX_SIZE || !size.is_multiple_of(BLOCK_SIZE) {
        return Err(bad(format!("it has {size} bytes; a file with variables has at most 16 MiB, in steps of 4 KiB")));
    }
    let mut content = vec![0; size as usize];
    image.read_at(&mut content, 0)?;
    if !has_variables(&content) {
        return Err(bad("it holds no EFI variables: start with a copy of the firmware's OVMF_VARS file".into()));
    }
    Ok(content)
}

/// Opens a machine's own variables, which begin as a copy of the template.
fn open_variables(path: &Path, template: &[u8]) -> Result<(Vec<u8>, Backing), Error> {
    let error = |action| move |source| Error::File { action, path: path.to_owned(), source };
    match File::create_new(path) {
        Ok(mut file) => {
            if let Err(source) = file.write_all(template) {
                // Half of it would be of no use to anyone.
                let _ = std::fs::remove_file(path);
                return Err(error("write")(source));
            }
            Ok((template.to_vec(), Backing::File(file)))
        }
        Err(exists) if exists.kind() == io::ErrorKind::AlreadyExists => {
            let content = read_variables(path)?;
            if content.len() != template.len() {
                let (size, wanted) = (content.len(), template.len());
                let why = format!("it has {size} bytes; this firmware's variables have {wanted}");
                return Err(Error::Firmware { path: path.to_owned(), why });
            }
            let file = File::options().read(true).write(true).open(path).map_err(error("open"))?;
            Ok((content, Backing::File(file)))
        }
        Err(source) => Err(error("make")(source)),
    }
}

/// Reads a file that is to be no larger than 1 MiB.
pub fn read_small(path: &Path) -> Result<Vec<u8>, Error> {
    let image = file::Image::open(path)?;
    let mut content = Vec::new();
    let error = |source| Error::File { action: "read", path: path.to_owned(), source };
    image.file().take(SMALL).read_to_end(&mut content).map_err(error)?;
    Ok(content)
}
