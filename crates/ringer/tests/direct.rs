//! Programs of a whole guest that run directly do what translated ones do, and what becomes of the machine where their
//! processes can't be had any more.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Ended, Process, Script, one_machine_at_a_time, steps};

/// What only a compiled program does: threads that count together, pages that are protected, faulted in by a signal handler and
/// remapped, code that is written and run, and floating point under a timer's signals.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 64 };
static char *area;
static volatile int faults, ticks;
static atomic_long shared;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static long guarded;

static void fault(int signal, siginfo_t *info, void *context) {
    faults++;
    mprotect((void *)((uintptr_t)info->si_addr & -PAGE), PAGE, PROT_READ | PROT_WRITE);
}
static void tick(int signal) { ticks++; }

static void *count(void *argument) {
    for (int i = 0; i < 50000; i++) {
        atomic_fetch_add(&shared, 1);
        if (i % 16 == 0) {
            pthread_mutex_lock(&mutex);
            guarded++;
            pthread_mutex_unlock(&mutex);
        }
    }
    return 0;
}

int main(void) {
    struct sigaction action = { .sa_sigaction = fault, .sa_flags = SA_SIGINFO };
    sigaction(SIGSEGV, &action, 0);
    long sum = 0;
    for (int round = 0; round < 20; round++) {
        area = mmap(0, PAGES * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int i = 0; i < PAGES; i++) area[i * PAGE] += i + round;
        mprotect(area, PAGES * PAGE / 2, PROT_READ);
        for (int i = 0; i < PAGES; i++) area[i * PAGE]++;
        for (int i = 0; i < PAGES; i++) sum += area[i * PAGE];
        if (fork() == 0) {
            for (int i = 0; i < PAGES; i++) area[i * PAGE] = 99;
            _exit(0);
        }
        wait(0);
        for (int i = 0; i < PAGES; i++) sum += area[i * PAGE];
        munmap(area, PAGES * PAGE);
    }
    printf("pages %ld, faults %d\n", sum, faults);

    unsigned char *code = mmap(0, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sum = 0;
    for (int i = 0; i < 500; i++) {
        memcpy(code, "\xb8\0\0\0\0\xc3", 6);
        memcpy(code + 1, &i, 4);
        sum += ((int (*)(void))code)();
    }
    printf("code %ld\n", sum);

    signal(SIGALRM, tick);
    struct itimerval every = { { 0, 2000 }, { 0, 2000 } };
    setitimer(ITIMER_REAL, &every, 0);
    double series = 0;
    for (long i = 1; i <= 3000000 || ticks < 3; i++) if (i <= 3000000) series += 1.0 / i;
    memset(&every, 0, sizeof every);
    setitimer(ITIMER_REAL, &every, 0);
    printf("series %.12f\n", series);

    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], 0, count, 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
    printf("threads %ld %ld\n", (long)shared, guarded);
    return 0;
}
"#;

/// Installs a filter by which `ptrace` fails, and goes on as the program that its arguments name.
const WITHOUT_PTRACE: &str = r#"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **arguments) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ptrace, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 111;
    execv(arguments[1], arguments + 1);
    return 112;
}
"#;

/// Compiles a program that needs no library at run time.
fn compile(directory: &Path, name: &str, source: &str) -> PathBuf {
    let (program, text) = (directory.join(name), directory.join(format!("{name}.c")));
    fs::write(&text, source).unwrap();
    let status = Command::new("cc").args(["-O2", "-static", "-pthread", "-o"]).arg(&program).arg(&text).status();
    assert!(status.expect("cc starts").success());
    program
}

/// How often `--stats` says that programs were entered directly.
fn entries(ended: &Ended) -> u64 {
    let lines = ended.stderr.lines().filter(|line| line.ends_with("programs entered directly"));
    lines.map(|line| line.split_whitespace().next().unwrap().parse::<u64>().unwrap()).sum()
}

fn programs_do_the_same(cpus: &str) {
    let directory = tempfile::tempdir().unwrap();
    let program = compile(directory.path(), "program", PROGRAM);
    let run = |mode: &str| {
        let script = Script::new()
            .program("program", &program)
            .step("program", "/program && /program")
            .step("fork", "i=0; while [ $i -lt 100 ]; do /bin/true || exit 1; i=$((i + 1)); done; echo $i")
            .step("pipe", "seq 1 5000 | awk '{ sum += $1 } END { print sum }'")
            .step("zip", "gzip -c /bin/busybox | gunzip -c | sha256sum")
            .step("parallel", "for i in 1 2 3 4; do (seq 1 5000 | md5sum) & done; wait")
            .step("signals", "sh -c 'kill -SEGV $$'; echo $?; sh -c 'trap \"echo caught\" USR1; kill -USR1 $$'")
            .step("cpuid", "grep -m1 '^model name' /proc/cpuinfo")
            .step("alarms", "dmesg -r | grep '^<[0-4]>'");
        let (mut command, _files) = script.command("");
        command.args(["--accel", "translate", "--stats", "--no-reboot", "--cpus", cpus, "--direct", mode]);
        let _turn = one_machine_at_a_time();
        let ended = Process::start(command.stdin(Stdio::null())).end();
        assert!(ended.status.success(), "{ended:?}");
        let steps = steps(&ended.stdout);
        (entries(&ended), steps)
    };
    let ((direct, always), (none, never)) = (run("always"), run("never"));
    assert!(direct > 1000 && none == 0, "entered directly {direct} times, and {none}");
    assert_eq!(always, never);
    let expected = "code 124750\nseries 15.491338678200\nthreads 200000 12500\n";
    let output = &always["program"].output;
    assert!(output.ends_with(expected), "{output}");
    assert_eq!(always["program"].status, 0);
    assert_eq!(always["alarms"].output, "");
}

#[test]
fn programs_do_the_same_directly_and_translated_on_one_processor() {
    programs_do_the_same("1");
}

#[test]
fn programs_do_the_same_directly_and_translated_on_two_processors() {
    programs_do_the_same("2");
}

/// A machine whose guest computes for ever, directly.
fn busy_machine() -> (Process, tempfile::TempDir) {
    let script = Script::new().step("busy", "echo the guest is up; while :; do :; done");
    let (mut command, files) = script.command("");
    command.args(["--accel", "translate", "--no-reboot", "--direct", "always"]);
    let mut machine = Process::start(command.stdin(Stdio::null()));
    machine.wait_for("the guest is up");
    (machine, files)
}

/// The processes that a machine's threads have made.
fn processes_of(machine: &Process) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{}/task", machine.child.id())).unwrap();
    let children = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("children")).unwrap());
    children.flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>()).collect()
}

fn is_alive(process: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    !matches!(state.rsplit(") ").next().unwrap_or_default().bytes().next(), None | Some(b'Z' | b'X'))
}

#[test]
fn a_machine_says_so_when_one_of_its_processes_is_killed() {
    let _turn = one_machine_at_a_time();
    let (machine, _files) = busy_machine();
    let processes = processes_of(&machine);
    assert!(!processes.is_empty(), "programs do not run directly");
    // Once one is gone, the machine ends the others.
    let list: Vec<_> = processes.iter().map(u32::to_string).collect();
    _ = Command::new("sh").args(["-c", &format!("kill -KILL {}", list.join(" "))]).stderr(Stdio::null()).status();
    let ended = machine.end();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let errors: Vec<_> = ended.stderr.lines().filter(|line| line.contains("direct execution")).collect();
    assert!(matches!(errors[..], [line] if line.contains("SIGKILL")), "{ended:?}");
    assert!(!processes.into_iter().any(is_alive));
}

#[test]
fn a_machine_that_is_killed_leaves_no_process_behind() {
    let _turn = one_machine_at_a_time();
    let (mut machine, _files) = busy_machine();
    let processes = processes_of(&machine);
    assert!(!processes.is_empty(), "programs do not run directly");
    machine.child.kill().unwrap();
    machine.child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while processes.iter().any(|&process| is_alive(process)) {
        assert!(Instant::now() < deadline, "{processes:?} are still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Boots by a command that is given a shell's words around it; what the guest and the monitor say.
fn boot_by(around: &[&str]) -> Ended {
    let (command, _files) = Script::new().step("sum", "seq 1 5000 | awk '{ sum += $1 } END { print sum }'").command("");
    let mut whole = Command::new(around[0]);
    whole.args(&around[1..]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            whole.env(name, value);
        }
    }
    whole.args(["--accel", "translate", "--no-reboot", "--direct", "always", "--stats", "-v"]);
    let _turn = one_machine_at_a_time();
    let ended = Process::start(whole.stdin(Stdio::null())).end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(steps(&ended.stdout)["sum"].output, "12502500\n");
    ended
}

#[test]
fn programs_are_translated_where_the_host_forbids_ptrace() {
    let directory = tempfile::tempdir().unwrap();
    let wrapper = compile(directory.path(), "without-ptrace", WITHOUT_PTRACE);
    let ended = boot_by(&[wrapper.to_str().unwrap()]);
    assert_eq!(entries(&ended), 0);
    let said: Vec<_> = ended.stderr.lines().filter(|line| line.contains("runs all programs translated")).collect();
    assert!(matches!(said[..], [line] if line.contains("PTRACE_SEIZE")), "{ended:?}");
}
