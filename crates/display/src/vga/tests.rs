//! What software that sets a mode and writes memory sees on the screen.

use std::sync::atomic::{AtomicU64, Ordering};

use chipset::pci::PciFunction;

use super::*;

/// A clock that stands still until it is told to go.
#[derive(Default)]
struct FakeClock(AtomicU64);

impl Clock for FakeClock {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn utc(&self) -> u64 {
        self.now()
    }
}

/// The registers of a mode, as IBM's BIOS sets them (IBM VGA technical reference, "VGA register values").
struct Mode {
    miscellaneous: u8,
    sequencer: [u8; 4],
    crtc: [u8; 25],
    graphics: [u8; 9],
    attribute: [u8; 21],
}

#[rustfmt::skip]
const TEXT: Mode = Mode {
    miscellaneous: 0x67,
    sequencer: [0x00, 0x03, 0x00, 0x02],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e, 0x8f,
        0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x10, 0x0e, 0x00, 0xff],
    attribute: [
        0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0x00, 0x0f,
        0x08, 0x00,
    ],
};

#[rustfmt::skip]
const MODE_13: Mode = Mode {
    miscellaneous: 0x63,
    sequencer: [0x01, 0x0f, 0x00, 0x0e],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0xbf, 0x1f, 0x00, 0x41, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e, 0x8f,
        0x28, 0x40, 0x96, 0xb9, 0xa3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x40, 0x05, 0x0f, 0xff],
    attribute: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x41, 0x00, 0x0f, 0x00, 0x00],
};

#[rustfmt::skip]
const MODE_12: Mode = Mode {
    miscellaneous: 0xe3,
    sequencer: [0x01, 0x0f, 0x00, 0x06],
    crtc: [
        0x5f, 0x4f, 0x50, 0x82, 0x54, 0x80, 0x0b, 0x3e, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xea, 0x8c, 0xdf,
        0x28, 0x00, 0xe7, 0x04, 0xe3, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x00, 0x05, 0x0f, 0xff],
    attribute: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x01, 0x00, 0x0f, 0x00, 0x00],
};

#[rustfmt::skip]
const MODE_4: Mode = Mode {
    miscellaneous: 0x63,
    sequencer: [0x09, 0x03, 0x00, 0x02],
    crtc: [
        0x2d, 0x27, 0x28, 0x90, 0x2b, 0x80, 0xbf, 0x1f, 0x00, 0xc1, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9c, 0x8e, 0x8f,
        0x14, 0x00, 0x96, 0xb9, 0xa2, 0xff,
    ],
    graphics: [0, 0, 0, 0, 0, 0x30, 0x0f, 0x00, 0xff],
    attribute: [0, 2, 4, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0x01, 0x00, 0x03, 0x00, 0x00],
};

struct Bench {
    ram: Ram,
    clock: Arc<FakeClock>,
    vga: Arc<Vga>,
    ports: Ports,
    dispi: DispiPorts,
    window: Window,
}

impl Bench {
    fn new() -> Self {
        let (ram, clock) = (Ram::new(4 << 20).unwrap(), Arc::new(FakeClock::default()));
        let vga = Vga::new(&ram, clock.clone()).unwrap();
        let (ports, dispi, window) = (Ports(vga.clone()), DispiPorts(vga.clone()), Window(vga.clone()));
        Bench { ram, clock, vga, ports, dispi, window }
    }

    /// In a mode, with a palette in which colour `n` is a grey that says so.
    fn in_mode(mode: &Mode) -> Self {
        let bench = Self::new();
        bench.out(0x3c2, mode.miscellaneous);
        (1..).zip(mode.sequencer).for_each(|(index, value)| bench.indexed(0x3c4, index, value));
        bench.indexed(0x3d4, 0x11, 0);
        (0..).zip(mode.crtc).for_each(|(index, value)| bench.indexed(0x3d4, index, value));
        (0..).zip(mode.graphics).for_each(|(index, value)| bench.indexed(0x3ce, index, value));
        (0..).zip(mode.attribute).for_each(|(index, value)| bench.attribute(index, value));
        bench.out(0x3c0, 0x20);
        bench.out(0x3c8, 0);
        (0..=255u8).for_each(|n| (0..3).for_each(|_| bench.out(0x3c9, n >> 2)));
        bench
    }

    fn out(&self, port: u16, value: u8) {
        self.ports.write(u64::from(port - FIRST_PORT), &[value]);
    }

    fn input(&self, port: u16) -> u8 {
        let mut data = [0];
        self.ports.read(u64::from(port - FIRST_PORT), &mut data);
        data[0]
    }

    fn indexed(&self, port: u16, index: u8, value: u8) {
        self.out(port, index);
        self.out(port + 1, value);
    }

    fn attribute(&self, index: u8, value: u8) {
        self.input(0x3da);
        self.out(0x3c0, index);
        self.out(0x3c0, value);
        self.out(0x3c0, 0x20);
    }

    fn set_dispi(&self, registers: &[(u16, u16)]) {
        for (index, value) in registers {
            self.dispi.write(0, &index.to_le_bytes());
            self.dispi.write(1, &value.to_le_bytes());
        }
    }

    fn poke(&self, address: u64, data: &[u8]) {
        self.window.write(address - WINDOW, data);
    }

    fn draw(&self) -> Frame {
        let mut frame = Frame::default();
        self.vga.draw(&mut frame);
        frame
    }

    /// The time at which a blinking thing is in this phase, for frames of 70 Hz.
    fn at_frame(&self, frame: u64) {
        self.clock.0.store(frame * 14_270_000 + 1_000_000, Ordering::SeqCst);
    }

    /// Loads a font of one character.
    fn load_glyph(&self, character: u8, rows: [u8; 16]) {
        for (index, value) in [(2, 4), (4, 6)] {
            self.indexed(0x3c4, index, value);
        }
        for (index, value) in [(5, 0), (6, 5)] {
            self.indexed(0x3ce, index, value);
        }
        self.poke(WINDOW + u64::from(character) * 32, &rows);
        for (index, value) in [(2, 3), (4, 2)] {
            self.indexed(0x3c4, index, value);
        }
        for (index, value) in [(5, 0x10), (6, 0x0e)] {
            self.indexed(0x3ce, index, value);
        }
    }
}

/// What the palette of [`Bench::in_mode`] shows for a colour, which loses its lowest bits in six.
fn grey(color: u8) -> u32 {
    let level = u32::from(color >> 2 << 2 | color >> 6);
    level << 16 | level << 8 | level
}

/// The pixels of a cell of text of 9 by 16, as strings.
fn cell(frame: &Frame, column: usize, row: usize, front: u32) -> Vec<String> {
    let dot = |pixel: &u32| if *pixel == front { '#' } else { '.' };
    (0..16).map(|y| frame.row(row * 16 + y)[column * 9..][..9].iter().map(dot).collect()).collect()
}

const GLYPH: [u8; 16] = [0, 0x81, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x01];

#[test]
fn text_is_characters_of_nine_dots() {
    let bench = Bench::in_mode(&TEXT);
    bench.load_glyph(b'A', GLYPH);
    bench.poke(0xb8000 + 2 * 81, &[b'A', 0x1f]);
    let frame = bench.draw();
    assert_eq!(frame.size(), (720, 400));
    let shown = cell(&frame, 1, 1, grey(0x3f));
    assert_eq!(shown[..4], [".........", "#......#.", "########.", "........."]);
    assert_eq!(frame.row(16)[9], grey(1), "the background");
    assert_eq!(frame.row(0)[0], grey(0));
}

#[test]
fn line_drawing_characters_reach_into_the_ninth_dot() {
    let bench = Bench::in_mode(&TEXT);
    for character in [0xc4, 0xbf] {
        bench.load_glyph(character, GLYPH);
    }
    bench.poke(0xb8000, &[0xc4, 0x0f, 0xbf, 0x0f]);
    let frame = bench.draw();
    assert_eq!(cell(&frame, 0, 0, grey(0x3f))[2], "#########");
    assert_eq!(cell(&frame, 1, 0, grey(0x3f))[2], "########.");
    bench.indexed(0x3c4, 1, 1);
    assert_eq!(bench.draw().size(), (640, 400));
}

#[test]
fn the_cursor_blinks_twice_as_fast_as_text() {
    let bench = Bench::in_mode(&TEXT);
    bench.load_glyph(b'A', GLYPH);
    bench.poke(0xb8000, &[b'A', 0x8f, b' ', 0x07]);
    bench.indexed(0x3d4, 0x0f, 1);
    let shows = |frame| {
        bench.at_frame(frame);
        let frame = bench.draw();
        let cursor = cell(&frame, 1, 0, grey(7));
        assert!(cursor[13] == cursor[14] && cursor[12] == ".".repeat(9) && cursor[15] == ".".repeat(9));
        (cell(&frame, 0, 0, grey(0x3f))[2].starts_with('#'), cursor[13].starts_with('#'))
    };
    assert_eq!([0, 8, 16, 24].map(shows), [(false, false), (false, true), (true, false), (true, true)]);
    bench.indexed(0x3d4, 0x0a, 0x2d);
    bench.at_frame(8);
    assert_eq!(cell(&bench.draw(), 1, 0, grey(7))[13], ".........", "it is off");
}

#[test]
fn without_blinking_there_are_sixteen_backgrounds() {
    let bench = Bench::in_mode(&TEXT);
    bench.poke(0xb8000, &[b' ', 0x9f]);
    assert_eq!(bench.draw().row(0)[0], grey(1));
    bench.attribute(0x10, 0x04);
    assert_eq!(bench.draw().row(0)[0], grey(0x39));
}

#[test]
fn underlines_and_a_second_font_are_chosen_by_the_attribute() {
    let bench = Bench::in_mode(&TEXT);
    bench.attribute(0x01, 0x38);
    bench.indexed(0x3d4, 0x14, 0x0f);
    bench.poke(0xb8000, &[b' ', 0x01, b' ', 0x09, b' ', 0x07]);
    let frame = bench.draw();
    let lined = |column: usize| frame.row(15)[9 * column] != grey(0);
    assert_eq!([0, 1, 2].map(lined), [true, true, false]);
    // Font 1 of 16 KiB for characters with bit 3.
    bench.load_glyph(b'A', [0; 16]);
    bench.indexed(0x3c4, 3, 0x04);
    bench.vga.memory.store(0x4000 + usize::from(b'A') * 32, 0x00ff_0000);
    bench.poke(0xb8000, &[b'A', 0x0f, b'A', 0x07]);
    let frame = bench.draw();
    assert_eq!((frame.row(0)[0], frame.row(0)[9]), (grey(0x3f), grey(0)));
}

#[test]
fn mode_13_has_a_byte_for_each_pixel() {
    let bench = Bench::in_mode(&MODE_13);
    bench.poke(0xa0000, &[10, 20, 30, 40, 50]);
    bench.poke(0xa0000 + 199 * 320 + 319, &[200]);
    let frame = bench.draw();
    assert_eq!(frame.size(), (640, 400));
    let colors = [10, 10, 20, 20, 30, 30, 40, 40, 50, 50, 0].map(grey);
    assert_eq!((&frame.row(0)[..11], &frame.row(1)[..11]), (&colors[..], &colors[..]));
    assert_eq!((frame.row(399)[639], frame.row(399)[637], frame.row(397)[639]), (grey(200), grey(0), grey(0)));
}

#[test]
fn mode_x_has_pages_to_flip() {
    let bench = Bench::in_mode(&MODE_13);
    for (port, index, value) in [(0x3c4, 4, 6), (0x3d4, 0x14, 0), (0x3d4, 0x17, 0xe3), (0x3c4, 2, 2)] {
        bench.indexed(port, index, value);
    }
    bench.poke(0xa0000, &[100]);
    bench.indexed(0x3c4, 2, 8);
    bench.poke(0xa0000 + 16000, &[150]);
    assert_eq!(bench.draw().row(0)[..10], [0, 0, 100, 100, 0, 0, 0, 0, 0, 0].map(grey));
    bench.indexed(0x3d4, 0x0c, (16000 >> 8) as u8);
    bench.indexed(0x3d4, 0x0d, (16000 & 0xff) as u8);
    assert_eq!(bench.draw().row(0)[..10], [0, 0, 0, 0, 0, 0, 150, 150, 0, 0].map(grey));
}

#[test]
fn mode_12_has_a_bit_of_each_pixel_in_each_plane() {
    let bench = Bench::in_mode(&MODE_12);
    for plane in 0..4 {
        bench.indexed(0x3c4, 2, 1 << plane);
        bench.poke(0xa0000 + 80 * 479 + 79, &[[0x01, 0x03, 0x05, 0x81][plane]]);
    }
    let frame = bench.draw();
    assert_eq!(frame.size(), (640, 480));
    assert_eq!(frame.row(479)[632..], [8, 0, 0, 0, 0, 4, 2, 15].map(grey));
    bench.attribute(0x12, 0x07);
    assert_eq!(bench.draw().row(479)[632..], [0, 0, 0, 0, 0, 4, 2, 7].map(grey), "plane 3 is not shown");
}

#[test]
fn mode_4_has_odd_lines_in_a_second_bank() {
    let bench = Bench::in_mode(&MODE_4);
    bench.poke(0xb8000, &[0b00_01_10_11, 0xc0]);
    bench.poke(0xb8000 + 0x2000, &[0xff]);
    bench.poke(0xb8000 + 80, &[0x55]);
    let frame = bench.draw();
    assert_eq!(frame.size(), (640, 400));
    let every_other = |y: usize| (0..6).map(|x| frame.row(y)[2 * x]).collect::<Vec<_>>();
    assert_eq!(every_other(0), [0, 2, 4, 6, 6, 0].map(grey));
    assert_eq!(every_other(0), every_other(1));
    assert_eq!(every_other(2), [6, 6, 6, 6, 0, 0].map(grey));
    assert_eq!(every_other(4), [2, 2, 2, 2, 0, 0].map(grey));
}

#[test]
fn the_line_comparison_splits_the_screen() {
    let bench = Bench::in_mode(&MODE_13);
    bench.poke(0xa0000, &[1; 320]);
    bench.poke(0xa0000 + 320 * 100, &[99; 320]);
    bench.indexed(0x3d4, 0x0c, (8000u16 >> 8) as u8);
    bench.indexed(0x3d4, 0x0d, (8000u16 & 0xff) as u8);
    bench.indexed(0x3d4, 0x18, 99);
    bench.indexed(0x3d4, 0x07, 0x0f);
    bench.indexed(0x3d4, 0x09, 0x01);
    let frame = bench.draw();
    assert_eq!([0, 1, 2, 99, 100, 101, 102].map(|y| frame.row(y)[0]), [99, 99, 0, 0, 1, 1, 0].map(grey));
}

#[test]
fn panning_moves_text_by_dots() {
    let bench = Bench::in_mode(&TEXT);
    bench.load_glyph(b'A', GLYPH);
    bench.poke(0xb8000, &[b'A', 0x0f, b'A', 0x0f]);
    bench.attribute(0x13, 2);
    assert_eq!(cell(&bench.draw(), 0, 0, grey(0x3f))[2], "#####.###");
}

#[test]
fn the_screen_is_black_while_it_is_off() {
    let bench = Bench::in_mode(&MODE_13);
    bench.poke(0xa0000, &[255]);
    assert_eq!(bench.draw().row(0)[0], 0xff_ffff);
    bench.indexed(0x3c4, 1, 0x21);
    assert_eq!(bench.draw().row(0)[0], 0);
    bench.indexed(0x3c4, 1, 0x01);
    bench.input(0x3da);
    bench.out(0x3c0, 0x00);
    assert_eq!(bench.draw().row(0)[0], 0);
}

#[test]
fn linear_modes_have_pixels_of_many_forms() {
    let mode = |bpp| [(1, 64), (2, 32), (3, bpp), (4, 0x61)];
    let show = |bpp, pixels: &[u8]| {
        let bench = Bench::in_mode(&MODE_13);
        bench.set_dispi(&mode(bpp));
        bench.vga.memory.write(0, pixels);
        let frame = bench.draw();
        assert_eq!(frame.size(), (64, 32));
        (frame.row(0)[0], frame.row(0)[1])
    };
    assert_eq!(show(8, &[0, 3]), (0, 0));
    assert_eq!(show(15, &[0x00, 0x7c, 0xe0, 0x03]), (0xff_0000, 0x00_ff00));
    assert_eq!(show(16, &[0x1f, 0x00, 0xff, 0xff]), (0x00_00ff, 0xff_ffff));
    assert_eq!(show(24, &[1, 2, 3, 4, 5, 6]), (0x03_0201, 0x06_0504));
    assert_eq!(show(32, &[1, 2, 3, 0xff, 4, 5, 6, 0]), (0x03_0201, 0x06_0504));
    assert_eq!(show(4, &[0x80, 0xc0, 0, 0]), (grey(3), grey(2)));
}

#[test]
fn banks_lead_to_all_of_a_linear_mode() {
    let bench = Bench::in_mode(&MODE_13);
    bench.set_dispi(&[(1, 640), (2, 480), (3, 8), (4, 0x01), (5, 3)]);
    // Set and reset, left over from a planar mode.
    bench.indexed(0x3ce, 1, 0x0f);
    bench.poke(0xa0000, &[0x55; 16]);
    let frame = bench.draw();
    let (x, y) = (0x3_0000 % 640, 0x3_0000 / 640);
    assert_eq!((frame.row(y)[x - 1], frame.row(y)[x], frame.row(y)[x + 15]), (0, grey(0x55), grey(0x55)));
    bench.set_dispi(&[(4, 0), (4, 0x01)]);
    assert_eq!(bench.draw().row(y)[x], 0, "a new mode is cleared");
}

#[test]
fn retraces_come_and_go() {
    let bench = Bench::in_mode(&TEXT);
    let mut seen = [false; 4];
    for step in 0..2000 {
        bench.clock.0.store(step * 10_000, Ordering::SeqCst);
        let status = bench.input(0x3da);
        seen[usize::from(status & 1)] = true;
        seen[2 + usize::from(status >> 3 & 1)] = true;
        assert!(status & 0x09 != 0x08, "the picture is not shown in a vertical retrace");
    }
    assert_eq!(seen, [true; 4]);
}

#[test]
fn nothing_is_drawn_twice() {
    let bench = Bench::in_mode(&MODE_13);
    let mut frame = Frame::default();
    assert!(bench.vga.draw_changes(&mut frame));
    bench.vga.draw_changes(&mut frame);
    assert!(!bench.vga.draw_changes(&mut frame));
    bench.poke(0xa0000, &[1]);
    assert!(bench.vga.draw_changes(&mut frame));
    assert!(!bench.vga.draw_changes(&mut frame));
    bench.out(0x3c6, 0x0f);
    assert!(bench.vga.draw_changes(&mut frame));
}

/// Reads or writes configuration space.
fn config(function: &VgaFunction, register: u16, value: Option<u32>) -> u32 {
    if let Some(value) = value {
        function.write_config(register, &value.to_le_bytes());
    }
    let mut data = [0; 4];
    function.read_config(register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn processors_reach_the_framebuffer_where_its_register_says() {
    let bench = Bench::new();
    let function = VgaFunction::new(bench.vga.clone(), &[0x55, 0xaa, 1]).unwrap();
    assert_eq!((config(&function, 0, None), config(&function, 8, None)), (0x1111_1234, 0x0300_0002));
    assert_eq!(config(&function, 0x10, Some(u32::MAX)), 0xff00_0008);
    assert_eq!(config(&function, 0x18, Some(u32::MAX)), 0xffff_f000);
    assert_eq!(config(&function, 0x30, Some(u32::MAX)), 0xffff_f801);
    let mapped = |address| bench.ram.map().sections().find(address).is_some();
    config(&function, 0x10, Some(0xe000_0000));
    assert!(!mapped(0xe000_0000));
    config(&function, 0x04, Some(2));
    assert!(mapped(0xe000_0000) && mapped(0xe0ff_ffff) && !mapped(0xe100_0000));
    config(&function, 0x10, Some(0xf000_0000));
    assert!(!mapped(0xe000_0000) && mapped(0xf000_0000));
    function.reset();
    assert!(!mapped(0xf000_0000));
}

#[test]
fn the_register_window_shows_what_the_ports_do() {
    let bench = Bench::in_mode(&TEXT);
    let function = VgaFunction::new(bench.vga.clone(), &[]).unwrap();
    let window = function.bar(2).unwrap();
    let read = |offset, length: usize| {
        let mut data = [0; 4];
        window.read(offset, &mut data[..length]);
        u32::from_le_bytes(data)
    };
    assert_eq!((read(0x000, 4), read(0x500, 2), read(0x604, 4)), (0xffff_ff00, 0xb0c5, 0x1e1e_1e1e));
    assert_eq!(read(0x40c, 1), 0x67, "port 0x3cc");
    for (register, value) in [(1u64, 800u16), (2, 600), (3, 32), (4, 0x41)] {
        window.write(0x500 + 2 * register, &value.to_le_bytes());
    }
    assert_eq!(bench.draw().size(), (800, 600));
    assert!(function.bar(1).is_none() && function.bar(6).is_none(), "there is no option ROM");
}

#[test]
fn no_registers_do_harm() {
    let bench = Bench::new();
    let function = VgaFunction::new(bench.vga.clone(), &[0x55, 0xaa]).unwrap();
    let devices: Vec<Arc<dyn Device>> = [0, 2, 6].into_iter().filter_map(|bar| function.bar(bar)).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut frame = Frame::default();
    for round in 0..60_000u64 {
        let (what, place, data) = (random() % 8, random(), random().to_le_bytes());
        let length = 1 << (random() % 4);
        match what {
            0..3 => bench.ports.write(place % u64::from(PORTS), &data[..1]),
            3 => bench.ports.read(place % u64::from(PORTS), &mut [0]),
            4 => bench.set_dispi(&[((place % 12) as u16, random() as u16)]),
            5 => bench.window.write(place % WINDOW_SIZE, &data[..length]),
            6 => bench.window.read(place % WINDOW_SIZE, &mut [0; 8][..length]),
            _ => {
                let device = &devices[(place % 3) as usize];
                device.write(place >> 8 & 0xfff, &data[..length]);
                device.read(place >> 20 & 0xfff, &mut [0; 8][..length]);
            }
        }
        if round % 200 == 0 {
            bench.clock.0.fetch_add(random() % 100_000_000, Ordering::SeqCst);
            bench.out(0x3c0, 0x20);
            bench.vga.draw(&mut frame);
        }
    }
}
