//! From the symbols of X11 (`keysymdef.h`) to the keys of a PC keyboard with the US layout.

/// A key as the first scan code set has it, 0x80 set for those after 0xe0.
pub type Code = u8;

/// A key, and whether its symbol needs the shift key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub code: Code,
    pub shifted: bool,
}

pub const LEFT_SHIFT: Code = 0x2a;
pub const RIGHT_SHIFT: Code = 0x36;

/// Rows of the US layout: the first key's code, the symbols, and those with shift.
const ROWS: [(Code, &str, &str); 5] = [
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (0x39, " ", ""),
];

/// Keys that are no characters.
const OTHERS: [(u32, Code); 76] = [
    // BackSpace, Tab, Return, Pause, Scroll_Lock, Sys_Req, Escape.
    (0xff08, 0x0e),
    (0xff09, 0x0f),
    (0xff0d, 0x1c),
    (0xff13, 0xc6),
    (0xff14, 0x46),
    (0xff15, 0x54),
    (0xff1b, 0x01),
    // Home, Left, Up, Right, Down, Page_Up, Page_Down, End.
    (0xff50, 0xc7),
    (0xff51, 0xcb),
    (0xff52, 0xc8),
    (0xff53, 0xcd),
    (0xff54, 0xd0),
    (0xff55, 0xc9),
    (0xff56, 0xd1),
    (0xff57, 0xcf),
    // Print, Insert, Menu, Break, Num_Lock.
    (0xff61, 0x54),
    (0xff63, 0xd2),
    (0xff67, 0xdd),
    (0xff6b, 0xc6),
    (0xff7f, 0x45),
    // The keypad: Enter; Home, Left, Up, Right, Down, Page_Up, Page_Down, End, Begin, Insert, Delete.
    (0xff8d, 0x9c),
    (0xff95, 0x47),
    (0xff96, 0x4b),
    (0xff97, 0x48),
    (0xff98, 0x4d),
    (0xff99, 0x50),
    (0xff9a, 0x49),
    (0xff9b, 0x51),
    (0xff9c, 0x4f),
    (0xff9d, 0x4c),
    (0xff9e, 0x52),
    (0xff9f, 0x53),
    // Multiply, Add, Subtract, Decimal, Divide, 0 to 9.
    (0xffaa, 0x37),
    (0xffab, 0x4e),
    (0xffad, 0x4a),
    (0xffae, 0x53),
    (0xffaf, 0xb5),
    (0xffb0, 0x52),
    (0xffb1, 0x4f),
    (0xffb2, 0x50),
    (0xffb3, 0x51),
    (0xffb4, 0x4b),
    (0xffb5, 0x4c),
    (0xffb6, 0x4d),
    (0xffb7, 0x47),
    (0xffb8, 0x48),
    (0xffb9, 0x49),
    // F1 to F12.
    (0xffbe, 0x3b),
    (0xffbf, 0x3c),
    (0xffc0, 0x3d),
    (0xffc1, 0x3e),
    (0xffc2, 0x3f),
    (0xffc3, 0x40),
    (0xffc4, 0x41),
    (0xffc5, 0x42),
    (0xffc6, 0x43),
    (0xffc7, 0x44),
    (0xffc8, 0x57),
    (0xffc9, 0x58),
    // Shift, Control, Caps_Lock, Meta, Alt, Super, Hyper; left, then right.
    (0xffe1, LEFT_SHIFT),
    (0xffe2, RIGHT_SHIFT),
    (0xffe3, 0x1d),
    (0xffe4, 0x9d),
    (0xffe5, 0x3a),
    (0xffe7, 0x38),
    (0xffe8, 0xb8),
    (0xffe9, 0x38),
    (0xffea, 0xb8),
    (0xffeb, 0xdb),
    (0xffec, 0xdc),
    (0xffed, 0xdb),
    (0xffee, 0xdc),
    // Delete; ISO_Level3_Shift, which is AltGr, Mode_switch; ISO_Left_Tab.
    (0xffff, 0xd3),
    (0xfe03, 0xb8),
    (0xff7e, 0xb8),
    (0xfe20, 0x0f),
];

/// The key that makes a symbol, if a US keyboard has one.
pub fn key(keysym: u32) -> Option<Key> {
    if let Some((_, code)) = OTHERS.iter().find(|(symbol, _)| *symbol == keysym) {
        return Some(Key { code: *code, shifted: false });
    }
    // Latin 1 has its own values, and so has all of Unicode from 0x01000000 on.
    let symbol = char::from_u32(if keysym >> 24 == 1 { keysym & 0xff_ffff } else { keysym })?;
    let place = |symbols: &str| symbols.chars().position(|other| other == symbol);
    ROWS.iter().find_map(|(first, plain, shifted)| {
        let (place, shifted) = match place(plain) {
            Some(place) => (place, false),
            None => (place(shifted)?, true),
        };
        Some(Key { code: first + u8::try_from(place).ok()?, shifted })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_where_a_us_keyboard_has_them() {
        let plain = |code| Some(Key { code, shifted: false });
        let shifted = |code| Some(Key { code, shifted: true });
        for (symbol, expected) in [
            ('a', plain(0x1e)),
            ('A', shifted(0x1e)),
            ('0', plain(0x0b)),
            ('_', shifted(0x0c)),
            ('`', plain(0x29)),
            ('\'', plain(0x28)),
            ('\\', plain(0x2b)),
            ('z', plain(0x2c)),
            ('?', shifted(0x35)),
            (' ', plain(0x39)),
            ('ä', None),
        ] {
            assert_eq!(key(symbol as u32), expected, "{symbol}");
            assert_eq!(key(0x0100_0000 | symbol as u32), expected, "{symbol}");
        }
        assert_eq!(key(0xff0d), plain(0x1c));
        assert_eq!(key(0xffc9), plain(0x58));
        assert_eq!((key(0), key(u32::MAX)), (None, None));
    }
}
