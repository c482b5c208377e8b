//! Files that are not what they should be.

use super::*;
use crate::testing::{Files, boot, bzimage, mutate};

fn config(kernel: PathBuf) -> BootConfig {
    crate::testing::config(kernel, Vec::new(), "")
}

fn error(config: &BootConfig) -> String {
    let error = load(&Ram::new(64 << 20).unwrap(), config).expect_err("an error").to_string();
    assert!(!error.contains('\n'), "errors are one line: {error}");
    error
}

#[test]
fn each_bad_file_is_named_with_what_is_wrong() {
    let files = Files::new();
    let cases = [
        (files.path("missing"), "No such file"),
        (files.add("empty", b""), "is empty"),
        (files.add("short", b"HdrS"), "not a kernel"),
        (files.add("text", &[b'x'; 5000]), "not a kernel"),
        (files.path(""), "not a regular file"),
        (PathBuf::from("/dev/zero"), "not a regular file"),
    ];
    for (path, why) in cases {
        let text = error(&config(path.clone()));
        assert!(text.contains(why) && text.contains(path.to_str().unwrap()), "{text}");
        let initrd = BootConfig { initrd: vec![path.clone()], ..config(files.add("kernel", &bzimage(|_| ()))) };
        if !why.contains("not a kernel") {
            let text = error(&initrd);
            assert!(text.contains(why) && text.contains(path.to_str().unwrap()), "{text}");
        }
    }
}

#[test]
fn a_fifo_is_refused_at_once_instead_of_waited_for() {
    let files = Files::new();
    let path = files.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert!(error(&config(path)).contains("not a regular file"));
}

#[test]
fn a_huge_file_of_zeros_is_refused_without_being_read() {
    let files = Files::new();
    let path = files.path("zeros");
    std::fs::File::create(&path).unwrap().set_len(10 << 30).unwrap();
    let before = bytes_read();
    assert!(error(&config(path.clone())).contains("not a kernel"));
    let initrd = BootConfig { initrd: vec![path], ..config(files.add("kernel", &bzimage(|_| ()))) };
    assert!(error(&initrd).contains(&(10u64 << 30).to_string()));
    assert!(bytes_read() - before < 1 << 20);
}

/// What this thread has read so far (proc_pid_io(5)).
fn bytes_read() -> u64 {
    let counts = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    counts.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn processor_counts_that_the_tables_can_t_hold_are_refused() {
    let files = Files::new();
    let kernel = files.add("kernel", &bzimage(|_| ()));
    for cpus in [MAX_CPUS + 1, u32::MAX] {
        assert!(error(&BootConfig { cpus: Topology::of_cores(cpus), ..config(kernel.clone()) }).contains("processors"));
    }
}

#[test]
fn a_machine_with_the_least_ram_is_told_how_much_the_kernel_needs() {
    let error = boot(memory::MIN_SIZE, &bzimage(|_| ()), None, "").err().unwrap().to_string();
    assert!(error.contains("RAM up to 10 MiB") && error.contains("up to 4 MiB"), "{error}");
}

#[test]
fn mutated_bzimages_never_panic() {
    mutate(&bzimage(|_| ()), 0x5eed);
}
