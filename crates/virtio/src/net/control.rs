//! The control queue (virtio 1.2, 5.1.6.5): commands of the driver that are no frames.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Shared, feature, lock};
use crate::{Chain, Event, Queue, wait_any};

/// `struct virtio_net_ctrl`: class and command, before what the command says.
const HEADER: usize = 2;

/// Class and command.
const RX: u8 = 0;
const MAC_TABLE_SET: (u8, u8) = (1, 0);
const MAC_ADDRESS_SET: (u8, u8) = (1, 1);
const PAIRS_SET: (u8, u8) = (4, 0);
const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);

const OK: u8 = 0;
const ERROR: u8 = 1;

pub struct Control {
    shared: Arc<Shared>,
    features: u64,
    /// Wakes the pairs' threads.
    pairs: Vec<Arc<Event>>,
}

impl Control {
    pub fn new(shared: Arc<Shared>, features: u64, pairs: Vec<Arc<Event>>) -> Self {
        Control { shared, features, pairs }
    }

    pub fn work(self, mut queue: Queue, stop: &Event) {
        let kick = queue.kick().clone();
        while !stop.is_set() {
            kick.clear();
            while let Some(chain) = queue.pop() {
                let status = if self.command(&chain).is_some() { OK } else { ERROR };
                let written = chain.write_at(0, &[status]);
                queue.push(chain, written as u32);
                if stop.is_set() {
                    return;
                }
            }
            queue.notify();
            if !queue.enable_kicks() {
                wait_any(&[stop, &kick]);
            }
        }
    }

    /// Does a command; `None`: it is not one, or not possible.
    fn command(&self, chain: &Chain) -> Option<()> {
        let mut reader = chain.reader();
        let mut header = [0; HEADER];
        reader.read_exact(&mut header).ok()?;
        match header.into() {
            // The card receives everything in any case, which may be more than was asked for (5.1.6.5.1, 5.1.6.5.2).
            (RX, 0..=5) | MAC_TABLE_SET => {}
            MAC_ADDRESS_SET => {
                let mut mac = [0; 6];
                reader.read_exact(&mut mac).ok()?;
                *lock(&self.shared.mac) = mac;
            }
            PAIRS_SET => {
                let mut pairs = [0; 2];
                reader.read_exact(&mut pairs).ok()?;
                self.use_pairs(u16::from_le_bytes(pairs))?;
            }
            GUEST_OFFLOADS_SET => {
                let mut offloads = [0; 8];
                reader.read_exact(&mut offloads).ok()?;
                let offloads = u64::from_le_bytes(offloads);
                let known = feature::GUEST_CHECKSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
                if offloads & !(known & self.features) != 0 {
                    return None;
                }
                self.shared.guest_offloads.store(offloads, Ordering::SeqCst);
                self.pairs.iter().for_each(|pair| pair.set());
            }
            _ => return None,
        }
        Some(())
    }

    fn use_pairs(&self, pairs: u16) -> Option<()> {
        if self.features & feature::MULTI_QUEUE == 0 || !(1..=self.shared.pairs).contains(&pairs) {
            return None;
        }
        self.shared.active_pairs.store(pairs.into(), Ordering::SeqCst);
        self.pairs.iter().for_each(|pair| pair.set());
        Some(())
    }
}
