//! Who may look: nobody is asked, or a password proves itself (RFC 6143, 7.2).

use std::fmt;
use std::io;

use des::Des;
use des::cipher::{Array, BlockCipherEncrypt, KeyInit};

/// What VNC authentication uses of a password.
pub const MAX_PASSWORD: usize = 8;

const CHALLENGE: usize = 16;

/// A password. It shows itself nowhere.
#[derive(Clone)]
pub struct Password([u8; MAX_PASSWORD]);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password")
    }
}

impl Password {
    /// The first eight bytes of `text` count.
    pub fn new(text: &[u8]) -> Self {
        let mut key = [0; MAX_PASSWORD];
        key.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
        Password(key)
    }

    /// The answer that proves the password: the challenge under DES, whose key has the bits of each byte mirrored.
    pub(super) fn answer(&self, challenge: [u8; CHALLENGE]) -> [u8; CHALLENGE] {
        let cipher = Des::new(&Array(self.0.map(u8::reverse_bits)));
        let mut answer = challenge;
        let (blocks, _) = answer.as_chunks_mut::<8>();
        for block in blocks {
            let mut data = Array(*block);
            cipher.encrypt_block(&mut data);
            *block = data.0;
        }
        answer
    }

    /// Asks for the password and says whether the answer is right.
    pub fn check(&self, stream: &mut (impl io::Read + io::Write)) -> io::Result<bool> {
        let mut challenge = [0; CHALLENGE];
        let mut filled = 0;
        while let Some(rest) = challenge.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
        }
        stream.write_all(&challenge)?;
        let mut answer = [0; CHALLENGE];
        stream.read_exact(&mut answer)?;
        // All of it is compared, so that time tells nothing.
        Ok(self.answer(challenge).iter().zip(answer).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 64-bit example of FIPS 81 with the key's bits mirrored.
    #[test]
    fn the_answer_is_des_with_mirrored_key_bits() {
        let key = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].map(u8::reverse_bits);
        let mut challenge = [0; CHALLENGE];
        challenge[..8].copy_from_slice(b"Now is t");
        challenge[8..].copy_from_slice(b"he time ");
        let expected = [0x3f, 0xa4, 0x0e, 0x8a, 0x98, 0x4d, 0x48, 0x15, 0x6a, 0x27, 0x17, 0x87, 0xab, 0x88, 0x83, 0xf9];
        assert_eq!(Password(key).answer(challenge), expected);
    }

    #[test]
    fn only_eight_bytes_of_a_password_count() {
        assert_eq!(Password::new(b"12345678901").0, *b"12345678");
        assert_eq!(Password::new(b"ab").0, *b"ab\0\0\0\0\0\0");
        assert_eq!(format!("{:?}", Password::new(b"secret")), "Password");
    }
}
