//! Builds what is to be shown, and finds what it needs to run elsewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// A program that cargo has built.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: String,
    pub path: PathBuf,
}

/// `ringer` itself, as users have it.
pub fn ringer() -> Result<Program, Error> {
    let programs = cargo(&["build", "--release", "--package", "ringer", "--bin", "ringer"])?;
    let found = programs.into_iter().find(|program| program.name == "ringer");
    found.ok_or_else(|| Error::Failed("cargo has built no ringer".into()))
}

/// The test programs of `difftest` that are bare-metal guests: all but those that compare with the real processor.
pub fn bare_metal_tests() -> Result<Vec<Program>, Error> {
    let programs = cargo(&["test", "--release", "--package", "difftest", "--tests", "--no-run"])?;
    let native = ["difftest", "instructions", "sequences"];
    Ok(programs.into_iter().filter(|program| !native.contains(&program.name.as_str())).collect())
}

/// Runs cargo and returns the programs that it names.
fn cargo(arguments: &[&str]) -> Result<Vec<Program>, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .map_err(Error::io("can't start cargo"))?;
    if !output.status.success() {
        return Err(Error::Failed(format!("cargo {}: {}", arguments.join(" "), output.status)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(program_of).collect())
}

/// Of a message of cargo's in JSON, the program that it announces. The two strings looked for have no escapes in them:
/// names are identifiers, and paths with quotes or backslashes are not supported here.
fn program_of(message: &str) -> Option<Program> {
    let path = PathBuf::from(string(message, "executable")?);
    let target = message.split_once("\"target\":")?.1;
    Some(Program { name: string(target, "name")?.to_owned(), path })
}

fn string<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    json.split_once(&format!("\"{key}\":\""))?.1.split('"').next()
}

/// The shared libraries that programs need, the loader among them, each by the path at which they look for it.
pub fn libraries<'a>(programs: impl IntoIterator<Item = &'a Path>) -> Result<BTreeSet<PathBuf>, Error> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output =
            Command::new("ldd").arg(program).output().map_err(Error::io("can't start ldd, which shows libraries"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"
        let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        found.extend(paths);
    }
    Ok(found)
}

/// The program without debug information, which would take a small machine's memory.
pub fn stripped(program: &Path, directory: &Path) -> Result<Vec<u8>, Error> {
    let out = directory.join("stripped");
    let status = Command::new("strip")
        .arg("-o")
        .arg(&out)
        .arg(program)
        .status()
        .map_err(Error::io("can't start strip (Debian: binutils)"))?;
    if !status.success() {
        return Err(Error::Failed(format!("strip {}: {status}", program.display())));
    }
    std::fs::read(&out).map_err(Error::io(format!("can't read {}", out.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_cargos_message() {
        let message = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"paging","src_path":"/x"},"executable":"/t/deps/paging-1"}"#;
        let program = program_of(message).unwrap();
        assert_eq!((program.name.as_str(), program.path.to_str()), ("paging", Some("/t/deps/paging-1")));
        assert!(program_of(r#"{"reason":"compiler-artifact","target":{"name":"x"},"executable":null}"#).is_none());
    }
}
