//! A picture of the screen as a PNG file (PNG 1.2): eight bits for each of red, green and blue, rows unfiltered.

use std::io::{self, Write};

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};

use crate::Frame;

const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";
/// Eight bits for each of three colours, without interlace (11.2.2).
const FORMAT: [u8; 5] = [8, 2, 0, 0, 0];

/// Writes a frame as a whole PNG file.
pub fn write(frame: &Frame, out: &mut impl Write) -> io::Result<()> {
    let (width, height) = frame.size();
    let mut header = Vec::with_capacity(13);
    for size in [width, height] {
        // Frames are a few thousand pixels wide and high at most.
        header.extend(u32::try_from(size).unwrap_or(u32::MAX).to_be_bytes());
    }
    header.extend(FORMAT);
    let mut data = ZlibEncoder::new(Vec::new(), Compression::fast());
    let mut line = Vec::with_capacity(1 + 3 * width);
    for y in 0..height {
        line.clear();
        // The filter: none.
        line.push(0);
        for pixel in frame.row(y) {
            let [_, red, green, blue] = pixel.to_be_bytes();
            line.extend([red, green, blue]);
        }
        data.write_all(&line)?;
    }
    out.write_all(&SIGNATURE)?;
    chunk(out, *b"IHDR", &header)?;
    chunk(out, *b"IDAT", &data.finish()?)?;
    chunk(out, *b"IEND", &[])
}

/// Length, type, data, and a checksum of the latter two (5.3).
fn chunk(out: &mut impl Write, kind: [u8; 4], data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut checksum = Crc::new();
    checksum.update(&kind);
    checksum.update(data);
    out.write_all(&length.to_be_bytes())?;
    out.write_all(&kind)?;
    out.write_all(data)?;
    out.write_all(&checksum.sum().to_be_bytes())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::ZlibDecoder;

    use super::*;

    #[test]
    fn a_picture_is_chunks_with_checksums_and_rows_behind_a_filter_byte() {
        let mut frame = Frame::default();
        frame.resize(2, 2);
        frame.row_mut(1).copy_from_slice(&[0x0012_3456, 0x00ff_0080]);
        let mut file = Vec::new();
        write(&frame, &mut file).unwrap();
        let header = [&b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"[..], &[0, 0, 0, 2, 0, 0, 0, 2, 8, 2, 0, 0, 0]].concat();
        assert_eq!(file[..29], header);
        // What every decoder expects at the end of every file.
        assert!(file.ends_with(&[0, 0, 0, 0, b'I', b'E', b'N', b'D', 0xae, 0x42, 0x60, 0x82]));
        let length = u32::from_be_bytes(file[33..37].try_into().unwrap()) as usize;
        let mut rows = Vec::new();
        ZlibDecoder::new(&file[41..41 + length]).read_to_end(&mut rows).unwrap();
        assert_eq!(rows, [0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34, 0x56, 0xff, 0, 0x80]);
    }
}
