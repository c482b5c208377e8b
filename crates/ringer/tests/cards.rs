//! Network cards of real makes in whole machines: what Debian's own drivers make of them.

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;

use support::{Script, pc_guest};

const SIZE: usize = 4 << 20;

fn pattern() -> Vec<u8> {
    (0..SIZE as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// The guest gets its address by DHCP, and exchanges data with a server of the host, in both directions.
fn exchange(model: &str, interrupts: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        connection.write_all(&pattern()).unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut connection, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        connection.read_to_end(&mut received).unwrap();
        received
    });
    let steps = Script::on(pc_guest())
        .step("address", "ip addr show eth0 | grep 'inet '; cat /sys/class/net/eth0/speed /sys/class/net/eth0/address")
        .step("driver", "basename $(readlink /sys/class/net/eth0/device/driver); grep -c eth0 /proc/interrupts")
        .step("fetch", &format!("nc 10.0.2.2 {port} </dev/null >/tmp/data; wc -c </tmp/data"))
        .step("send", &format!("nc 10.0.2.2 {port} </tmp/data"))
        .step(
            "errors",
            "cat /sys/class/net/eth0/statistics/*x_errors; dmesg | grep -E 'NETDEV WATCHDOG|Hang|Reset adapter'",
        )
        .run(&["--net", &format!("user,model={model}")]);
    assert!(steps["address"].output.contains("inet 10.0.2."), "{steps:?}");
    assert!(steps["address"].output.contains("1000\n52:54:00:12:34:56"), "{steps:?}");
    assert_eq!(steps["driver"].output, format!("{model}\n{interrupts}\n"), "{steps:?}");
    assert_eq!(steps["fetch"].output, format!("{SIZE}\n"), "{steps:?}");
    assert_eq!(steps["errors"].output, "0\n0\n", "{steps:?}");
    assert!(server.join().unwrap() == pattern(), "the data came back changed");
}

#[test]
fn an_e1000_exchanges_data() {
    exchange("e1000", "1");
}

#[test]
fn an_e1000e_exchanges_data_by_three_vectors() {
    exchange("e1000e", "3");
}
