//! Any bytes as a disk image.
#![no_main]

#[path = "../../crates/block/tests/support/mod.rs"]
mod support;

use std::sync::LazyLock;

static DIRECTORY: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary directory"));

libfuzzer_sys::fuzz_target!(|data: &[u8]| support::image_file(DIRECTORY.path(), data));
