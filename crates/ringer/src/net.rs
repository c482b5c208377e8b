//! `--net`: what may be typed, and the card that comes of it.

use std::sync::Arc;

use ::net::{Backend, Forward, Mac, Tap, UserConfig, UserNet};
use virtio::VirtioDevice;
use virtio::net::{MAX_PAIRS, Net};

/// One network card as the user wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArg {
    User { mac: Option<Mac>, forwards: Vec<Forward>, restrict: bool },
    Tap { mac: Option<Mac>, name: String },
    None,
}

const ALLOWED: &str =
    "allowed are user[,hostfwd=tcp:127.0.0.1:2222-:22][,restrict=on][,mac=M], tap[,name=INTERFACE][,mac=M] and none";

/// Addresses of cards that none was given for: locally administered ones that people know from QEMU.
const FIRST_MAC: Mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// Parses `user[,hostfwd=...][,restrict=on][,mac=...]`, `tap[,name=...][,mac=...]` or `none`.
pub fn parse(text: &str) -> Result<NetArg, String> {
    let mut settings = text.split(',');
    let kind = settings.next().unwrap_or_default();
    let mut arg = match kind {
        "user" => NetArg::User { mac: None, forwards: Vec::new(), restrict: false },
        "tap" => NetArg::Tap { mac: None, name: String::new() },
        "none" => NetArg::None,
        _ => return Err(format!("\"{kind}\" is not known: {ALLOWED}")),
    };
    for setting in settings {
        let (name, value) = setting.split_once('=').unwrap_or((setting, ""));
        match (&mut arg, name, value) {
            (NetArg::User { mac, .. } | NetArg::Tap { mac, .. }, "mac", value) => *mac = Some(parse_mac(value)?),
            (NetArg::User { forwards, .. }, "hostfwd", value) => forwards.push(value.parse()?),
            (NetArg::User { restrict, .. }, "restrict", "on") => *restrict = true,
            (NetArg::User { restrict, .. }, "restrict", "off") => *restrict = false,
            (NetArg::Tap { name, .. }, "name", value) if (1..16).contains(&value.len()) => *name = value.into(),
            _ => return Err(format!("\"{setting}\" is not known for {kind}: {ALLOWED}")),
        }
    }
    Ok(arg)
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect();
    let mac = bytes.and_then(|bytes| Mac::try_from(bytes).ok());
    mac.filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
        .ok_or_else(|| format!("\"{text}\" is not the hardware address of a card, such as 52:54:00:12:34:56"))
}

/// Makes the cards; one on a tap interface with a pair of queues for each processor. Nothing asked for is one card on the user network.
pub fn devices(args: &[NetArg], cpus: u32) -> Result<Vec<Arc<dyn VirtioDevice>>, ::net::Error> {
    let usual = [NetArg::User { mac: None, forwards: Vec::new(), restrict: false }];
    let args = if args.is_empty() { &usual } else { args };
    let mut devices: Vec<Arc<dyn VirtioDevice>> = Vec::new();
    for (arg, number) in args.iter().zip(0u8..) {
        let [head @ .., last] = FIRST_MAC;
        let [a, b, c, d, e] = head;
        let own = [a, b, c, d, e, last.wrapping_add(number)];
        match arg {
            NetArg::None => {}
            NetArg::Tap { mac, name } => {
                let (taps, name) = Tap::open(name, (cpus as usize).min(MAX_PAIRS))?;
                tracing::info!("a network card is attached to the tap interface {name}");
                let backends = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect();
                devices.push(Arc::new(Net::new(mac.unwrap_or(own), None, backends)));
            }
            NetArg::User { mac, forwards, restrict } => {
                let mac = mac.unwrap_or(own);
                let config = UserConfig { forwards: forwards.clone(), restrict: *restrict, ..UserConfig::new(mac) };
                let mtu = config.mtu;
                let backend: Box<dyn Backend> = Box::new(UserNet::new(config)?);
                devices.push(Arc::new(Net::new(mac, Some(mtu), vec![backend])));
            }
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_networks_have_settings() {
        let NetArg::User { mac, forwards, restrict } =
            parse("user,hostfwd=tcp::2222-:22,hostfwd=udp::53-:53,restrict=on,mac=52:54:00:aa:bb:cc").unwrap()
        else {
            panic!()
        };
        assert_eq!((mac, forwards.len(), restrict), (Some([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]), 2, true));
        assert_eq!(parse("none"), Ok(NetArg::None));
    }

    #[test]
    fn what_is_not_known_is_refused_with_what_is() {
        for text in [
            "",
            "slirp",
            "user,x",
            "user,hostfwd=",
            "user,restrict=maybe",
            "none,mac=1",
            "user,mac=1:2:3:4:5:6",
            "user,mac=ff:ff:ff:ff:ff:ff",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("slirp").unwrap_err().contains("hostfwd"));
    }
}
