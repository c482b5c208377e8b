//! `ringer image`: makes and handles disk images.

use clap::Subcommand;

use crate::debian;

#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    /// Make a disk with a bootable Debian server (needs mmdebstrap and e2fsprogs)
    Debian(debian::Args),
}

/// Why an image command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Debian(#[from] debian::Error),
}

pub fn run(command: &ImageCommand) -> Result<(), Error> {
    match command {
        ImageCommand::Debian(args) => {
            debian::build(args)?;
            eprintln!("ringer: {} is ready; log in as root, without a password", args.output.display());
        }
    }
    Ok(())
}
