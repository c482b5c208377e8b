//! Interrupt causes: which there are (ICR), which the driver wants to hear of (IMS), and how often (ITR).

use std::time::{Duration, Instant};

use crate::Model;
use crate::registers::*;

/// MSI-X vectors of the 82574.
pub const VECTORS: usize = 5;
/// Throttling counts in this many nanoseconds.
const UNIT: u64 = 256;
/// IVAR: which causes lead to the vector in each field of four bits, the last of which says that it is valid.
const FIELDS: [u32; 5] = [RX_QUEUE_0, RX_QUEUE_0 << 1, TX_QUEUE_0, TX_QUEUE_0 << 1, OTHER];
/// The causes that OTHER stands for.
const OTHERS: u32 = LINK_CHANGED | 1 << 6 | 1 << 9 | 1 << 16 | 1 << 17 | 1 << 18;

/// What is to be done about the causes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Action {
    /// The level of the pin, or of what becomes an MSI message.
    pub level: bool,
    /// A bit for each MSI-X vector to send.
    pub vectors: u32,
    /// When to look again.
    pub again: Option<Instant>,
}

pub struct Causes {
    model: Model,
    pub icr: u32,
    pub ims: u32,
    pub iam: u32,
    pub eiac: u32,
    pub ivar: u32,
    /// The throttle of the pin, or of each vector.
    itr: [u16; VECTORS],
    /// Before which nothing is told.
    silent: [Option<Instant>; VECTORS],
    level: bool,
    /// What was told by MSI-X and has not come again.
    told: u32,
}

/// Bits of CTRL_EXT that change what becomes of masks.
#[derive(Clone, Copy, Debug, Default)]
pub struct AutoMask {
    /// When ICR is read (IAME).
    pub by_read: bool,
    /// When a vector is sent (EIAME).
    pub by_vector: bool,
}

impl Causes {
    pub fn new(model: Model) -> Self {
        let (icr, ims, iam, eiac, ivar) = (0, 0, 0, 0, 0);
        Causes { model, icr, ims, iam, eiac, ivar, itr: [0; VECTORS], silent: [None; VECTORS], level: false, told: 0 }
    }

    pub fn set_interval(&mut self, vector: usize, value: u32) {
        if let Some(itr) = self.itr.get_mut(vector) {
            *itr = value as u16;
        }
    }

    pub fn interval(&self, vector: usize) -> u32 {
        self.itr.get(vector).copied().unwrap_or_default().into()
    }

    /// Notes causes. The 82574 counts those of its queues and all others once more.
    pub fn add(&mut self, causes: u32) {
        let more = if self.model == Model::E1000e && causes & OTHERS != 0 { OTHER } else { 0 };
        self.icr |= causes | more;
        self.told &= !(causes | more);
    }

    /// The driver wants to hear of more causes.
    pub fn enable(&mut self, causes: u32) {
        self.ims |= causes;
        self.told &= !causes;
    }

    fn wanted(&self) -> u32 {
        self.icr & self.ims & !ASSERTED
    }

    /// ICR as software reads it, which clears it if an interrupt was asserted for it (by messages: has been, though its causes may
    /// be masked again by now) or nothing is enabled; with `auto_mask` what IAM names is masked, too.
    pub fn read(&mut self, messages: bool, auto_mask: bool) -> u32 {
        if self.model == Model::E1000 {
            return std::mem::take(&mut self.icr);
        }
        let asserted = self.wanted() != 0 || messages && self.icr & self.told != 0;
        let value = self.icr | if asserted { ASSERTED } else { 0 };
        if self.ims == 0 || !messages || asserted {
            self.icr = 0;
        }
        if asserted && auto_mask {
            self.ims &= !self.iam;
        }
        value
    }

    /// A write of ICR clears the bits that are set in it.
    pub fn clear(&mut self, bits: u32) {
        self.icr &= !bits;
        if self.model == Model::E1000e && self.icr & OTHERS == 0 {
            self.icr &= !OTHER;
        }
    }

    /// Whether vector `index` may be told now; if so, it is silent for its interval.
    fn may_tell(&mut self, index: usize, now: Instant, again: &mut Option<Instant>) -> bool {
        let (Some(silent), Some(itr)) = (self.silent.get_mut(index), self.itr.get(index)) else { return false };
        if let Some(until) = silent.filter(|until| *until > now) {
            *again = Some(again.map_or(until, |again| again.min(until)));
            return false;
        }
        *silent = (*itr > 0).then(|| now + Duration::from_nanos(u64::from(*itr) * UNIT));
        true
    }

    /// What is to be done now. `messages`: by MSI-X.
    pub fn settle(&mut self, messages: bool, mask: AutoMask, now: Instant) -> Action {
        let mut action = Action::default();
        if !messages {
            let wanted = self.wanted() != 0;
            self.level = wanted && (self.level || self.may_tell(0, now, &mut action.again));
            action.level = self.level;
            return action;
        }
        self.level = false;
        for (field, cause) in FIELDS.into_iter().enumerate() {
            let entry = self.ivar >> (4 * field) & 15;
            let (vector, valid) = ((entry & 7) as usize, entry & 8 != 0);
            if !valid || vector >= VECTORS || self.wanted() & cause & !self.told == 0 {
                continue;
            }
            let sent = action.vectors & 1 << vector != 0;
            if !sent && !self.may_tell(vector, now, &mut action.again) {
                continue;
            }
            action.vectors |= 1 << vector;
            let cleared = self.eiac & cause;
            self.icr &= !cleared;
            self.told |= cause & !cleared;
            if !mask.by_read {
                self.ims &= !cleared;
            }
            if mask.by_vector {
                // Only what belongs to this vector (82574 datasheet, 10.2.2.5).
                self.ims &= !(self.iam & cause);
            }
        }
        action
    }
}
