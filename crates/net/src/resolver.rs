//! The host's name servers, as resolv.conf(5) lists them: read again whenever that file has changed.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::SystemTime;

use crate::plan;

pub struct Resolvers {
    path: PathBuf,
    read: Option<SystemTime>,
    servers: Vec<IpAddr>,
}

impl Resolvers {
    pub fn new(path: PathBuf) -> Self {
        Resolvers { path, read: None, servers: Vec::new() }
    }

    /// The name servers that the guest can use; never none.
    pub fn servers(&mut self) -> &[IpAddr] {
        let changed = fs::metadata(&self.path).and_then(|metadata| metadata.modified()).ok();
        if self.servers.is_empty() || changed != self.read {
            self.read = changed;
            self.servers = parse(&fs::read_to_string(&self.path).unwrap_or_default());
        }
        &self.servers
    }

    /// The server of that number, or the first where there are fewer now than the guest was told.
    pub fn server(&mut self, index: usize) -> IpAddr {
        let servers = self.servers();
        servers.get(index).or(servers.first()).copied().unwrap_or(Ipv4Addr::LOCALHOST.into())
    }
}

fn parse(text: &str) -> Vec<IpAddr> {
    let mut servers: Vec<IpAddr> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .take(plan::RESOLVERS)
        .collect();
    if servers.is_empty() {
        // What resolv.conf(5) says of a file without servers.
        servers.push(Ipv4Addr::LOCALHOST.into());
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_to_three_servers_count_and_none_means_the_host_itself() {
        let text = "# comment\nsearch example.org\nnameserver 192.0.2.1\nnameserver\t2001:db8::53 \nnameserver fe80::1%eth0\n\
                    nameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let expected: Vec<IpAddr> =
            ["192.0.2.1", "2001:db8::53", "192.0.2.3"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(parse(text), expected);
        assert_eq!(parse("search x\n"), [IpAddr::from(Ipv4Addr::LOCALHOST)]);
    }
}
