//! The engines of this host.

use std::sync::Arc;

use arch::cpuid::Topology;
use engine::Engine;
use memory::Ram;
use translator::native::Mode;
use translator::{Config, Translator};

/// An engine for a machine with this RAM: `translate`, `direct`, `checked` or `kvm`.
pub fn named(name: &str, ram: &Ram, cpus: u32) -> Arc<dyn Engine> {
    match name {
        "kvm" => Arc::new(kvm(ram, cpus).expect("a /dev/kvm that can be used")),
        "translate" => translator(ram, cpus, Mode::default()),
        "direct" => translator(ram, cpus, Mode::Always),
        "checked" => checked(ram, cpus),
        other => panic!("there is no engine {other}: there are translate, direct, checked and kvm"),
    }
}

/// The translator, and when it runs programs directly.
pub fn translator(ram: &Ram, cpus: u32, direct: Mode) -> Arc<Translator> {
    configured(ram, Config { cpus: Topology::of_cores(cpus), direct, ..Default::default() })
}

/// The translator, where all code looks at its bytes itself.
pub fn checked(ram: &Ram, cpus: u32) -> Arc<Translator> {
    configured(ram, Config { cpus: Topology::of_cores(cpus), checked: true, direct: Mode::Never, ..Default::default() })
}

fn configured(ram: &Ram, config: Config) -> Arc<Translator> {
    Arc::new(Translator::new(ram.clone(), config).expect("the translator works on this host"))
}

fn kvm(ram: &Ram, cpus: u32) -> Result<kvm::Kvm, kvm::Error> {
    kvm::Kvm::new(ram.clone(), kvm::Config { cpus: Topology::of_cores(cpus), model: Default::default() })
}

/// What the probe says of this host, in RAM of its own.
fn verdict() -> Result<kvm::Verdict, kvm::Error> {
    let ram = Ram::new(memory::MIN_SIZE).expect("guest memory");
    kvm(&ram, 1).and_then(|kvm| kvm.probe())
}

/// One engine of each kind that runs kernels on this host, all on the same RAM.
pub fn all(ram: &Ram, cpus: u32) -> Vec<Arc<dyn Engine>> {
    let mut engines = vec![named("translate", ram, cpus)];
    match verdict() {
        Ok(kvm::Verdict::Runs) => engines.push(named("kvm", ram, cpus)),
        Ok(kvm::Verdict::DoesNotRun(why)) => println!("not on KVM: {why}"),
        Err(error) => println!("not on KVM: {error}"),
    }
    engines
}
