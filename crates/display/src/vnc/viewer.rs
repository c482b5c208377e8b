//! One viewer: a thread that reads what it says, and one that writes what it asked for.
//!
//! Between them is a little state of bounded size: the viewer's settings, its request, its damage, and the newest frame.
//! A viewer that does not read holds up nobody but its own writer, which gives up on it after a while.

use std::io::{BufReader, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::damage::Damage;
use super::encode::{self, Encoder, Encoding};
use super::handshake;
use super::keyboard::Keys;
use super::pixel::{Converter, OFFERED, PixelFormat, color_map};
use super::protocol::{Error, Message, Rect};
use super::screen::Screen;
use super::security::Password;
use super::stream::Stream;
use crate::Frame;

/// Pseudo-encodings.
const CURSOR: i32 = -239;
const DESKTOP_SIZE: i32 = -223;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
const QEMU_KEYS: i32 = -258;
const QEMU_LEDS: i32 = -261;
const LEVELS: std::ops::RangeInclusive<i32> = -256..=-247;

/// Server messages.
const UPDATE: u8 = 0;
const SET_COLOR_MAP: u8 = 1;

/// Bytes of an update that are collected before they are written.
const CHUNK: usize = 64 << 10;

const EVERYTHING: Rect = Rect { x: 0, y: 0, width: 1 << 16, height: 1 << 16 };

/// What the viewer has said it understands.
#[derive(Clone, Copy)]
struct Abilities {
    encoding: Encoding,
    level: Option<u32>,
    cursor: bool,
    desktop_size: bool,
    extended_desktop_size: bool,
    keys: bool,
    leds: bool,
}

const FEWEST: Abilities = Abilities {
    encoding: Encoding::Raw,
    level: None,
    cursor: false,
    desktop_size: false,
    extended_desktop_size: false,
    keys: false,
    leds: false,
};

struct State {
    frame: Arc<Frame>,
    damage: Damage,
    /// The viewer waits for an update of this part.
    request: Option<Rect>,
    format: PixelFormat,
    /// The viewer is to be sent the colour map.
    color_map: bool,
    abilities: Abilities,
    /// Which of its new abilities the viewer has yet to be told about.
    news: Abilities,
    /// The lights of the keyboard.
    leds: u8,
    closed: bool,
}

pub struct Viewer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Viewer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a new frame, which differs in `damage`.
    pub fn update(&self, frame: &Arc<Frame>, damage: &Damage) {
        let mut state = self.lock();
        state.frame = frame.clone();
        state.damage.add(damage);
        drop(state);
        self.changed.notify_all();
    }

    /// The lights of the keyboard are these now.
    pub fn set_leds(&self, leds: u8) {
        let mut state = self.lock();
        if state.leds != leds {
            state.leds = leds;
            state.news.leds = state.abilities.leds;
            self.changed.notify_all();
        }
    }

    /// Whether it has asked for something that has not come.
    pub fn waits(&self) -> bool {
        self.lock().request.is_some()
    }

    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Serves one viewer until it leaves. Runs on the viewer's own thread.
pub fn serve(stream: &Stream, password: Option<&Password>, screen: &Screen) -> Result<(), Error> {
    handshake::greet(stream, password)?;
    let frame = screen.current();
    let size = frame.size();
    handshake::introduce(stream, size)?;
    let viewer = Arc::new(Viewer {
        state: Mutex::new(State {
            damage: Damage::all(size),
            frame,
            request: None,
            format: OFFERED,
            color_map: false,
            abilities: FEWEST,
            news: FEWEST,
            leds: screen.desktop.leds(),
            closed: false,
        }),
        changed: Condvar::new(),
    });
    screen.add(&viewer);
    std::thread::scope(|scope| {
        let writing = wake::thread("vnc-writer").spawn_scoped(scope, || {
            let mut writer = Writer { stream, viewer: &viewer, size, encoder: Encoder::new(), out: Vec::new() };
            let result = writer.run();
            // The reader is to leave, too.
            stream.shutdown();
            result
        })?;
        let result = read(stream, &viewer, screen);
        viewer.close();
        stream.shutdown();
        // What the writer met is most often that the reader was right to leave.
        _ = writing.join();
        result
    })
}

/// Reads messages until the viewer leaves or is wrong.
fn read(stream: &Stream, viewer: &Viewer, screen: &Screen) -> Result<(), Error> {
    let mut from = BufReader::new(stream);
    let mut keys = Keys::new(screen.desktop.as_ref());
    loop {
        match Message::read(&mut from)? {
            Message::SetPixelFormat(format) => {
                let mut state = viewer.lock();
                state.format = format;
                state.color_map = !format.true_color;
            }
            Message::SetEncodings(encodings) => {
                let mut state = viewer.lock();
                let abilities = abilities(&encodings);
                state.news = abilities;
                state.abilities = abilities;
                drop(state);
                viewer.changed.notify_all();
            }
            Message::UpdateRequest { incremental, rect } => {
                screen.refresh();
                let mut state = viewer.lock();
                if !incremental {
                    state.damage.add_rect(&rect);
                }
                state.request = Some(match state.request {
                    Some(other) if other != rect => EVERYTHING,
                    _ => rect,
                });
                drop(state);
                viewer.changed.notify_all();
                screen.want();
            }
            Message::Key { down, keysym } => keys.symbol(keysym, down),
            Message::ScanCode { down, keysym, code } => keys.code(code, keysym, down),
            Message::Pointer { buttons, x, y } => {
                let size = viewer.lock().frame.size();
                screen.desktop.pointer(usize::from(x).min(size.0), usize::from(y).min(size.1), buttons);
            }
            Message::Other => {}
        }
    }
}

/// The first of the encodings named that there is; and the pseudo-encodings among them.
fn abilities(encodings: &[i32]) -> Abilities {
    let known = |number: &i32| Encoding::ALL.into_iter().find(|encoding| *encoding as i32 == *number);
    let has = |wanted| encodings.contains(&wanted);
    Abilities {
        encoding: encodings.iter().find_map(known).unwrap_or(Encoding::Raw),
        level: encodings.iter().find(|number| LEVELS.contains(number)).map(|number| (number - LEVELS.start()) as u32),
        cursor: has(CURSOR),
        desktop_size: has(DESKTOP_SIZE),
        extended_desktop_size: has(EXTENDED_DESKTOP_SIZE),
        keys: has(QEMU_KEYS),
        leds: has(QEMU_LEDS),
    }
}

/// What the writer is to send.
struct Work {
    frame: Arc<Frame>,
    rects: Vec<Rect>,
    format: PixelFormat,
    color_map: bool,
    abilities: Abilities,
    news: Abilities,
    leds: u8,
}

struct Writer<'a> {
    stream: &'a Stream,
    viewer: &'a Viewer,
    /// The screen as the viewer knows it.
    size: (usize, usize),
    encoder: Encoder,
    out: Vec<u8>,
}

impl Writer<'_> {
    fn run(&mut self) -> Result<(), Error> {
        let mut converter = Converter::new(OFFERED);
        while let Some(work) = self.next() {
            if converter.format != work.format {
                converter = Converter::new(work.format);
            }
            if let Some(level) = work.abilities.level {
                self.encoder.set_level(level);
            }
            self.send(&work, &converter)?;
        }
        Ok(())
    }

    /// Waits for something to send. None: leave.
    fn next(&mut self) -> Option<Work> {
        let mut state = self.viewer.lock();
        loop {
            if state.closed {
                return None;
            }
            let resized = self.follows(&state.abilities) && state.frame.size() != self.size;
            let told = state.news.cursor || state.news.keys || state.news.extended_desktop_size || state.news.leds;
            if let Some(request) = state.request {
                if resized {
                    state.damage = Damage::all(state.frame.size());
                }
                let request = if resized { EVERYTHING } else { request };
                let rects = state.damage.take(&request);
                if resized || told || !rects.is_empty() {
                    state.request = None;
                    return Some(Work {
                        frame: state.frame.clone(),
                        rects,
                        format: state.format,
                        color_map: std::mem::take(&mut state.color_map),
                        abilities: state.abilities,
                        news: std::mem::replace(&mut state.news, FEWEST),
                        leds: state.leds,
                    });
                }
            }
            state = self.viewer.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the viewer can follow a change of size.
    fn follows(&self, abilities: &Abilities) -> bool {
        abilities.desktop_size || abilities.extended_desktop_size
    }

    fn send(&mut self, work: &Work, converter: &Converter) -> Result<(), Error> {
        self.out.clear();
        if work.color_map {
            self.out.extend([SET_COLOR_MAP, 0, 0, 0, 1, 0]);
            self.out.extend(color_map().flatten().flat_map(u16::to_be_bytes));
        }
        let resized = self.follows(&work.abilities) && work.frame.size() != self.size;
        if resized {
            self.size = work.frame.size();
        }
        let rects = encode::split(&self.clipped(&work.rects));
        let mut extras = Vec::new();
        let mut count = rects.len();
        let mut extra = |rect: Rect, encoding, body: &[u8]| {
            encode::header(&rect, encoding, &mut extras);
            extras.extend(body);
            count += 1;
        };
        let (width, height) = self.size;
        let nothing = Rect { x: 0, y: 0, width: 0, height: 0 };
        if work.abilities.extended_desktop_size && (resized || work.news.extended_desktop_size) {
            // One screen with number 0, as large as everything; the reason is the server's own.
            let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            body.extend([width, height].iter().flat_map(|n| (*n as u16).to_be_bytes()));
            body.extend([0; 4]);
            extra(Rect { x: 0, y: 0, width, height }, EXTENDED_DESKTOP_SIZE, &body);
        } else if resized {
            extra(Rect { x: 0, y: 0, width, height }, DESKTOP_SIZE, &[]);
        }
        if work.news.keys {
            extra(nothing, QEMU_KEYS, &[]);
        }
        if work.news.leds {
            extra(nothing, QEMU_LEDS, &[work.leds]);
        }
        if work.news.cursor {
            let (hot, body) = cursor(converter);
            extra(hot, CURSOR, &body);
        }
        self.out.extend([UPDATE, 0]);
        self.out.extend(u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
        self.out.extend(extras);
        for rect in &rects {
            self.encoder.encode(work.abilities.encoding, &work.frame, rect, converter, &mut self.out);
            if self.out.len() >= CHUNK {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Error> {
        let mut stream = self.stream;
        stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// The parts of rectangles that the viewer's idea of the screen has room for.
    fn clipped(&self, rects: &[Rect]) -> Vec<Rect> {
        let (width, height) = self.size;
        let inside = rects.iter().filter(|rect| rect.x < width && rect.y < height);
        inside
            .map(|rect| Rect {
                width: rect.width.min(width - rect.x),
                height: rect.height.min(height - rect.y),
                ..*rect
            })
            .collect()
    }
}

/// A small arrow, so that the viewer's pointer is seen where the guest shows none: its hot spot and size, and its pixels
/// and mask.
fn cursor(converter: &Converter) -> (Rect, Vec<u8>) {
    const ARROW: [&str; 12] = [
        "#       ", "##      ", "#.#     ", "#..#    ", "#...#   ", "#....#  ", "#.....# ", "#......#", "#...####",
        "#.##    ", "##      ", "#       ",
    ];
    let mut body = Vec::new();
    for byte in ARROW.iter().flat_map(|row| row.bytes()) {
        converter.put(if byte == b'.' { 0xff_ffff } else { 0 }, &mut body);
    }
    for row in ARROW {
        body.push(row.bytes().fold(0, |bits, byte| bits << 1 | u8::from(byte != b' ')));
    }
    (Rect { x: 0, y: 0, width: 8, height: ARROW.len() }, body)
}
