//! What a viewer types, as keys that go down and up; those that are down when it leaves come up.

use std::collections::HashMap;

use super::Desktop;
use super::keysym::{self, Code, LEFT_SHIFT, RIGHT_SHIFT};

pub struct Keys<'a> {
    desktop: &'a dyn Desktop,
    /// The keys that are down, by what the viewer calls them.
    down: HashMap<Name, Code>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Name {
    Symbol(u32),
    Code(u32),
}

/// No keyboard has so many keys.
const MOST: usize = 256;

impl<'a> Keys<'a> {
    pub fn new(desktop: &'a dyn Desktop) -> Self {
        Keys { desktop, down: HashMap::new() }
    }

    /// A symbol: the key that has it on a US keyboard, with shift if it needs that and the viewer does not hold it.
    pub fn symbol(&mut self, keysym: u32, down: bool) {
        if !down {
            return self.up(Name::Symbol(keysym));
        }
        let Some(key) = keysym::key(keysym) else { return };
        let holds = self.down.values().any(|code| [LEFT_SHIFT, RIGHT_SHIFT].contains(code));
        let shifts = key.shifted && !holds;
        if shifts {
            self.desktop.key(LEFT_SHIFT, true);
        }
        self.down(Name::Symbol(keysym), key.code);
        if shifts {
            self.desktop.key(LEFT_SHIFT, false);
        }
    }

    /// A key by its place on the keyboard. 0: the viewer does not know it, and the symbol must do.
    pub fn code(&mut self, code: u32, keysym: u32, down: bool) {
        let name = Name::Code(code);
        match u8::try_from(code) {
            Ok(0) => self.symbol(keysym, down),
            Ok(code) if down => self.down(name, code),
            Ok(_) => self.up(name),
            Err(_) => {}
        }
    }

    fn down(&mut self, name: Name, code: Code) {
        if self.down.len() < MOST || self.down.contains_key(&name) {
            self.down.insert(name, code);
            self.desktop.key(code, true);
        }
    }

    fn up(&mut self, name: Name) {
        if let Some(code) = self.down.remove(&name) {
            self.desktop.key(code, false);
        }
    }
}

impl Drop for Keys<'_> {
    fn drop(&mut self) {
        self.down.values().for_each(|code| self.desktop.key(*code, false));
    }
}
