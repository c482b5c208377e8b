//! What viewers say (RFC 6143, 7.5, and the community's protocol document for the extensions): bytes to messages.

use std::io::{self, Read};

use super::pixel::PixelFormat;

/// Why a viewer is turned away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the connection is broken: {0}")]
    Io(#[from] io::Error),
    #[error("\"{0}\" is no version of the protocol")]
    Version(String),
    #[error("it takes security type {0}, which was not offered")]
    Security(u8),
    #[error("its password is wrong")]
    Password,
    #[error("it asks for an impossible form of pixels")]
    PixelFormat,
    #[error("its message {0} is unknown")]
    Message(u8),
    #[error("it sends {0} bytes of text, more than anybody types")]
    Text(u32),
    #[error("there are too many viewers")]
    TooMany,
}

/// A rectangle of the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    pub x: usize,
    pub y: usize,
    pub width: usize,
    pub height: usize,
}

/// A viewer's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    SetPixelFormat(PixelFormat),
    SetEncodings(Vec<i32>),
    UpdateRequest {
        incremental: bool,
        rect: Rect,
    },
    Key {
        down: bool,
        keysym: u32,
    },
    /// With QEMU's extension: `code` as on the wire of a PC keyboard, scan code set 1, 0x80 set for those after 0xe0.
    ScanCode {
        down: bool,
        keysym: u32,
        code: u32,
    },
    Pointer {
        buttons: u8,
        x: u16,
        y: u16,
    },
    /// Cut text, a wish for another size, and other things that nothing comes of.
    Other,
}

/// Message types.
const SET_PIXEL_FORMAT: u8 = 0;
const SET_ENCODINGS: u8 = 2;
const UPDATE_REQUEST: u8 = 3;
const KEY: u8 = 4;
const POINTER: u8 = 5;
const CUT_TEXT: u8 = 6;
const SET_DESKTOP_SIZE: u8 = 251;
const QEMU: u8 = 255;
const QEMU_KEY: u8 = 0;

/// The longest cut text that is read, only to be thrown away.
const MAX_TEXT: u32 = 1 << 20;
/// Of the encodings that a viewer names, those beyond are left out.
const MAX_ENCODINGS: usize = 256;

pub fn bytes<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn skip(from: &mut impl Read, mut count: usize) -> io::Result<()> {
    let mut trash = [0; 4096];
    while count > 0 {
        let length = count.min(trash.len());
        from.read_exact(trash.get_mut(..length).unwrap_or_default())?;
        count -= length;
    }
    Ok(())
}

impl Message {
    /// Reads one message. Takes no more memory than a message may have, whatever lengths are claimed.
    pub fn read(from: &mut impl Read) -> Result<Self, Error> {
        let [kind] = bytes(from)?;
        Ok(match kind {
            SET_PIXEL_FORMAT => {
                let [_, _, _] = bytes(from)?;
                Message::SetPixelFormat(PixelFormat::parse(bytes(from)?)?)
            }
            SET_ENCODINGS => {
                let [_, high, low] = bytes(from)?;
                let count = usize::from(u16::from_be_bytes([high, low]));
                let mut encodings = Vec::new();
                for _ in 0..count.min(MAX_ENCODINGS) {
                    encodings.push(i32::from_be_bytes(bytes(from)?));
                }
                skip(from, 4 * count.saturating_sub(MAX_ENCODINGS))?;
                Message::SetEncodings(encodings)
            }
            UPDATE_REQUEST => {
                let [incremental, x0, x1, y0, y1, w0, w1, h0, h1] = bytes(from)?;
                let number = |a, b| usize::from(u16::from_be_bytes([a, b]));
                let rect = Rect { x: number(x0, x1), y: number(y0, y1), width: number(w0, w1), height: number(h0, h1) };
                Message::UpdateRequest { incremental: incremental != 0, rect }
            }
            KEY => {
                let [down, _, _, a, b, c, d] = bytes(from)?;
                Message::Key { down: down != 0, keysym: u32::from_be_bytes([a, b, c, d]) }
            }
            POINTER => {
                let [buttons, x0, x1, y0, y1] = bytes(from)?;
                Message::Pointer { buttons, x: u16::from_be_bytes([x0, x1]), y: u16::from_be_bytes([y0, y1]) }
            }
            CUT_TEXT => {
                let [_, _, _, a, b, c, d] = bytes(from)?;
                // With the extended clipboard the length is negative.
                let length = i32::from_be_bytes([a, b, c, d]).unsigned_abs();
                if length > MAX_TEXT {
                    return Err(Error::Text(length));
                }
                skip(from, length as usize)?;
                Message::Other
            }
            SET_DESKTOP_SIZE => {
                let [_, _, _, _, _, screens, _] = bytes(from)?;
                skip(from, 16 * usize::from(screens))?;
                Message::Other
            }
            QEMU => {
                let [sub] = bytes(from)?;
                if sub != QEMU_KEY {
                    return Err(Error::Message(kind));
                }
                let [_, down, a, b, c, d, e, f, g, h] = bytes(from)?;
                let (keysym, code) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
                Message::ScanCode { down: down != 0, keysym, code }
            }
            unknown => return Err(Error::Message(unknown)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut bytes: &[u8]) -> Result<Message, Error> {
        let message = Message::read(&mut bytes)?;
        assert!(bytes.is_empty());
        Ok(message)
    }

    #[test]
    fn messages_are_what_their_bytes_say() {
        let rect = Rect { x: 1, y: 2, width: 640, height: 480 };
        let update = Message::UpdateRequest { incremental: true, rect };
        assert_eq!(read(&[3, 1, 0, 1, 0, 2, 2, 128, 1, 224]).unwrap(), update);
        assert_eq!(read(&[4, 1, 0, 0, 0, 0, 0xff, 0x0d]).unwrap(), Message::Key { down: true, keysym: 0xff0d });
        assert_eq!(read(&[5, 4, 1, 0, 0, 9]).unwrap(), Message::Pointer { buttons: 4, x: 256, y: 9 });
        assert_eq!(read(&[2, 0, 0, 2, 0, 0, 0, 7, 255, 255, 255, 33]).unwrap(), Message::SetEncodings(vec![7, -223]));
        let key = [255, 0, 0, 1, 0, 0, 0, 0x61, 0, 0, 0, 0x1e];
        assert_eq!(read(&key).unwrap(), Message::ScanCode { down: true, keysym: 0x61, code: 0x1e });
        assert_eq!(read(&[6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']).unwrap(), Message::Other);
    }

    #[test]
    fn lengths_that_lie_cost_nothing() {
        assert!(matches!(read(&[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]), Err(Error::Text(_))));
        assert!(matches!(read(&[6, 0, 0, 0, 0x80, 0, 0, 0]), Err(Error::Text(_))));
        assert!(matches!(read(&[2, 0, 0xff, 0xff, 0, 0, 0, 1]), Err(Error::Io(_))));
        assert!(matches!(read(&[99]), Err(Error::Message(99))));
    }
}
