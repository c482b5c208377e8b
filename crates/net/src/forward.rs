//! `hostfwd`: which ports of the host lead into the guest.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use crate::plan;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// One forwarded port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// What is reached in the guest.
    pub guest: SocketAddr,
}

impl std::fmt::Display for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}-{}", self.protocol, self.host, self.guest)
    }
}

const FORM: &str = "the form is tcp:127.0.0.1:2222-:22";

impl FromStr for Forward {
    type Err = String;

    /// `tcp|udp:[HOST ADDRESS]:PORT-[GUEST ADDRESS]:PORT`. IPv6 addresses are in brackets. Without an address the host
    /// listens on its loopback only: what is to be reached from outside has to say so (`0.0.0.0`).
    fn from_str(text: &str) -> Result<Self, String> {
        let (protocol, rest) = text.split_once(':').ok_or_else(|| format!("{text:?}: {FORM}"))?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            other => return Err(format!("{other:?} is neither tcp nor udp; {FORM}")),
        };
        let (host, guest) = rest.split_once('-').ok_or_else(|| format!("{text:?} has no '-'; {FORM}"))?;
        let host = endpoint(host, Ipv4Addr::LOCALHOST.into())?;
        let guest = endpoint(guest, plan::GUEST4.into())?;
        if guest.port() == 0 {
            return Err(format!("{text:?}: a guest has no port 0"));
        }
        Ok(Forward { protocol, host, guest })
    }
}

fn endpoint(text: &str, default: IpAddr) -> Result<SocketAddr, String> {
    let (address, port) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} has no port; {FORM}"))?;
    let port = port.parse().map_err(|_| format!("{port:?} is not a port (0 to 65535)"))?;
    let bare = address.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
    let address = match (address, bare) {
        ("", _) => default,
        (_, Some(v6)) => v6.parse().map(IpAddr::V6).map_err(|_| format!("{v6:?} is not an IPv6 address"))?,
        (v4, None) => {
            v4.parse().map(IpAddr::V4).map_err(|_| format!("{v4:?} is not an IP address (IPv6 in brackets)"))?
        }
    };
    Ok(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_may_be_left_out() {
        let forward: Forward = "tcp::2222-:22".parse().unwrap();
        assert_eq!(forward.to_string(), "tcp:127.0.0.1:2222-10.0.2.15:22");
        let forward: Forward = "udp:0.0.0.0:53-10.0.2.20:5353".parse().unwrap();
        assert_eq!(forward.to_string(), "udp:0.0.0.0:53-10.0.2.20:5353");
        let forward: Forward = "tcp:[::1]:80-[fd52:696e:6765:72::15]:80".parse().unwrap();
        assert_eq!(forward.to_string(), "tcp:[::1]:80-[fd52:696e:6765:72::15]:80");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "the form"),
            ("tcp", "the form"),
            ("sctp::1-:2", "sctp"),
            ("tcp::2222", "'-'"),
            ("tcp:2222-22", "no port"),
            ("tcp::99999-:22", "99999"),
            ("tcp::x-:22", "\"x\""),
            ("tcp::2222-:0", "port 0"),
            ("tcp:localhost:2222-:22", "localhost"),
            ("tcp:::1:2222-:22", "brackets"),
            ("tcp:[1.2.3.4]:1-:2", "1.2.3.4"),
            ("tcp::-1-:22", "\"\""),
        ] {
            let error = text.parse::<Forward>().unwrap_err();
            assert!(error.contains(named), "{text:?}: {error}");
        }
    }
}
