//! Which engine runs a machine, and why that one.

use std::sync::Arc;

use engine::Engine;
use kvm::{Kvm, Verdict};
use memory::Ram;

use crate::Error;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualization where it is there and does what it should, else translation.
    Auto,
    Kvm,
    Translate,
}

/// An engine, and the reason for it in a few words.
pub struct Selection {
    pub engine: Arc<dyn Engine>,
    pub reason: String,
}

/// Makes the engine that fits `accel` and this host, for the processors that `config` describes; `smm`: what they start
/// from needs system-management mode. `ram` holds nothing yet.
pub fn select_engine(accel: Accel, ram: &Ram, config: translator::Config, smm: bool) -> Result<Selection, Error> {
    match accel {
        Accel::Kvm if smm => Err(Error::NoSmm),
        Accel::Auto if smm => translator(ram, config, "the firmware needs system-management mode".into()),
        Accel::Translate => translator(ram, config, "--accel translate asks for it".into()),
        Accel::Kvm => {
            let engine = Arc::new(hardware(ram, &config)?);
            Ok(Selection { engine, reason: "--accel kvm asks for it".into() })
        }
        Accel::Auto => match hardware(ram, &config) {
            Ok(engine) => Ok(Selection { engine: Arc::new(engine), reason: "hardware virtualization".into() }),
            Err(why) => translator(ram, config, format!("not KVM: {why}")),
        },
    }
}

fn translator(ram: &Ram, config: translator::Config, reason: String) -> Result<Selection, Error> {
    Ok(Selection { engine: Arc::new(translator::Translator::new(ram.clone(), config)?), reason })
}

/// KVM, if it runs kernels on this host.
fn hardware(ram: &Ram, config: &translator::Config) -> Result<Kvm, kvm::Error> {
    let engine = Kvm::new(ram.clone(), kvm::Config { cpus: config.cpus, model: config.model })?;
    match engine.probe()? {
        Verdict::Runs => Ok(engine),
        Verdict::DoesNotRun(why) => Err(kvm::Error::Unusable(why)),
    }
}
