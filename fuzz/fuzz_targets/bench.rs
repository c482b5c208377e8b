//! A block device on a bus, over a small file.

#[path = "../../crates/virtio/tests/support/mod.rs"]
pub mod support;

use std::sync::Arc;

use block::{Disk, Options};
use virtio::block::Block;

thread_local! {
    pub static BENCH: support::Bench = {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.as_file().set_len(1 << 20).expect("a file of 1 MiB");
        let disk = Disk::open(&Options::new(file.path())).expect("a disk");
        support::Bench::new(Arc::new(Block::new(disk, "fuzz", 2)))
    };
}
