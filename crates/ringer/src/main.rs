//! The program `ringer`; everything is in the library of this name.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ringer::main()
}
