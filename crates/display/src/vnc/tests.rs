//! The server as viewers meet it: friendly ones of every version, and those that lie, push or don't read.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::*;

/// A screen of one colour, and a note of what viewers do.
struct Board {
    /// Width and height in the upper, the colour in the lower part.
    size: Mutex<(usize, usize)>,
    color: AtomicU32,
    draws: AtomicU32,
    keys: Mutex<Sender<(u8, bool)>>,
    pointers: Mutex<Sender<(usize, usize, u8)>>,
}

impl Desktop for Board {
    fn draw(&self, frame: &mut Frame) -> bool {
        self.draws.fetch_add(1, Ordering::SeqCst);
        let (width, height) = *self.size.lock().unwrap();
        frame.resize(width, height);
        frame.fill(self.color.load(Ordering::SeqCst));
        true
    }

    fn key(&self, code: u8, down: bool) {
        _ = self.keys.lock().unwrap().send((code, down));
    }

    fn pointer(&self, x: usize, y: usize, buttons: u8) {
        _ = self.pointers.lock().unwrap().send((x, y, buttons));
    }

    fn leds(&self) -> u8 {
        2
    }
}

struct Bench {
    board: Arc<Board>,
    server: Server,
    keys: Receiver<(u8, bool)>,
    pointers: Receiver<(usize, usize, u8)>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Bench {
    fn new(password: Option<&[u8]>) -> Self {
        let ((key_sender, keys), (pointer_sender, pointers)) = (channel(), channel());
        let board = Arc::new(Board {
            size: Mutex::new((100, 50)),
            color: AtomicU32::new(0x10_2030),
            draws: AtomicU32::new(0),
            keys: Mutex::new(key_sender),
            pointers: Mutex::new(pointer_sender),
        });
        let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
        let server = Server::start(&address, password.map(Password::new), board.clone()).unwrap();
        Bench { board, server, keys, pointers }
    }

    fn connect(&self) -> Viewer {
        let Address::Tcp(address) = self.server.address() else { unreachable!() };
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Viewer(stream)
    }

    /// A viewer that has been introduced.
    fn viewer(&self) -> Viewer {
        let mut viewer = self.connect();
        viewer.greet(b"RFB 003.008\n");
        assert_eq!(viewer.read::<2>(), [1, 1]);
        viewer.write(&[1]);
        assert_eq!(viewer.read::<4>(), [0; 4]);
        viewer.introduce();
        viewer
    }

    fn keys(&self, count: usize) -> Vec<(u8, bool)> {
        (0..count).map(|_| self.keys.recv_timeout(PATIENCE).unwrap()).collect()
    }
}

/// The other end, byte by byte.
struct Viewer(TcpStream);

impl Viewer {
    fn read<const N: usize>(&mut self) -> [u8; N] {
        let mut data = [0; N];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    fn write(&mut self, data: &[u8]) {
        self.0.write_all(data).unwrap();
    }

    fn greet(&mut self, version: &[u8]) {
        assert_eq!(&self.read::<12>(), b"RFB 003.008\n");
        self.write(version);
    }

    /// Returns width and height.
    fn introduce(&mut self) -> (u16, u16) {
        self.write(&[1]);
        let [w0, w1, h0, h1] = self.read();
        assert_eq!(self.read::<16>(), pixel::OFFERED.bytes());
        let mut name = vec![0; u32::from_be_bytes(self.read()) as usize];
        self.0.read_exact(&mut name).unwrap();
        assert_eq!(name, b"Ringer");
        (u16::from_be_bytes([w0, w1]), u16::from_be_bytes([h0, h1]))
    }

    fn set_encodings(&mut self, encodings: &[i32]) {
        self.write(&[2, 0, 0, encodings.len() as u8]);
        encodings.iter().for_each(|encoding| self.write(&encoding.to_be_bytes()));
    }

    fn request(&mut self, incremental: bool) {
        self.write(&[3, u8::from(incremental), 0, 0, 0, 0, 0x7f, 0xff, 0x7f, 0xff]);
    }

    /// The header of an update: the number of rectangles.
    fn update(&mut self) -> u16 {
        let [kind, _, high, low] = self.read();
        assert_eq!(kind, 0);
        u16::from_be_bytes([high, low])
    }

    /// A rectangle's place and size, and its encoding.
    fn rect(&mut self) -> ([u16; 4], i32) {
        let data: [u8; 8] = self.read();
        let encoding = i32::from_be_bytes(self.read());
        (std::array::from_fn(|n| u16::from_be_bytes([data[2 * n], data[2 * n + 1]])), encoding)
    }

    /// The pixels of a raw rectangle.
    fn pixels(&mut self, [_, _, width, height]: [u16; 4]) -> Vec<u32> {
        let mut data = vec![0; usize::from(width) * usize::from(height) * 4];
        self.0.read_exact(&mut data).unwrap();
        data.chunks(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    /// Whether the server has closed the connection, having said this before.
    fn closed(&mut self) -> Option<Vec<u8>> {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => Some(rest),
            // What it had not read yet resets the connection.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Some(rest),
            Err(_) => None,
        }
    }
}

#[test]
fn viewers_of_every_version_see_the_screen() {
    let bench = Bench::new(None);
    for version in [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n"] {
        let mut viewer = bench.connect();
        viewer.greet(version);
        if version[10] == b'3' {
            assert_eq!(viewer.read::<4>(), [0, 0, 0, 1]);
        } else {
            assert_eq!(viewer.read::<2>(), [1, 1]);
            viewer.write(&[1]);
        }
        if version[10] == b'8' {
            assert_eq!(viewer.read::<4>(), [0; 4]);
        }
        assert_eq!(viewer.introduce(), (100, 50));
        viewer.request(false);
        assert_eq!(viewer.update(), 1);
        let (rect, encoding) = viewer.rect();
        assert_eq!((rect, encoding), ([0, 0, 100, 50], 0));
        assert!(viewer.pixels(rect).iter().all(|pixel| *pixel == 0x10_2030));
    }
}

#[test]
fn only_who_knows_the_password_comes_in() {
    let bench = Bench::new(Some(b"secret"));
    let answer = |viewer: &mut Viewer, password: &[u8]| {
        viewer.greet(b"RFB 003.008\n");
        assert_eq!(viewer.read::<2>(), [1, 2]);
        viewer.write(&[2]);
        let answer = Password::new(password).answer(viewer.read());
        viewer.write(&answer);
        u32::from_be_bytes(viewer.read())
    };
    let mut viewer = bench.connect();
    assert_eq!(answer(&mut viewer, b"secret"), 0);
    assert_eq!(viewer.introduce(), (100, 50));
    let mut viewer = bench.connect();
    assert_eq!(answer(&mut viewer, b"Secret"), 1);
    assert!(viewer.closed().unwrap().ends_with(b"wrong password"));
    let mut viewer = bench.connect();
    viewer.greet(b"RFB 003.008\n");
    viewer.read::<2>();
    viewer.write(&[1]);
    assert_eq!(viewer.closed(), Some(vec![]), "nobody is let in without being asked");
}

#[test]
fn changes_come_when_they_are_asked_for() {
    let bench = Bench::new(None);
    let mut viewer = bench.viewer();
    viewer.request(false);
    viewer.update();
    let (rect, _) = viewer.rect();
    viewer.pixels(rect);
    viewer.request(true);
    bench.board.color.store(0xff_0000, Ordering::SeqCst);
    assert_eq!(viewer.update(), 1);
    let (rect, _) = viewer.rect();
    assert!(viewer.pixels(rect).iter().all(|pixel| *pixel == 0xff_0000));
    // What has changed while nobody asked is there when somebody does.
    std::thread::sleep(Duration::from_millis(100));
    bench.board.color.store(0x00_00ff, Ordering::SeqCst);
    viewer.request(false);
    assert_eq!(viewer.update(), 1);
    let (rect, _) = viewer.rect();
    assert!(viewer.pixels(rect).iter().all(|pixel| *pixel == 0x00_00ff));
    // Nobody asks, so nobody draws.
    std::thread::sleep(Duration::from_millis(100));
    let draws = bench.board.draws.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(bench.board.draws.load(Ordering::SeqCst), draws);
}

#[test]
fn a_new_size_is_told_to_those_who_can_follow() {
    for encoding in [-223, -308] {
        let bench = Bench::new(None);
        let (mut viewer, mut fixed) = (bench.viewer(), bench.viewer());
        viewer.set_encodings(&[0, encoding]);
        viewer.request(false);
        let count = viewer.update();
        for _ in 0..count {
            match viewer.rect() {
                (rect, 0) => _ = viewer.pixels(rect),
                (_, other) => {
                    assert_eq!(other, -308);
                    viewer.read::<20>();
                }
            }
        }
        *bench.board.size.lock().unwrap() = (300, 200);
        viewer.request(true);
        assert_eq!(viewer.update(), 2);
        assert_eq!(viewer.rect(), ([0, 0, 300, 200], encoding));
        if encoding == -308 {
            assert_eq!(viewer.read::<4>(), [1, 0, 0, 0]);
            assert_eq!(viewer.read::<16>()[8..12], [1, 44, 0, 200]);
        }
        let (rect, _) = viewer.rect();
        assert_eq!(rect, [0, 0, 300, 200]);
        assert!(viewer.pixels(rect).iter().all(|pixel| *pixel == 0x10_2030));
        // The other one sees what fits.
        fixed.request(false);
        assert_eq!(fixed.update(), 1);
        assert_eq!(fixed.rect().0, [0, 0, 100, 50]);
    }
}

#[test]
fn keys_and_pointer_reach_the_desktop() {
    let bench = Bench::new(None);
    let mut viewer = bench.viewer();
    viewer.write(&[4, 1, 0, 0, 0, 0, 0, b'a', 4, 0, 0, 0, 0, 0, 0, b'a']);
    assert_eq!(bench.keys(2), [(0x1e, true), (0x1e, false)]);
    // A capital brings its shift, unless the viewer holds one.
    viewer.write(&[4, 1, 0, 0, 0, 0, 0, b'A', 4, 0, 0, 0, 0, 0, 0, b'A']);
    assert_eq!(bench.keys(4), [(0x2a, true), (0x1e, true), (0x2a, false), (0x1e, false)]);
    viewer.write(&[4, 1, 0, 0, 0, 0, 0xff, 0xe2, 4, 1, 0, 0, 0, 0, 0, b'A']);
    assert_eq!(bench.keys(2), [(0x36, true), (0x1e, true)]);
    viewer.write(&[255, 0, 0, 1, 0, 0, 0xff, 0x52, 0, 0, 0, 0xc8]);
    assert_eq!(bench.keys(1), [(0xc8, true)]);
    viewer.write(&[5, 1, 0, 10, 0, 20, 5, 0, 0xff, 0xff, 0, 0]);
    assert_eq!(bench.pointers.recv_timeout(PATIENCE), Ok((10, 20, 1)));
    assert_eq!(bench.pointers.recv_timeout(PATIENCE), Ok((100, 0, 0)));
    // A viewer that leaves lets go of what it holds.
    drop(viewer);
    let mut released = bench.keys(3);
    released.sort_unstable();
    assert_eq!(released, [(0x1e, false), (0x36, false), (0xc8, false)]);
}

#[test]
fn lights_and_extensions_are_told() {
    let bench = Bench::new(None);
    let mut viewer = bench.viewer();
    viewer.set_encodings(&[0, -258, -261, -239]);
    viewer.request(false);
    assert_eq!(viewer.update(), 4);
    assert_eq!(viewer.rect().1, -258);
    assert_eq!((viewer.rect().1, viewer.read::<1>()), (-261, [2]));
    let ([_, _, width, height], encoding) = viewer.rect();
    assert_eq!((width, height, encoding), (8, 12, -239));
}

#[test]
fn who_lies_is_turned_away_and_others_are_not() {
    let bench = Bench::new(None);
    let mut friend = bench.viewer();
    let lies: [&[u8]; 5] = [
        &[99],
        &[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff],
        &[0, 0, 0, 0, 24, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 8, 16, 0, 0, 0],
        &[255, 9],
        &[0xff; 64],
    ];
    for lie in lies {
        let mut viewer = bench.viewer();
        viewer.write(lie);
        assert!(viewer.closed().is_some(), "{lie:?}");
    }
    for version in [b"GET / HTTP/1", b"RFB 000.000\n"] {
        let mut viewer = bench.connect();
        viewer.greet(version);
        assert!(viewer.closed().is_some());
    }
    // Rectangles that no screen has are no error.
    friend.write(&[3, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    friend.request(false);
    assert_eq!(friend.update(), 1);
}

#[test]
fn who_does_not_read_holds_up_nobody() {
    let bench = Bench::new(None);
    *bench.board.size.lock().unwrap() = (2000, 1500);
    let mut asleep = bench.viewer();
    for _ in 0..50 {
        asleep.request(false);
    }
    let mut viewer = bench.viewer();
    let start = Instant::now();
    for color in 0..5 {
        bench.board.color.store(color, Ordering::SeqCst);
        viewer.request(false);
        for _ in 0..viewer.update() {
            let (rect, _) = viewer.rect();
            viewer.pixels(rect);
        }
    }
    assert!(start.elapsed() < PATIENCE);
    let start = Instant::now();
    drop(bench);
    assert!(start.elapsed() < PATIENCE, "the server ends while a viewer sleeps");
}

#[test]
fn there_is_room_for_sixteen() {
    let bench = Bench::new(None);
    let mut viewers: Vec<_> = (0..MAX_VIEWERS).map(|_| bench.viewer()).collect();
    assert_eq!(bench.connect().closed(), Some(vec![]));
    viewers.pop();
    let start = Instant::now();
    loop {
        let mut viewer = bench.connect();
        let mut version = [0; 12];
        if viewer.0.read_exact(&mut version).is_ok() {
            break;
        }
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn a_unix_socket_goes_with_its_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("screen");
    let bench = Bench::new(None);
    // One that a process left behind is in nobody's way.
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::start(&Address::Unix(path.clone()), None, bench.board.clone()).unwrap();
    let mut version = [0; 12];
    UnixStream::connect(&path).unwrap().read_exact(&mut version).unwrap();
    assert_eq!(&version, b"RFB 003.008\n");
    assert!(Server::start(&Address::Unix(path.clone()), None, bench.board.clone()).is_err(), "it is in use");
    drop(server);
    assert!(!path.exists());
}
