//! TCP against another implementation, with all that is between: data, ends, refusals, losses.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use smoltcp::socket::tcp::State;

use super::guest::Guest;
use crate::{Backend, Forward};

const SIZE: usize = 8 << 20;

fn pattern() -> Vec<u8> {
    (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A server on the host that takes one connection.
fn serve(address: &str, serve: impl FnOnce(TcpStream) + Send + 'static) -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, thread::spawn(move || serve(listener.accept().unwrap().0)))
}

/// Sends the pattern by a guest's socket and closes it, and reads all that comes.
fn exchange(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut received) = (0, Vec::new());
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| {
                    received.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
        }
        sent == data.len() && !socket.may_recv() && socket.state() != State::SynSent
    });
    received
}

fn echo(mut stream: TcpStream) {
    let mut reader = stream.try_clone().unwrap();
    let copy = thread::spawn(move || {
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        data
    });
    let data = copy.join().unwrap();
    stream.write_all(&data).unwrap();
}

#[test]
fn data_of_the_guest_reaches_the_host_and_comes_back() {
    for (listen, gateway) in [("127.0.0.1", "10.0.2.2"), ("::1", "fd52:696e:6765:72::2")] {
        for mtu in [1500, 65520] {
            let (port, server) = serve(listen, echo);
            let mut guest = Guest::new(|config| config.mtu = mtu);
            let handle = guest.connect(SocketAddr::new(gateway.parse().unwrap(), port));
            assert!(exchange(&mut guest, handle, &pattern()) == pattern(), "{gateway} {mtu}");
            server.join().unwrap();
        }
    }
}

#[test]
fn lost_segments_are_sent_again() {
    let (port, server) = serve("127.0.0.1", |mut stream| {
        let mut data = vec![0; 1000];
        stream.read_exact(&mut data).unwrap();
        stream.write_all(&pattern()).unwrap();
    });
    let mut guest = Guest::new(|_| {});
    let handle = guest.connect(SocketAddr::new("10.0.2.2".parse().unwrap(), port));
    guest.wire.lose = 97;
    assert!(exchange(&mut guest, handle, &pattern()[..1000]) == pattern());
    server.join().unwrap();
}

#[test]
fn forwarded_ports_lead_into_the_guest() {
    for host in ["127.0.0.1:0", "[::1]:0"] {
        let forward: Forward = format!("tcp:{host}-:22").parse().unwrap();
        let mut guest = Guest::new(|config| config.forwards.push(forward));
        let handle = guest.tcp_socket();
        guest.tcp(handle).listen(22).unwrap();
        let address = guest.net.listening()[0];
        let client = thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&pattern()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut data = Vec::new();
            stream.read_to_end(&mut data).unwrap();
            data
        });
        assert!(exchange(&mut guest, handle, &pattern()) == pattern());
        assert_eq!(guest.tcp(handle).remote_endpoint().map(|end| end.addr.to_string()), Some("10.0.2.2".into()));
        let received = guest_side_done(&mut guest, client);
        assert!(received == pattern());
    }
}

#[test]
fn a_port_that_the_guest_refuses_is_reset() {
    let forward: Forward = "tcp:127.0.0.1:0-:22".parse().unwrap();
    let mut guest = Guest::new(|config| config.forwards.push(forward));
    let address = guest.net.listening()[0];
    let client = thread::spawn(move || TcpStream::connect(address).unwrap().read(&mut [0; 1]).unwrap_err().kind());
    guest.run(|_| client.is_finished());
    assert_eq!(client.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

/// Keeps the guest going until the host's side has what it waits for.
fn guest_side_done(guest: &mut Guest, client: JoinHandle<Vec<u8>>) -> Vec<u8> {
    guest.run(|_| client.is_finished());
    client.join().unwrap()
}

#[test]
fn closed_ports_refuse_and_resets_pass_through() {
    let mut guest = Guest::new(|_| {});
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let handle = guest.connect(SocketAddr::new("10.0.2.2".parse().unwrap(), closed));
    guest.run(|guest| guest.tcp(handle).state() == State::Closed);

    // The guest resets: the host's side is told by a reset, not by an orderly end.
    let (port, server) = serve("127.0.0.1", |mut stream| {
        let error = stream.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    let handle = guest.tcp_socket();
    {
        let context = guest.interface.context();
        let socket = guest.sockets.get_mut::<smoltcp::socket::tcp::Socket>(handle);
        socket.connect(context, ("10.0.2.2".parse::<std::net::IpAddr>().unwrap(), port), 40_001).unwrap();
    }
    guest.run(|guest| guest.tcp(handle).state() == State::Established);
    guest.tcp(handle).abort();
    guest.run(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn an_end_of_data_leaves_the_other_direction_open() {
    let (port, server) = serve("127.0.0.1", |mut stream| {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        assert!(data == pattern());
    });
    let mut guest = Guest::new(|_| {});
    let handle = guest.connect(SocketAddr::new("10.0.2.2".parse().unwrap(), port));
    guest.run(|guest| guest.tcp(handle).state() == State::CloseWait);
    let mut sent = 0;
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        sent += socket.send_slice(&pattern()[sent..]).unwrap();
        sent == SIZE
    });
    guest.tcp(handle).close();
    guest.run(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn restrict_keeps_the_guest_in_and_lets_forwarded_connections_in() {
    let (port, _server) = serve("127.0.0.1", |_| panic!("the guest got out"));
    let forward: Forward = "tcp:127.0.0.1:0-:22".parse().unwrap();
    let mut guest = Guest::new(|config| {
        config.restrict = true;
        config.forwards.push(forward);
    });
    let out = guest.connect(SocketAddr::new("10.0.2.2".parse().unwrap(), port));
    let inside = guest.tcp_socket();
    guest.tcp(inside).listen(22).unwrap();
    let address = guest.net.listening()[0];
    let client = thread::spawn(move || {
        let mut data = Vec::new();
        TcpStream::connect(address).unwrap().read_to_end(&mut data).unwrap();
        data
    });
    guest.run(|guest| guest.tcp(inside).can_send());
    guest.tcp(inside).send_slice(b"hello").unwrap();
    guest.tcp(inside).close();
    assert_eq!(guest_side_done(&mut guest, client), b"hello");
    assert_eq!(guest.tcp(out).state(), State::SynSent);
}

#[test]
fn a_reset_of_the_card_drops_its_connections() {
    let (port, server) = serve("127.0.0.1", |mut stream| {
        let mut data = Vec::new();
        let _ = stream.read_to_end(&mut data);
    });
    let mut guest = Guest::new(|_| {});
    let handle = guest.connect(SocketAddr::new("10.0.2.2".parse().unwrap(), port));
    guest.run(|guest| guest.tcp(handle).state() == State::Established);
    guest.net.reset();
    server.join().unwrap();
    // What the guest still sends belongs to nothing now.
    guest.tcp(handle).send_slice(b"x").unwrap();
    guest.run(|guest| guest.tcp(handle).state() == State::Closed);
}

#[test]
fn a_port_in_use_is_an_error_that_says_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let forward: Forward = format!("tcp:{}-:22", taken.local_addr().unwrap()).parse().unwrap();
    let mut config = crate::UserConfig::new(super::guest::MAC);
    config.forwards.push(forward);
    let error = crate::UserNet::new(config).err().unwrap().to_string();
    assert!(error.contains("listens there") && error.contains(&taken.local_addr().unwrap().to_string()), "{error}");
}
