//! What the monitor says about itself: 128 bytes of EDID 1.3 (VESA E-EDID standard, release A).

pub const SIZE: usize = 128;

const CHECKSUM: usize = SIZE - 1;

/// A monitor that prefers 1024 x 768 and can do the usual modes at 60 Hz.
pub fn edid() -> [u8; SIZE] {
    let mut edid = [0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        edid.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // Manufacturer "RGR" (five bits a letter), product 1, no serial number, week 0 of 2024, version 1.3.
    put(8, &letters(*b"RGR"));
    put(10, &[1, 0, 0, 0, 0, 0, 0, 34, 1, 3]);
    // Digital, size not told, gamma 2.2, RGB, the first detailed timing is the preferred one.
    put(20, &[0x80, 0, 0, 120, 0x0a]);
    // The chromaticity of sRGB (3.7: red, green, blue and white in ten bits each).
    put(25, &[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    // Established timings: 640 x 480, 800 x 600 and 1024 x 768 at 60 Hz.
    put(35, &[0x21, 0x08, 0]);
    // Standard timings at 60 Hz: width / 8 - 31, and the aspect ratio (0: 16:10, 1: 4:3, 2: 5:4, 3: 16:9) above the rate.
    let standard = [(1280, 2), (1280, 0), (1280, 3), (1440, 0), (1600, 1), (1680, 0), (1920, 3), (1920, 0)];
    for (index, (width, aspect)) in standard.into_iter().enumerate() {
        put(38 + 2 * index, &[(width / 8 - 31) as u8, aspect << 6]);
    }
    put(54, &preferred());
    // Range limits: 50 to 75 Hz, 30 to 100 kHz, 200 MHz; no formula.
    put(72, &[0, 0, 0, 0xfd, 0, 50, 75, 30, 100, 20, 0, 0x0a, 0x20, 0x20, 0x20, 0x20, 0x20, 0x20]);
    put(90, b"\0\0\0\xfc\0Ringer\n      ");
    // A descriptor that says nothing.
    put(108, &[0, 0, 0, 0x10]);
    let sum = edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    edid[CHECKSUM] = sum.wrapping_neg();
    edid
}

fn letters([a, b, c]: [u8; 3]) -> [u8; 2] {
    let five = |letter: u8| u16::from(letter & 0x1f);
    (five(a) << 10 | five(b) << 5 | five(c)).to_be_bytes()
}

/// 1024 x 768 at 60 Hz (VESA display monitor timings): 65 MHz; 1344 dots in a line, of which 24 come before a sync pulse
/// of 136; 806 lines, of which 3 come before one of 6.
fn preferred() -> [u8; 18] {
    let [clock_low, clock_high] = 6500u16.to_le_bytes();
    let (width, dark, height, dark_lines) = (1024u16, 320u16, 768u16, 38u16);
    let low = |value: u16| value.to_le_bytes()[0];
    let high = |a: u16, b: u16| a.to_le_bytes()[1] << 4 | b.to_le_bytes()[1];
    [
        clock_low,
        clock_high,
        low(width),
        low(dark),
        high(width, dark),
        low(height),
        low(dark_lines),
        high(height, dark_lines),
        24,
        136,
        3 << 4 | 6,
        0,
        0,
        0,
        0,
        0,
        0,
        // Digital, separate sync pulses, both negative.
        0x18,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitor_prefers_1024_by_768() {
        let edid = edid();
        assert_eq!(edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(edid[..8], [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
        assert_eq!((edid[54 + 2], edid[54 + 4] >> 4, edid[54 + 5], edid[54 + 7] >> 4), (0, 4, 0, 3));
    }
}
