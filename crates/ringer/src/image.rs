//! `ringer image`: makes, describes, copies, resizes and checks disk images.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use block::image::{self, Compression, Info, Report};
use block::{Format, Options};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::units::{parse_size, show_size};
use crate::{cleanup, debian};

#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an empty disk
    Create(CreateArgs),
    /// Tell what an image is
    Info {
        image: PathBuf,
        /// raw or qcow2; default: qcow2 if it begins so
        #[arg(long, short, value_name = "FORMAT", value_parser = format)]
        format: Option<Format>,
        #[arg(long)]
        json: bool,
    },
    /// Copy a disk into a new image
    Convert(ConvertArgs),
    /// Make a disk larger, or smaller
    Resize(ResizeArgs),
    /// Look for damage in a qcow2 image; exit status 1: there is some
    Check {
        image: PathBuf,
        /// Mend reference counts
        #[arg(long)]
        repair: bool,
        #[arg(long)]
        json: bool,
    },
    /// Make a disk with a bootable Debian server (needs mmdebstrap and e2fsprogs)
    Debian(debian::Args),
}

#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    pub image: PathBuf,
    /// Size of the disk, with unit: 20G; default: that of the backing file
    #[arg(value_parser = parse_size, required_unless_present = "backing")]
    pub size: Option<u64>,
    /// raw or qcow2
    #[arg(long, short, value_name = "FORMAT", default_value = "qcow2", value_parser = format)]
    pub format: Format,
    /// An image that holds what is not written to this one, as seen from this one's directory
    #[arg(long, short, value_name = "FILE")]
    pub backing: Option<PathBuf>,
    /// The format of that; default: qcow2 if it begins so
    #[arg(long, short = 'F', value_name = "FORMAT", value_parser = format, requires = "backing")]
    pub backing_format: Option<Format>,
}

#[derive(Clone, Debug, Args)]
pub struct ConvertArgs {
    pub from: PathBuf,
    pub to: PathBuf,
    /// Format of the new image: raw or qcow2
    #[arg(long, short = 'O', value_name = "FORMAT", default_value = "qcow2", value_parser = format)]
    pub output_format: Format,
    /// Format of the old one; default: qcow2 if it begins so
    #[arg(long, short, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Allow backing files in other directories or of unnamed format
    #[arg(long)]
    pub any_backing: bool,
    /// Compress the new image, which is then a qcow2 one, by zlib or zstd. (What a guest writes to it later is not
    /// compressed; an image compressed by zstd can only be read.)
    #[arg(long, short, value_name = "TYPE", value_parser = compression)]
    pub compress: Option<Compression>,
}

#[derive(Clone, Debug, Args)]
pub struct ResizeArgs {
    pub image: PathBuf,
    /// New size of the disk, with unit: 20G
    #[arg(value_parser = parse_size)]
    pub size: u64,
    /// Allow to cut off the end of the disk
    #[arg(long)]
    pub shrink: bool,
    /// raw or qcow2; default: qcow2 if it begins so
    #[arg(long, short, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
}

/// Why an image command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Image(#[from] block::Error),
    #[error("{}: {errors} errors; data may be lost{}", path.display(), if *repaired { ", and what is left can't be mended" } else { "; --repair mends reference counts" })]
    Damaged { path: PathBuf, errors: u64, repaired: bool },
    #[error(transparent)]
    Debian(#[from] debian::Error),
    #[error("can't write to stdout: {0}")]
    Output(io::Error),
}

pub fn format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err("allowed are raw and qcow2".into()),
    }
}

fn compression(text: &str) -> Result<Compression, String> {
    match text {
        "zlib" => Ok(Compression::Zlib),
        "zstd" => Ok(Compression::Zstd),
        _ => Err("allowed are zlib and zstd".into()),
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

pub fn run(command: &ImageCommand) -> Result<(), Error> {
    match command {
        ImageCommand::Create(args) => {
            let backing = args.backing.clone().map(|backing| (backing, args.backing_format));
            let size = image::create(&args.image, args.format, args.size, backing)?;
            say!("ringer: {}: a disk of {}", args.image.display(), show_size(size));
        }
        ImageCommand::Info { image, format, json } => {
            let info = image::info(image, *format)?;
            print(&if *json { format!("{}\n", info_json(&info)) } else { info_text(image, &info) })?;
        }
        ImageCommand::Convert(args) => convert(args)?,
        ImageCommand::Resize(args) => {
            let mut options = Options::new(&args.image);
            options.format = args.format;
            let before = image::resize(&options, args.size, args.shrink)?;
            say!("ringer: {}: {} instead of {}", args.image.display(), show_size(args.size), show_size(before));
        }
        ImageCommand::Check { image, repair, json } => check(image, *repair, *json)?,
        ImageCommand::Debian(args) => {
            debian::build(args)?;
            say!("ringer: {} is ready; log in as root, without a password", args.output.display());
        }
    }
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<(), Error> {
    let mut from = Options::new(&args.from);
    (from.format, from.any_backing) = (args.format, args.any_backing);
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    let (mut size, mut removal) = (0, None);
    let mut progress = |done, all| {
        size = all;
        // From its beginning on, half a copy is ours to remove.
        removal.get_or_insert_with(|| {
            let half = args.to.clone();
            cleanup::register(move || _ = fs::remove_file(half))
        });
        bar.set_length(all);
        bar.set_position(done);
    };
    let result = match args.compress {
        Some(compression) => image::compress(&from, &args.to, compression, &mut progress),
        None => image::convert(&from, &args.to, args.output_format, &mut progress),
    };
    removal.into_iter().for_each(cleanup::Guard::cancel);
    bar.finish_and_clear();
    result?;
    say!("ringer: {}: a {} image of a disk of {}", args.to.display(), name(args.output_format), show_size(size));
    Ok(())
}

/// Writes to stdout. It is no error when nobody wants to read all of it.
fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Output(error)),
        _ => Ok(()),
    }
}

fn info_text(path: &Path, info: &Info) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &dyn std::fmt::Display| _ = writeln!(text, "{:<12}{value}", format!("{name}:"));
    line("image", &path.display());
    line("format", &name(info.format));
    line("disk", &format_args!("{} ({} bytes)", show_size(info.size), info.size));
    line("takes", &format_args!("{} KiB", info.allocated >> 10));
    let Some(qcow2) = &info.qcow2 else { return text };
    line("version", &qcow2.version);
    let cluster_size = show_size(qcow2.cluster_size);
    line("clusters", &format_args!("{cluster_size}, compressed ones by {}", qcow2.compression));
    if let Some(backing) = &qcow2.backing_file {
        let format = qcow2.backing_format.as_deref().unwrap_or("format not said");
        line("backing", &format_args!("{backing:?} ({format})"));
    }
    if qcow2.snapshots > 0 {
        line("snapshots", &qcow2.snapshots);
    }
    if qcow2.dirty {
        line("state", &"not closed properly; ringer image check --repair");
    }
    if qcow2.corrupt {
        line("state", &"marked as damaged; ringer image check --repair");
    }
    text
}

fn info_json(info: &Info) -> serde_json::Value {
    let mut value = json!({ "format": name(info.format), "size": info.size, "allocated": info.allocated });
    if let Some(qcow2) = &info.qcow2 {
        value["qcow2"] = json!({
            "version": qcow2.version,
            "cluster_size": qcow2.cluster_size,
            "compression": qcow2.compression,
            "backing_file": qcow2.backing_file,
            "backing_format": qcow2.backing_format,
            "snapshots": qcow2.snapshots,
            "dirty": qcow2.dirty,
            "corrupt": qcow2.corrupt,
        });
    }
    value
}

fn check(path: &Path, repair: bool, json: bool) -> Result<(), Error> {
    let Report { errors, leaks, data_clusters, compressed_clusters, details, dirty } = image::check(path, repair)?;
    let mut text = String::new();
    if json {
        let report = json!({ "errors": errors, "leaks": leaks, "clusters": data_clusters,
                             "compressed": compressed_clusters, "dirty": dirty, "details": details });
        _ = writeln!(text, "{report}");
    } else {
        details.iter().for_each(|detail| _ = writeln!(text, "error: {detail}"));
        let clusters = format!("{data_clusters} clusters of data ({compressed_clusters} compressed)");
        _ = writeln!(text, "{clusters}, {errors} errors, {leaks} leaked clusters");
    }
    print(&text)?;
    if errors > 0 || dirty {
        return Err(Error::Damaged { path: path.into(), errors, repaired: repair });
    }
    Ok(())
}
