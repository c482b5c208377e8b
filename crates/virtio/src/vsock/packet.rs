//! Packets of the socket device (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The context identifier by which a guest knows its host.
pub const HOST: u64 = 2;
/// The only type of socket that we have (5.10.6.2).
pub const STREAM: u16 = 1;

/// Flags of [`Operation::Shutdown`]: the sender of the packet will receive, or send, no more.
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

/// What a packet does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    ReadWrite = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn from_number(number: u16) -> Option<Self> {
        use Operation::*;
        [Request, Response, Reset, Shutdown, ReadWrite, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|operation| *operation as u16 == number)
    }
}

/// A packet without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub source: u64,
    pub destination: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub kind: u16,
    /// `None`: not one that we know.
    pub operation: Option<Operation>,
    pub flags: u32,
    /// What the sender can take in all, and has handed on so far (5.10.6.3).
    pub buffer: u32,
    pub forwarded: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let number = |offset: usize, length: usize| {
            let bytes = bytes.get(offset..offset + length).unwrap_or_default();
            bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        Header {
            source: number(0, 8),
            destination: number(8, 8),
            source_port: number(16, 4) as u32,
            destination_port: number(20, 4) as u32,
            length: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            operation: Operation::from_number(number(30, 2) as u16),
            flags: number(32, 4) as u32,
            buffer: number(36, 4) as u32,
            forwarded: number(40, 4) as u32,
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let fields = (self.source.to_le_bytes().into_iter())
            .chain(self.destination.to_le_bytes())
            .chain(self.source_port.to_le_bytes())
            .chain(self.destination_port.to_le_bytes())
            .chain(self.length.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.operation.map_or(0, |operation| operation as u16).to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buffer.to_le_bytes())
            .chain(self.forwarded.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_what_they_were_when_read_back() {
        let bytes: [u8; HEADER] = std::array::from_fn(|n| {
            if n == 30 {
                5
            } else if n == 31 {
                0
            } else {
                n as u8
            }
        });
        let header = Header::parse(&bytes);
        assert_eq!((header.source, header.source_port), (0x0706_0504_0302_0100, 0x1312_1110));
        assert_eq!(header.operation, Some(Operation::ReadWrite));
        assert_eq!(header.to_bytes(), bytes);
    }
}
