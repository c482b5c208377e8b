//! What a TFTP client sends (RFC 1350, 5), taken apart. What contradicts the protocol is no message.

/// Opcodes.
const READ: u16 = 1;
const WRITE: u16 = 2;
const ACKNOWLEDGEMENT: u16 = 4;
const ERROR: u16 = 5;

/// The client takes or names the values that these options have (RFC 2347).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Bytes in a block, 8 to 65464 (RFC 2348).
    pub block_size: Option<u16>,
    /// Seconds until something is sent again, 1 to 255 (RFC 2349).
    pub timeout: Option<u8>,
    /// The length of the file is wanted (RFC 2349).
    pub size: bool,
    /// Blocks that are sent for one acknowledgement, from 1 on (RFC 7440).
    pub window: Option<u16>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    Read {
        name: &'a [u8],
        /// Unlike the other modes, this one changes no byte.
        octet: bool,
        options: Options,
    },
    Write,
    Acknowledge(u16),
    Error,
    /// Of a kind that no client sends.
    Unknown,
}

impl<'a> Message<'a> {
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let (opcode, rest) = payload.split_first_chunk()?;
        Some(match u16::from_be_bytes(*opcode) {
            READ => {
                let mut words = rest.strip_suffix(&[0])?.split(|byte| *byte == 0);
                let (name, mode) = (words.next()?, words.next()?);
                let mut options = Options::default();
                while let (Some(name), Some(value)) = (words.next(), words.next()) {
                    options.add(name, value);
                }
                Message::Read { name, octet: mode.eq_ignore_ascii_case(b"octet"), options }
            }
            WRITE => Message::Write,
            ACKNOWLEDGEMENT => Message::Acknowledge(u16::from_be_bytes(*rest.first_chunk()?)),
            ERROR => Message::Error,
            _ => Message::Unknown,
        })
    }
}

impl Options {
    /// An option that is not known or has no proper value is as if it had not been sent (RFC 2347).
    fn add(&mut self, name: &[u8], value: &[u8]) {
        let value: Option<u64> = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
        let Some(value) = value else { return };
        match name.to_ascii_lowercase().as_slice() {
            b"blksize" => self.block_size = u16::try_from(value).ok().filter(|size| (8..=65464).contains(size)),
            b"timeout" => self.timeout = u8::try_from(value).ok().filter(|seconds| *seconds > 0),
            b"tsize" => self.size = true,
            b"windowsize" => self.window = u16::try_from(value).ok().filter(|blocks| *blocks > 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_name_a_mode_and_options() {
        let request = b"\0\x01pxelinux.0\0OCTET\0BlkSize\x001432\0tsize\x000\0windowsize\x004\0timeout\x006\0x\0y\0";
        let options = Options { block_size: Some(1432), timeout: Some(6), size: true, window: Some(4) };
        assert_eq!(Message::parse(request), Some(Message::Read { name: b"pxelinux.0", octet: true, options }));
        let Some(Message::Read { octet, options, .. }) = Message::parse(b"\0\x01a\0netascii\0") else { panic!() };
        assert_eq!((octet, options), (false, Options::default()));
    }

    #[test]
    fn options_without_a_proper_value_are_none() {
        for option in ["blksize\x007", "blksize\x0065465", "blksize\0-1", "timeout\x000", "windowsize\x000", "tsize\0"]
        {
            let request = [b"\0\x01a\0octet\0", option.as_bytes(), b"\0"].concat();
            let Some(Message::Read { options, .. }) = Message::parse(&request) else { panic!("{option}") };
            assert_eq!(options, Options::default(), "{option}");
        }
    }

    #[test]
    fn what_is_cut_off_is_no_message() {
        for message in [&b""[..], b"\0", b"\0\x01", b"\0\x01name", b"\0\x01name\0", b"\0\x01name\0octet", b"\0\x04\0"] {
            assert_eq!(Message::parse(message), None, "{message:?}");
        }
        assert_eq!(Message::parse(b"\0\x04\x12\x34"), Some(Message::Acknowledge(0x1234)));
        assert_eq!(Message::parse(b"\0\x09"), Some(Message::Unknown));
    }
}
