//! A VNC server: the screen for people, over the remote framebuffer protocol (RFC 6143, versions 3.3 to 3.8).
//!
//! Data flow: [`Server::start`] listens on a thread of its own and gives each viewer two more ([`viewer`]). [`screen`]
//! draws the desktop while anybody waits for it, finds what has changed ([`damage`]), and lets the viewers' writers send
//! it in the form that each one has asked for ([`pixel`], [`encode`]). Keys and pointer go straight to the [`Desktop`].
//!
//! Viewers are strangers: whatever they send or don't read costs bounded memory, and never a vCPU's time.

mod damage;
mod encode;
mod handshake;
mod keyboard;
mod keysym;
mod pixel;
pub mod protocol;
mod screen;
mod security;
mod stream;
#[cfg(test)]
mod tests;
mod viewer;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use crate::Frame;
use screen::Screen;
pub use security::{MAX_PASSWORD, Password};
use stream::Stream;

/// More viewers than this are turned away.
const MAX_VIEWERS: usize = 16;

/// What viewers see and control.
pub trait Desktop: Send + Sync {
    /// Draws the screen, all of it, if it may have changed since the last call. Says whether it has.
    fn draw(&self, frame: &mut Frame) -> bool;
    /// A key goes down or comes up: its code of the first scan code set, 0x80 set for those after 0xe0. May wait a
    /// little while the guest is behind.
    fn key(&self, code: u8, down: bool);
    /// The pointer is at a place of the screen, with these buttons down: from bit 0 on left, middle, right, wheel up,
    /// wheel down.
    fn pointer(&self, x: usize, y: usize, buttons: u8);
    /// The lights of the keyboard: from bit 0 on scroll lock, num lock, caps lock.
    fn leds(&self) -> u8;
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &Address) -> io::Result<(Self, Address)> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let bound = listener.local_addr()?;
                Ok((Listener::Tcp(listener), Address::Tcp(bound)))
            }
            Address::Unix(path) => {
                if is_left_over(path) {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Ok((Listener::Unix(listener), address.clone()))
            }
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        let stream = match self {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept()?.0),
            Listener::Unix(listener) => Stream::Unix(listener.accept()?.0),
        };
        stream.prepare()?;
        Ok(stream)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener) => listener.as_fd(),
        }
    }
}

/// Whether there is a socket on which nobody listens any more.
fn is_left_over(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

struct Shared {
    screen: Screen,
    password: Option<Password>,
    viewers: Mutex<HashMap<u64, Connection>>,
}

struct Connection {
    stream: Arc<Stream>,
    /// Ends by itself once the stream is shut down.
    thread: JoinHandle<()>,
}

impl Shared {
    fn viewers(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.viewers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A server that runs as long as this lives.
pub struct Server {
    address: Address,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Its other end is what the listening thread leaves by.
    stop: UnixStream,
}

impl Server {
    /// Listens at `address`, and shows `desktop` to whoever comes (and knows the password).
    pub fn start(address: &Address, password: Option<Password>, desktop: Arc<dyn Desktop>) -> io::Result<Self> {
        let (listener, address) = Listener::bind(address)?;
        let shared = Arc::new(Shared { screen: Screen::new(desktop), password, viewers: Mutex::default() });
        let (stop, stopped) = UnixStream::pair()?;
        let mut server = Server { address, shared: shared.clone(), threads: Vec::new(), stop };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| wake::thread(name).spawn(work);
        let screen = shared.clone();
        server.threads.push(spawn("vnc-screen", Box::new(move || screen.screen.run()))?);
        server.threads.push(spawn("vnc-listener", Box::new(move || listen(&listener, &stopped, &shared)))?);
        Ok(server)
    }

    /// Where it listens: with the port that was free, if the address asked for any.
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.stop.shutdown(std::net::Shutdown::Both);
        self.shared.screen.stop();
        // Panics of these threads have been reported.
        self.threads.drain(..).for_each(|thread| _ = thread.join());
        let connections: Vec<_> = self.shared.viewers().drain().map(|(_, connection)| connection).collect();
        for connection in connections {
            connection.stream.shutdown();
            _ = connection.thread.join();
        }
        if let Address::Unix(path) = &self.address {
            // It may have gone by itself.
            _ = std::fs::remove_file(path);
        }
    }
}

/// Takes in viewers until `stopped` is shut down.
fn listen(listener: &Listener, stopped: &UnixStream, shared: &Arc<Shared>) {
    for id in 0.. {
        let mut polled =
            [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        if poll(&mut polled, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
            return;
        }
        let [_, stop] = &polled;
        if !stop.revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok(stream) => admit(id, stream, shared),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Of this connection, or for want of descriptors, which come back.
                tracing::warn!("a VNC viewer can't connect: {error}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

/// Gives a viewer its thread.
fn admit(id: u64, stream: Stream, shared: &Arc<Shared>) {
    let mut viewers = shared.viewers();
    viewers.retain(|_, connection| !connection.thread.is_finished());
    if viewers.len() >= MAX_VIEWERS {
        tracing::warn!("a VNC viewer is turned away: {}", protocol::Error::TooMany);
        return;
    }
    let stream = Arc::new(stream);
    let (own, server) = (stream.clone(), shared.clone());
    let thread = wake::thread("vnc-viewer").spawn(move || {
        let result = viewer::serve(&own, server.password.as_ref(), &server.screen);
        own.shutdown();
        match result {
            Err(protocol::Error::Io(error)) => tracing::debug!("a VNC viewer has left: {error}"),
            Err(error) => tracing::warn!("a VNC viewer is turned away: {error}"),
            Ok(()) => {}
        }
    });
    match thread {
        Ok(thread) => _ = viewers.insert(id, Connection { stream, thread }),
        Err(error) => tracing::warn!("a VNC viewer can't be served: {error}"),
    }
}
