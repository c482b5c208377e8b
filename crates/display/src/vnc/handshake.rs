//! The beginning of a connection: versions, security, the screen's size (RFC 6143, 7.1 to 7.3).

use std::io::Write;
use std::time::Duration;

use super::pixel::OFFERED;
use super::protocol::{Error, bytes};
use super::security::Password;
use super::stream::Stream;

const VERSION: &[u8; 12] = b"RFB 003.008\n";

/// Security types, and results.
const NONE: u8 = 1;
const VNC: u8 = 2;
const OK: u32 = 0;
const FAILED: u32 = 1;

/// What the viewers' windows are called.
const NAME: &[u8] = b"Ringer";

/// How long each answer may take, and how long an answer to a wrong password takes.
const PATIENCE: Duration = Duration::from_secs(20);
const PUNISHMENT: Duration = Duration::from_secs(1);

/// Agrees on a version, and lets in whoever may come in.
pub fn greet(mut stream: &Stream, password: Option<&Password>) -> Result<(), Error> {
    stream.set_timeout(Some(PATIENCE))?;
    stream.write_all(VERSION)?;
    let minor = minor(bytes(&mut stream)?)?;
    let kind = if password.is_some() { VNC } else { NONE };
    if minor < 7 {
        stream.write_all(&u32::from(kind).to_be_bytes())?;
    } else {
        stream.write_all(&[1, kind])?;
        let [chosen] = bytes(&mut stream)?;
        if chosen != kind {
            return Err(Error::Security(chosen));
        }
    }
    if let Some(password) = password {
        if !password.check(&mut stream)? {
            std::thread::sleep(PUNISHMENT);
            stream.write_all(&FAILED.to_be_bytes())?;
            if minor >= 8 {
                let reason = b"wrong password";
                stream.write_all(&(reason.len() as u32).to_be_bytes())?;
                stream.write_all(reason)?;
            }
            return Err(Error::Password);
        }
        stream.write_all(&OK.to_be_bytes())?;
    } else if minor >= 8 {
        stream.write_all(&OK.to_be_bytes())?;
    }
    Ok(())
}

/// The minor version to go by: 3, 7 or 8.
fn minor(answer: [u8; 12]) -> Result<u32, Error> {
    let text = String::from_utf8_lossy(&answer).trim_end().to_owned();
    let numbers = text.strip_prefix("RFB ").and_then(|numbers| numbers.split_once('.'));
    let parsed = numbers.and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?)));
    match parsed {
        Some((3, 8..)) | Some((4.., _)) => Ok(8),
        Some((3, 7)) => Ok(7),
        // Versions that were never published are 3.3.
        Some((3, _)) => Ok(3),
        _ => Err(Error::Version(text.escape_default().to_string())),
    }
}

/// Tells the viewer what it will see. Whether it wants to be alone is not asked: nobody can send others away.
pub fn introduce(mut stream: &Stream, (width, height): (usize, usize)) -> Result<(), Error> {
    let [_shared] = bytes(&mut stream)?;
    let mut out = Vec::new();
    out.extend((width as u16).to_be_bytes());
    out.extend((height as u16).to_be_bytes());
    out.extend(OFFERED.bytes());
    out.extend((NAME.len() as u32).to_be_bytes());
    out.extend(NAME);
    stream.write_all(&out)?;
    stream.set_timeout(None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_for_the_nearest_published_one() {
        let versions = [
            (b"RFB 003.003\n", Some(3)),
            (b"RFB 003.005\n", Some(3)),
            (b"RFB 003.007\n", Some(7)),
            (b"RFB 003.008\n", Some(8)),
            (b"RFB 003.889\n", Some(8)),
            (b"RFB 005.000\n", Some(8)),
            (b"RFB 002.002\n", None),
            (b"GET / HTTP/1", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (answer, expected) in versions {
            assert_eq!(minor(*answer).ok(), expected);
        }
    }
}
