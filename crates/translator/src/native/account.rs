//! When an address space's programs are to run directly: accounts in ticks of the host's time-stamp counter.
//!
//! A program that timer interrupts find running again and again gets a credit. What it runs directly earns what translated
//! code would have taken longer; each time that it stops costs. A program that has spent its credit goes on translated, and
//! has to wait for its next one, longer each time.

/// Address spaces that have an account at a time.
const ACCOUNTS: usize = 64;
/// Interrupts that find a program running until it gets a credit, no two further apart than this many milliseconds.
const TICKS: u32 = 3;
const APART_MS: u64 = 50;
/// Microseconds: what programs do is judged by no less than this. Devices may interrupt them many times a millisecond, and from
/// one such interrupt to the next there is often just one system call.
const LEAST_APART_US: u64 = 500;
/// Microseconds: the credit where a switch takes [`SWITCH_US`], what a program can earn at most, how long one without credit
/// waits.
const CREDIT_US: i64 = 1_500;
const MOST_US: i64 = 20_000;
const FIRST_REST_US: u64 = 25_000;
const LONGEST_REST_US: u64 = 3_000_000;
/// Microseconds, translated, that programs must have computed from one system call or fault to the next.
const STRETCH_US: u64 = 40;
/// What a program's pages may take besides there, when it begins: it needs most of them once.
const PAGES_US: i64 = 10_000;
/// Translated code takes this many times longer.
const GAIN: i64 = 3;
/// What it takes to run a program for no time at all, in microseconds, within the time measured: where the costs here are
/// from. A host with other mitigations, or that is a guest itself, may take five times as long.
const SWITCH_US: i64 = 4;

/// Why a program stopped, by what that costs besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// For a page that it will find from now on.
    Page,
    /// For a page that it may now write instead of execute, or the other way round.
    Change,
    /// A system call, or an interrupt.
    Kernel,
    /// A page fault or exception of its own: translated code has to raise it, and there is a page to map afterwards.
    Fault,
    /// Code that may not run directly.
    Barred,
}

impl Reason {
    /// In microseconds, where a switch takes [`SWITCH_US`].
    fn cost_us(self) -> i64 {
        match self {
            Reason::Page => 6,
            Reason::Kernel => 7,
            Reason::Change | Reason::Fault => 16,
            Reason::Barred => 20,
        }
    }

    /// In halves: so many times longer would translated code have taken. What calls such code again and again may be what
    /// translated code does nearly as fast: a cipher, say.
    fn gain(self) -> i64 {
        if self == Reason::Barred { 3 } else { 2 * GAIN }
    }
}

/// That of one address space.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    cr3: u64,
    /// What tells a process from one that had the same CR3 before.
    process: u64,
    on: bool,
    /// Interrupts found it running, and the last did then.
    ticks: u32,
    last: u64,
    balance: i64,
    /// Without credit until then, after having waited so long last time, in microseconds.
    rests_until: u64,
    rested: u64,
    /// What is left for pages.
    pages: i64,
}

impl Account {
    fn pay_for_pages(&mut self, ticks: i64) {
        let own = ticks.min(self.pages).max(0);
        self.pages -= own;
        self.balance -= ticks - own;
    }
}

#[derive(Default)]
pub struct Accounts {
    accounts: Vec<Account>,
    current: usize,
    /// Ticks a microsecond.
    rate: u64,
    /// At the last interrupt.
    last: Now,
    /// What it takes here to run a program for no time at all, in ticks; 0 if that is not known.
    switch: i64,
}

/// When an interrupt found a program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    pub clock: u64,
    /// How long the vCPU's thread has had the processor: a program that waits for it does not compute.
    pub worked: u64,
    /// How often programs had been left.
    pub left: u64,
}

impl Accounts {
    /// An interrupt found a program of an address space running; of a process that is not likely to have this number if it is
    /// another one than before. Whether it is to run directly.
    pub fn tick(&mut self, cr3: u64, process: u64, now: Now, hz: u64) -> bool {
        self.rate = (hz / 1_000_000).max(1);
        if now.clock.wrapping_sub(self.last.clock) < LEAST_APART_US * self.rate {
            return self.accounts.iter().any(|a| a.cr3 == cr3 && a.process == process && a.on);
        }
        let before = std::mem::replace(&mut self.last, now);
        let (left, worked) = (now.left.wrapping_sub(before.left), now.worked.wrapping_sub(before.worked));
        let computes = left * STRETCH_US * self.rate < worked;
        let now = now.clock;
        self.current = match self.accounts.iter().position(|a| a.cr3 == cr3) {
            Some(index) => index,
            None => self.open(cr3),
        };
        let (rate, switch) = (self.rate, self.switch());
        let account = &mut self.accounts[self.current];
        if account.process != process {
            *account = Account { cr3, process, ..Account::default() };
        }
        let soon = now.wrapping_sub(account.last) < APART_MS * 1000 * rate;
        account.ticks = match () {
            () if !computes => 0,
            () if soon => account.ticks + 1,
            () => 1,
        };
        account.last = now;
        if !account.on && account.ticks >= TICKS && now >= account.rests_until {
            account.on = true;
            account.balance = CREDIT_US * switch / SWITCH_US;
            account.pages = PAGES_US * switch / SWITCH_US;
        }
        account.on
    }

    fn open(&mut self, cr3: u64) -> usize {
        let account = Account { cr3, ..Account::default() };
        if self.accounts.len() < ACCOUNTS {
            self.accounts.push(account);
            return self.accounts.len() - 1;
        }
        let oldest = (0..ACCOUNTS).min_by_key(|&i| self.accounts[i].last).unwrap_or_default();
        self.accounts[oldest] = account;
        oldest
    }

    /// Another address space: whether it is to run directly.
    pub fn select(&mut self, cr3: u64) -> bool {
        let found = self.accounts.iter().position(|a| a.cr3 == cr3 && a.on);
        self.current = found.unwrap_or(usize::MAX);
        found.is_some()
    }

    /// What it takes to run a program for no time at all, in ticks.
    pub fn switch(&self) -> i64 {
        if self.switch == 0 { SWITCH_US * self.rate as i64 } else { self.switch }
    }

    /// It has been measured.
    pub fn stops_take(&mut self, ticks: u64) {
        self.switch = ticks as i64;
    }

    /// The program had the processor for so long, the way there and back included.
    pub fn ran(&mut self, ticks: u64, left: Reason) {
        let (rate, switch) = (self.rate as i64, self.switch());
        let Some(account) = self.accounts.get_mut(self.current) else { return };
        let program = (ticks as i64 - switch).max(0);
        account.balance += (left.gain() - 2) * program / 2;
        let cost = left.cost_us() * switch / SWITCH_US;
        if left == Reason::Page {
            account.pay_for_pages(cost)
        } else {
            account.balance -= cost
        }
        if account.balance > MOST_US * rate {
            account.balance = MOST_US * rate;
            account.rested = 0;
        }
    }

    /// The program's pages took so long.
    pub fn pay(&mut self, ticks: u64) {
        if let Some(account) = self.accounts.get_mut(self.current) {
            account.pay_for_pages(ticks as i64);
        }
    }

    /// Whether the current one's credit is spent: then it rests.
    pub fn is_empty(&mut self) -> bool {
        let Some(account) = self.accounts.get_mut(self.current).filter(|a| a.balance < 0) else { return false };
        account.rested = (account.rested * 2).clamp(FIRST_REST_US, LONGEST_REST_US);
        account.rests_until = crate::host::rdtsc() + account.rested * self.rate;
        account.on = false;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HZ: u64 = 1_000_000_000;
    /// Ticks of four milliseconds, as a guest's timer gives them.
    const TICK: u64 = HZ / 250;

    /// On a processor that nobody else wants.
    fn at(clock: u64, left: u64) -> Now {
        Now { clock, worked: clock, left }
    }

    /// Interrupts a program this often; whether it is to run directly then.
    fn interrupt(accounts: &mut Accounts, process: u64, now: &mut u64, times: u32) -> bool {
        let mut on = false;
        for _ in 0..times {
            *now += TICK;
            on = accounts.tick(0x1000, process, at(*now, 0), HZ);
        }
        on
    }

    #[test]
    fn a_program_gets_credit_once_interrupts_find_it_again_and_again() {
        let (mut accounts, mut now) = (Accounts::default(), 0);
        assert!(!interrupt(&mut accounts, 1, &mut now, 1));
        assert!(interrupt(&mut accounts, 1, &mut now, TICKS));
        assert!(accounts.select(0x1000) && !accounts.select(0x2000));
        // Another process with its CR3 has to earn that itself.
        assert!(!interrupt(&mut accounts, 2, &mut now, 1));
        assert!(!accounts.select(0x1000));
    }

    #[test]
    fn interrupts_that_are_far_apart_say_nothing() {
        let mut accounts = Accounts::default();
        let on = (1..50).any(|n| accounts.tick(0x1000, 1, at(n * 2 * APART_MS * HZ / 1000, 0), HZ));
        assert!(!on);
    }

    #[test]
    fn a_program_that_is_always_in_the_kernel_gets_no_credit() {
        let mut accounts = Accounts::default();
        assert!(!(1..50).any(|n| accounts.tick(0x1000, 1, at(n * TICK, n * 100_000), HZ)));
    }

    /// Three interrupts with a system call between each and the next, then twelve system calls, all within 400 us.
    #[test]
    fn what_happens_between_two_interrupts_of_a_busy_device_says_nothing() {
        let mut accounts = Accounts::default();
        let us = HZ / 1_000_000;
        let mut tick = |cycle: u64, n: u64| {
            let now = at((400 * cycle + 60 * n) * us, 15 * cycle + n);
            accounts.tick(0x1000, 1, now, HZ)
        };
        assert!(!(1..1000).any(|cycle| (0..4).any(|n| tick(cycle, n))));
    }

    #[test]
    fn a_program_with_credit_keeps_it_when_interrupts_come_soon() {
        let mut accounts = Accounts::default();
        let mut now = 0;
        assert!(interrupt(&mut accounts, 1, &mut now, 5));
        assert!((1..5).all(|n| accounts.tick(0x1000, 1, at(now + n * HZ / 10_000, 3 * n), HZ)));
        assert!(!accounts.tick(0x1000, 2, at(now + HZ / 10_000, 0), HZ), "another process has none");
    }

    #[test]
    fn a_program_that_waits_for_the_hosts_processor_does_not_compute() {
        let mut accounts = Accounts::default();
        // Fifty system calls in each tick, of which it had the processor for a tenth.
        let now = |n: u64| Now { clock: n * TICK, worked: n * TICK / 10, left: n * 50 };
        assert!(!(1..50).any(|n| accounts.tick(0x1000, 1, now(n), HZ)));
        assert!((1..50).any(|n| accounts.tick(0x2000, 1, Now { left: n * 5, ..now(n + 50) }, HZ)));
    }

    #[test]
    fn a_program_that_has_spent_its_credit_rests_longer_each_time() {
        let (mut accounts, mut now) = (Accounts::default(), crate::host::rdtsc());
        let mut rests = Vec::new();
        for _ in 0..3 {
            assert!(interrupt(&mut accounts, 1, &mut now, 2000), "it gets another credit");
            assert!(!accounts.is_empty());
            while !accounts.is_empty() {
                accounts.ran(0, Reason::Fault);
            }
            assert!(!accounts.select(0x1000));
            assert!(!interrupt(&mut accounts, 1, &mut crate::host::rdtsc(), 3), "not yet");
            rests.push(accounts.accounts[0].rested);
        }
        assert!(rests.is_sorted_by(|a, b| a < b), "{rests:?}");
    }

    /// Stretches of 10 us pay where a stop takes 4 us, not where it takes 20.
    #[test]
    fn what_a_stop_takes_is_the_hosts() {
        for (switch, pays) in [(4, true), (20, false)] {
            let mut accounts = Accounts::default();
            assert!(interrupt(&mut accounts, 1, &mut 0, 5));
            let us = HZ / 1_000_000;
            accounts.stops_take(switch * us);
            let spent = (0..10_000).any(|_| {
                accounts.ran((switch + 10) * us, Reason::Kernel);
                accounts.is_empty()
            });
            assert_eq!(spent, !pays, "{switch}");
        }
    }

    #[test]
    fn a_program_that_computes_keeps_its_credit() {
        let (mut accounts, mut now) = (Accounts::default(), 0);
        assert!(interrupt(&mut accounts, 1, &mut now, 5));
        for _ in 0..10_000 {
            accounts.ran(HZ / 1000, Reason::Kernel);
            assert!(!accounts.is_empty());
        }
        // But not more than that of a while.
        let mut stops = 0;
        while !accounts.is_empty() {
            accounts.ran(0, Reason::Fault);
            stops += 1;
        }
        assert!(stops < 100_000, "{stops}");
    }

    #[test]
    fn there_are_no_more_accounts_than_there_is_room_for() {
        let mut accounts = Accounts::default();
        for n in 0..4 * ACCOUNTS as u64 {
            accounts.tick(n << 12, 1, at(n * TICK, 0), HZ);
        }
        assert_eq!(accounts.accounts.len(), ACCOUNTS);
    }
}
