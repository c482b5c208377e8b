//! Files of the host by TFTP.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::time::Duration;

use super::guest::{GUEST6, Guest};
use super::udp::{from_guest, read};

const SERVER: &str = "10.0.2.2:69";

struct Client {
    guest: Guest,
    address: String,
    directory: tempfile::TempDir,
}

impl Client {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("served");
        fs::create_dir(&path).unwrap();
        let guest = Guest::new(|config| {
            config.tftp = Some(path);
            config.restrict = true;
        });
        Client { guest, address: "10.0.2.15:2000".into(), directory }
    }

    fn file(&self, name: &str, data: &[u8]) {
        fs::write(self.directory.path().join("served").join(name), data).unwrap();
    }

    /// What comes of a datagram.
    fn say(&mut self, to: &str, payload: &[u8]) -> Vec<(SocketAddr, Vec<u8>)> {
        let frames = self.guest.raw(&from_guest(&self.address, to, payload));
        frames
            .iter()
            .filter(|frame| frame[12..14] != [0x86, 0xdd] || frame[20] != 58)
            .map(|frame| read(frame))
            .collect()
    }

    fn ask(&mut self, name: &str, options: &str) -> Vec<(SocketAddr, Vec<u8>)> {
        let request = [b"\0\x01", name.as_bytes(), b"\0octet\0", options.as_bytes()].concat();
        let server = if self.address.starts_with('[') { "[fd52:696e:6765:72::2]:69" } else { SERVER };
        self.say(server, &request)
    }

    fn acknowledge(&mut self, server: SocketAddr, block: u64) -> Vec<(SocketAddr, Vec<u8>)> {
        let [low, high] = (block as u16).to_le_bytes();
        self.say(&server.to_string(), &[0, 4, high, low])
    }

    /// Reads a file to its end. What the first answer says, and what is in the file.
    fn fetch(&mut self, name: &str, options: &str, block_size: usize) -> (Vec<u8>, Vec<u8>) {
        let mut answers = self.ask(name, options);
        let (server, first) = answers[0].clone();
        if first.starts_with(&[0, 6]) {
            answers = self.acknowledge(server, 0);
        }
        let (mut data, mut block) = (Vec::new(), 0);
        loop {
            assert!(!answers.is_empty(), "block {block} has no successor");
            for (from, message) in &answers {
                block += 1;
                assert_eq!((*from, &message[..4]), (server, &[0, 3, (block >> 8) as u8, block as u8][..]));
                data.extend_from_slice(&message[4..]);
            }
            let ends = answers.last().unwrap().1.len() - 4 < block_size;
            answers = self.acknowledge(server, block);
            if ends {
                assert!(answers.is_empty());
                return (first, data);
            }
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 251) as u8).collect()
}

#[test]
fn files_of_all_lengths_arrive_whole() {
    let mut client = Client::new();
    for length in [0, 1, 511, 512, 513, 1024, 40_000] {
        client.file("file", &pattern(length));
        assert_eq!(client.fetch("file", "", 512).1, pattern(length), "{length}");
    }
}

#[test]
fn options_are_agreed_upon() {
    let mut client = Client::new();
    client.file("file", &pattern(100_000));
    let (first, data) = client.fetch("/file", "tsize\x000\0blksize\x001432\0", 1432);
    assert_eq!(first, b"\0\x06blksize\x001432\0tsize\x00100000\0");
    assert!(data == pattern(100_000));
    let (first, data) = client.fetch("\\file", "windowsize\x008\0blksize\x009000\0timeout\x003\0", 1468);
    assert_eq!(first, b"\0\x06blksize\x001468\0timeout\x003\0windowsize\x008\0");
    assert!(data == pattern(100_000));
    client.address = format!("[{GUEST6}]:2000");
    let (first, data) = client.fetch("file", "blksize\x0065464\0", 1448);
    assert_eq!(first, b"\0\x06blksize\x001448\0");
    assert!(data == pattern(100_000));
}

#[test]
fn block_numbers_go_round() {
    let mut client = Client::new();
    client.file("file", &pattern(8 * 70_000 + 3));
    assert!(client.fetch("file", "blksize\x008\0windowsize\x0064\0", 8).1 == pattern(8 * 70_000 + 3));
}

#[test]
fn what_was_lost_is_sent_again_and_nothing_twice_without_need() {
    let mut client = Client::new();
    client.file("file", &pattern(5000));
    let server = client.ask("file", "windowsize\x004\0")[0].0;
    let sent = client.acknowledge(server, 0);
    assert_eq!(sent.len(), 4);
    assert!(client.acknowledge(server, 0).is_empty(), "it was under way");
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(client.acknowledge(server, 0), sent);
    // The third block of the window was lost (RFC 7440, 4).
    let rest = client.acknowledge(server, 2);
    assert_eq!((rest.len(), &rest[0].1[..4]), (4, &[0, 3, 0, 3][..]));
    assert!(client.acknowledge(server, 9).is_empty(), "that block was never sent");
    assert!(client.acknowledge(server, 1).is_empty(), "that one is long there");
    // The request again is a beginning.
    assert_eq!(client.ask("file", "")[0].1[..4], [0, 3, 0, 1]);
}

#[test]
fn nothing_outside_the_directory_is_read() {
    let mut client = Client::new();
    let outside = client.directory.path().join("secret");
    fs::write(&outside, "secret").unwrap();
    let served = client.directory.path().join("served");
    symlink(&outside, served.join("absolute")).unwrap();
    symlink("../secret", served.join("relative")).unwrap();
    symlink("/proc/self/root", served.join("magic")).unwrap();
    fs::create_dir(served.join("below")).unwrap();
    symlink("../inside", served.join("below/link")).unwrap();
    client.file("inside", b"inside");
    let absolute = outside.to_str().unwrap().to_owned();
    let names = ["../secret", "/../secret", "..\\secret", "below/../../secret", "absolute", "relative", "below", ""];
    for name in names.into_iter().chain([absolute.as_str(), "magic/etc/passwd", "/", "."]) {
        let answers = client.ask(name, "");
        assert!(answers.len() == 1 && answers[0].1.starts_with(&[0, 5]), "{name}: {answers:?}");
    }
    for name in ["below/../inside", "below/link", "//inside"] {
        assert_eq!(client.fetch(name, "", 512).1, b"inside", "{name}");
    }
}

#[test]
fn what_is_not_for_reading_is_refused() {
    let mut client = Client::new();
    client.file("file", b"data");
    let code = |answers: Vec<(SocketAddr, Vec<u8>)>| {
        let [(_, message)] = answers.as_slice() else { panic!("{answers:?}") };
        assert!(message[..2] == [0, 5] && message.ends_with(&[0]));
        message[3]
    };
    assert_eq!(code(client.ask("missing", "")), 1);
    assert_eq!(code(client.say(SERVER, b"\0\x02file\0octet\0")), 2);
    assert_eq!(code(client.say(SERVER, b"\0\x01file\0netascii\0")), 0);
    assert_eq!(code(client.say(SERVER, b"\0\x07")), 4);
    assert_eq!(code(client.say(SERVER, b"\0\x04\0\x01")), 5);
    assert!(client.say(SERVER, b"\0\x01file").is_empty());
    assert!(client.say(SERVER, b"\0\x05\0\x01no\0").is_empty());
    assert!(
        rustix::fs::mknodat(
            rustix::fs::CWD,
            client.directory.path().join("served/pipe"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0
        )
        .is_ok()
    );
    assert_eq!(code(client.ask("pipe", "")), 2);
}

#[test]
fn a_file_that_shrinks_ends_its_transfer() {
    let mut client = Client::new();
    client.file("file", &pattern(2000));
    let server = client.ask("file", "")[0].0;
    client.file("file", b"short");
    let answers = client.acknowledge(server, 1);
    assert!(answers[0].1.starts_with(&[0, 5]), "{answers:?}");
}

#[test]
fn transfers_are_few_however_many_begin() {
    let mut client = Client::new();
    client.file("file", &pattern(2000));
    let before = fs::read_dir("/proc/self/fd").unwrap().count();
    for port in 1024..3000 {
        client.address = format!("10.0.2.15:{port}");
        assert_eq!(client.ask("file", "").len(), 1);
    }
    let after = fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests of this process open some too.
    assert!(after < before + 500, "{before} {after}");
}

#[test]
fn a_directory_that_is_none_is_told() {
    let mut config = crate::UserConfig::new(super::guest::MAC);
    config.tftp = Some("/etc/passwd".into());
    let error = crate::UserNet::new(config).err().unwrap().to_string();
    assert!(error.contains("/etc/passwd") && error.contains("TFTP"), "{error}");
}
