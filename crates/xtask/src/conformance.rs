//! One suite over all engines: the bare-metal guests of `difftest`, which must do the same on each.
//!
//! Not every KVM is the same machine. What a kind of it does otherwise is listed in [`EXCEPTIONS`] with the reason; all
//! else that differs is a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use crate::Error;
use crate::build::{self, Program};
use crate::exceptions::EXCEPTIONS;

/// Kinds of processors, as the suite finds them behind an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The translator, whose tests these are.
    Translated,
    /// Hardware virtualization.
    Hardware,
    /// AMD-V as QEMU's TCG emulates it: an AMD processor with deviations of its own.
    EmulatedAmd,
    /// A KVM without hardware: kernels are emulated instruction by instruction, by an emulator made for the few that
    /// need it under hardware virtualization.
    Emulating,
}

/// Results by test, for one engine.
pub type Results = BTreeMap<String, bool>;

/// What the test programs have printed (libtest's lines), each test by "program::test".
pub fn results(program: &str, output: &str) -> Results {
    output
        .lines()
        .filter_map(|line| {
            let (name, result) = line.trim_end().strip_prefix("test ")?.rsplit_once(" ... ")?;
            Some((format!("{program}::{name}"), result == "ok"))
        })
        .collect()
}

/// Prints the table of tests and engines, and says what is not as it should be.
pub fn judge(engines: &[(&str, Kind, Results)]) -> Result<(), Error> {
    let tests: BTreeSet<&String> = engines.iter().flat_map(|(_, _, results)| results.keys()).collect();
    let columns: Vec<_> = engines.iter().map(|(name, _, _)| format!("{name:>10}")).collect();
    println!("{:100}{}", "test", columns.concat());
    let mut wrong = Vec::new();
    for test in &tests {
        let mut row = String::new();
        for (engine, kind, results) in engines {
            let excepted = EXCEPTIONS.iter().find(|e| e.kind == *kind && e.tests.contains(&test.as_str()));
            let word = match (results.get(*test), excepted) {
                (Some(true), _) => "ok",
                (Some(false), Some(_)) => "differs",
                _ => {
                    wrong.push(format!("{test} on {engine}"));
                    "FAILED"
                }
            };
            row += &format!("{word:>10}");
        }
        println!("{test:100}{row}");
    }
    for exception in EXCEPTIONS.iter().filter(|e| engines.iter().any(|(_, kind, _)| *kind == e.kind)) {
        println!("{}: {}", exception.why, exception.tests.join(", "));
    }
    if tests.is_empty() {
        return Err(Error::Failed("no test has run".into()));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Error::Failed(format!("{} failed: {}", wrong.len(), wrong.join(", ")))) }
}

/// Runs the programs on this host with an engine.
pub fn on_this_host(engine: &str, programs: &[Program]) -> Result<Results, Error> {
    let mut all = Results::new();
    for program in programs {
        let output = Command::new(&program.path)
            .env("RINGER_ENGINE", engine)
            .output()
            .map_err(Error::io(format!("can't start {}", program.path.display())))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let of_program = results(&program.name, &text);
        if of_program.values().any(|ok| !ok) {
            println!("{text}");
        }
        all.extend(of_program);
    }
    Ok(all)
}

/// What kind of KVM this host has, if it opens.
fn kvm_here() -> Result<Option<Kind>, Error> {
    let ram = memory::Ram::new(memory::MIN_SIZE).map_err(|error| Error::Failed(error.to_string()))?;
    let probed = kvm::Kvm::new(ram, kvm::Config { cpus: Default::default(), model: Default::default() })
        .and_then(|kvm| kvm.probe());
    match probed {
        Ok(kvm::Verdict::Runs) => Ok(Some(Kind::Hardware)),
        Ok(kvm::Verdict::DoesNotRun(why)) => {
            println!("KVM here: {why}");
            Ok(Some(Kind::Emulating))
        }
        Err(kvm::Error::Absent | kvm::Error::Denied { .. }) => Ok(None),
        Err(error) => Err(Error::Failed(error.to_string())),
    }
}

/// Runs the suite on this host: translated, with programs that run directly wherever they can, and on KVM if /dev/kvm opens.
pub fn run() -> Result<(), Error> {
    let programs = build::bare_metal_tests()?;
    let mut engines = Vec::new();
    for name in ["translate", "direct"] {
        engines.push((name, Kind::Translated, on_this_host(name, &programs)?));
    }
    match kvm_here()? {
        Some(kind) => engines.push(("kvm", kind, on_this_host("kvm", &programs)?)),
        None => println!("/dev/kvm does not open: there is nothing to compare with"),
    }
    judge(&engines)
}
