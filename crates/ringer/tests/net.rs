//! Networks of whole machines. Each test runs in a network namespace of its own, made by unshare(1), in which it may
//! be root: so it reaches nothing but this host, and can have addresses, interfaces and a name server as it likes.

mod support;

use std::env;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{LONG, Process, Script, default_guest, one_machine_at_a_time};

/// Set in the process that is in the namespace.
const INSIDE: &str = "RINGER_TEST_NAMESPACE";
/// An address of the namespace that is neither the loopback nor the guest's link: the outside world.
const OUTSIDE: &str = "192.0.2.1";
const SIZE: usize = 48 << 20;

const SETUP: &str = "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && ip addr add 2001:db8::1/128 dev lo \
     && echo 0 0 >/proc/sys/net/ipv4/ping_group_range && mount -t tmpfs tmpfs /mnt \
     && echo nameserver 127.0.0.53 >/mnt/resolv.conf && mount --bind /mnt/resolv.conf /etc/resolv.conf \
     && exec \"$@\"";

/// Runs a test in its namespace: by another process, which is this program again.
fn in_namespace(name: &str, test: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return test();
    }
    // Fetched out here, where the host's network is.
    default_guest();
    let _turn = one_machine_at_a_time();
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c", SETUP, "sh"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.expect("unshare is there").success(), "see above");
}

fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..SIZE / 8).flat_map(|_| next()).collect()
}

/// What sha256sum says of the data.
fn sha256(data: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()[..64].to_owned()
}

/// Serves each connection by a thread, for as long as the test runs.
fn serve(address: &str, serve: impl Fn(TcpStream) + Send + Copy + 'static) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().flatten().for_each(|stream| _ = thread::spawn(move || serve(stream))));
    port
}

fn give(mut stream: TcpStream) {
    _ = stream.write_all(&pattern());
}

/// Takes all, and answers by its SHA-256.
fn take(mut stream: TcpStream) {
    let mut data = Vec::new();
    if stream.read_to_end(&mut data).is_ok() {
        _ = writeln!(stream, "{}", sha256(&data));
    }
}

/// A name server that knows one name: any. Its address is [`OUTSIDE`].
fn serve_names() {
    let socket = UdpSocket::bind("127.0.0.53:53").unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            // RFC 1035, 4.1: the question again, and for an address (type A) an answer that points to its name.
            let mut answer = query[..length].to_vec();
            let is_a = answer[12..].windows(5).any(|end| end == [0, 0, 1, 0, 1]);
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            if is_a {
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
            }
            _ = socket.send_to(&answer, peer);
        }
    });
}

#[test]
fn the_user_network_gives_a_guest_all_it_needs() {
    in_namespace("the_user_network_gives_a_guest_all_it_needs", || {
        serve_names();
        let (inside, outside, v6) = (serve("127.0.0.1", give), serve(OUTSIDE, take), serve("2001:db8::1", give));
        let steps = Script::new()
            .step("address", "ip addr show eth0; ip route; cat /etc/resolv.conf")
            .step("gateway", "until ping -c 1 -W 1 fd52:696e:6765:72::2 >/dev/null 2>&1; do sleep 0.2; done; ping -c 2 -W 5 10.0.2.2 && ping -c 2 -W 5 fd52:696e:6765:72::2")
            .step("ping", "ping -c 2 -W 5 -s 4000 192.0.2.1 && ping -c 2 -W 5 2001:db8::1")
            .step("name", "nslookup example.org")
            .step("download", &format!("nc 10.0.2.2 {inside} | sha256sum"))
            .step("download6", &format!("nc 2001:db8::1 {v6} | sha256sum"))
            .step(
                "upload",
                &format!(
                    "head -c {SIZE} /dev/urandom >/tmp/data; sha256sum </tmp/data; nc example.org {outside} </tmp/data"
                ),
            )
            .step("closed", "nc -w 5 10.0.2.2 9 && echo connected")
            .step("loopback", &format!("nc -w 2 127.0.0.1 {inside} && echo connected"))
            .step("dmesg", "dmesg -r | grep '^<[0-4]>'")
            .run(&["--cpus", "2"]);
        let output = |name: &str| steps[name].output.as_str();
        for part in ["inet 10.0.2.15/24", "default via 10.0.2.2", "nameserver 10.0.2.3"] {
            assert!(output("address").contains(part), "{}", output("address"));
        }
        for step in ["gateway", "ping"] {
            assert_eq!(output(step).matches(" 0% packet loss").count(), 2, "{}", output(step));
        }
        assert!(output("name").contains(OUTSIDE), "{}", output("name"));
        let expected = sha256(&pattern());
        assert!(output("download").starts_with(&expected), "{}", output("download"));
        assert!(output("download6").starts_with(&expected), "{}", output("download6"));
        let sums: Vec<_> = output("upload").lines().map(|line| line.get(..64)).collect();
        assert!(sums.len() == 2 && sums[0].is_some() && sums[0] == sums[1], "{}", output("upload"));
        assert!(steps["closed"].status != 0 && steps["loopback"].status != 0, "{steps:?}");
        assert_eq!(output("dmesg"), "");
    });
}

/// Tries until the guest's server is there.
fn until_served(mut attempt: impl FnMut() -> std::io::Result<Vec<u8>>) -> Vec<u8> {
    let deadline = Instant::now() + LONG;
    loop {
        match attempt() {
            Ok(data) if !data.is_empty() => return data,
            result => assert!(Instant::now() < deadline, "{:?}", result.err()),
        }
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn forwarded_ports_lead_into_the_guest_and_restrict_keeps_it_in() {
    in_namespace("forwarded_ports_lead_into_the_guest_and_restrict_keeps_it_in", || {
        let server = serve("127.0.0.1", give);
        let (mut command, _directory) = Script::new()
            .step("out", &format!("nc -w 3 10.0.2.2 {server} | wc -c; nc -w 3 {OUTSIDE} {server}; ping -c 1 10.0.2.2"))
            .step("in", &format!("nc -ll -p 22 -e sha256sum & head -c {SIZE} /dev/urandom >/tmp/data; nc -ll -p 23 -e cat /tmp/data & sleep 1000"))
            .command("");
        command
            .args(["--net", "user,hostfwd=tcp::2222-:22,hostfwd=tcp:[::1]:2323-:23,restrict=on"])
            .stdin(Stdio::null());
        let mut machine = Process::start(&mut command);
        machine.wait_for("@@begin in");
        let sum = until_served(|| {
            let mut stream = TcpStream::connect("127.0.0.1:2222")?;
            stream.write_all(&pattern())?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).map(|_| answer)
        });
        assert!(sum.starts_with(sha256(&pattern()).as_bytes()), "{}", String::from_utf8_lossy(&sum));
        let read = || {
            let mut data = Vec::new();
            TcpStream::connect("[::1]:2323")?.read_to_end(&mut data).map(|_| data)
        };
        let first = until_served(read);
        assert_eq!(first.len(), SIZE);
        assert!(first == until_served(read));
        drop(machine);
    });
}

#[test]
fn a_port_in_use_is_told_before_anything_runs() {
    in_namespace("a_port_in_use_is_told_before_anything_runs", || {
        let _taken = TcpListener::bind("127.0.0.1:2222").unwrap();
        let (mut command, _directory) = Script::new().step("none", "true").command("");
        let ended = Process::start(command.args(["--net", "user,hostfwd=tcp::2222-:22"]).stdin(Stdio::null())).end();
        assert_eq!(ended.status.code(), Some(1));
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains("tcp:127.0.0.1:2222-10.0.2.15:22") && ended.stderr.contains("another port"));
    });
}

#[test]
fn tap_interfaces_take_several_queues() {
    in_namespace("tap_interfaces_take_several_queues", || {
        let setup =
            "ip tuntap add tap7 mode tap multi_queue && ip addr add 10.9.0.1/24 dev tap7 && ip link set tap7 up";
        assert!(Command::new("sh").args(["-c", setup]).status().unwrap().success());
        let (down, up) = (serve("0.0.0.0", give), serve("0.0.0.0", take));
        let steps = Script::new()
            .step(
                "address",
                "ip addr add 10.9.0.2/24 dev eth0 && ping -c 2 -W 5 10.9.0.1; ls /sys/class/net/eth0/queues",
            )
            .step("download", &format!("for i in 1 2 3; do nc 10.9.0.1 {down} | sha256sum & done; wait"))
            .step(
                "upload",
                &format!("head -c {SIZE} /dev/urandom >/tmp/data; sha256sum </tmp/data; nc 10.9.0.1 {up} </tmp/data"),
            )
            .run(&["--cpus", "2", "--net", "tap,name=tap7"]);
        assert!(
            steps["address"].output.contains("rx-1") && steps["address"].output.contains(" 0% packet loss"),
            "{steps:?}"
        );
        let expected = sha256(&pattern());
        assert_eq!(steps["download"].output.matches(&expected).count(), 3, "{}", steps["download"].output);
        let sums: Vec<_> = steps["upload"].output.lines().map(|line| line.get(..64)).collect();
        assert!(sums.len() == 2 && sums[0].is_some() && sums[0] == sums[1], "{}", steps["upload"].output);
    });
}

#[test]
fn without_a_network_there_is_no_card() {
    let steps = Script::new().step("cards", "ls /sys/class/net").run(&["--net", "none"]);
    assert_eq!(steps["cards"].output.trim(), "lo");
}
