//! Which engine runs a machine, and why that one.

use std::sync::Arc;

use engine::Engine;
use memory::Ram;

use crate::Error;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    Auto,
    Translate,
}

/// An engine, and the reason for it in words that follow "because".
pub struct Selection {
    pub engine: Arc<dyn Engine>,
    pub reason: &'static str,
}

/// Makes the engine that fits `accel` and this host, for the processors that `config` describes.
pub fn select_engine(accel: Accel, ram: &Ram, config: translator::Config) -> Result<Selection, Error> {
    let engine = Arc::new(translator::Translator::new(ram.clone(), config)?);
    let reason = match accel {
        Accel::Translate => "--accel translate asks for it",
        Accel::Auto => "it needs no hardware virtualization",
    };
    Ok(Selection { engine, reason })
}
