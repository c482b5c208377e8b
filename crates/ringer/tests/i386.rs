//! Boots of Debian's 32-bit kernels, which start by the 32-bit boot protocol.

mod support;

use std::sync::OnceLock;

use ringer::guest::Guest;
use support::{Script, Step, cache};

fn guest(pae: bool) -> &'static Guest {
    static GUESTS: [OnceLock<Guest>; 2] = [const { OnceLock::new() }; 2];
    let fetch = || Guest::i386(&cache(), pae).expect("Debian's 32-bit kernel and busybox can be fetched");
    GUESTS[usize::from(pae)].get_or_init(fetch)
}

/// Runs programs on one and on two processors.
fn runs_programs(pae: bool) {
    for cpus in ["1", "2"] {
        let steps = Script::on(guest(pae))
            .step("machine", "uname -m")
            .step("release", "uname -r")
            .step("cpus", "grep -c ^processor /proc/cpuinfo")
            .step("pipe", "seq 1 20000 | awk '{ sum += $1 } END { print sum }'")
            .step("float", "awk 'BEGIN { while (++k <= 10000) sum += 1 / k; printf \"%.12f\\n\", sum }'")
            .step("hash", "head -c 1000000 /dev/zero | sha256sum")
            .step("fork", "i=0; while [ $i -lt 50 ]; do /bin/true || exit 1; i=$((i + 1)); done; echo $i")
            .step("segv", "sh -c 'kill -SEGV $$'")
            .step("alarms", "dmesg | grep -E 'WARNING:|BUG:|Oops|Call Trace|lockup|detected stalls|unstable'")
            .run(&["--cpus", cpus, "--net", "none"]);
        let prints = |name: &str, output: &str| {
            assert_eq!(steps[name], Step { output: format!("{output}\n"), status: 0 }, "{name}");
        };
        prints("machine", "i686");
        assert_eq!(steps["release"].output.trim().ends_with("-pae"), pae, "{:?}", steps["release"]);
        prints("cpus", cpus);
        prints("pipe", "200010000");
        prints("float", "9.787606036044");
        prints("hash", "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025  -");
        prints("fork", "50");
        assert_eq!(steps["segv"].status, 139);
        assert_eq!(steps["alarms"], Step { output: String::new(), status: 1 });
    }
}

#[test]
fn the_i386_kernel_with_two_levels_of_page_tables_runs_programs() {
    runs_programs(false);
}

#[test]
fn the_i386_kernel_with_pae_runs_programs() {
    runs_programs(true);
}
