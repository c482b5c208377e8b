//! Large pages of the host's where a vCPU's tables are in use all over.
//!
//! Emitted code reads the jump table and the software TLB at addresses that are as good as random, and megabytes of them. In
//! pages of 4 KiB most of these reads miss the processor's own TLB, and in a virtual machine a miss is dear. So a part of the
//! table as large as a large page becomes one as soon as nearly all of it has been written to: then it takes no more memory.

/// The size of a large page, and of the others.
pub const LARGE_PAGE: usize = 2 << 20;
const SMALL_PAGE: usize = 4096;
const PAGES: usize = LARGE_PAGE / SMALL_PAGE;
/// Pages of one that have to be in use.
const DENSE: usize = PAGES - PAGES / 8;

/// Which pages of a table have been written to.
pub struct Touched {
    /// A bit each.
    pages: Vec<u64>,
    /// How many of each large page.
    counts: Vec<u16>,
    /// A large page that has just become dense.
    dense: Option<usize>,
}

impl Touched {
    pub fn new(length: usize) -> Self {
        let large = length.div_ceil(LARGE_PAGE);
        Touched { pages: vec![0; large * PAGES / 64], counts: vec![0; large], dense: None }
    }

    /// The byte at an offset is about to be written.
    pub fn note(&mut self, offset: usize) {
        let page = offset / SMALL_PAGE;
        let Some(word) = self.pages.get_mut(page / 64) else { return };
        if *word & 1 << (page % 64) != 0 {
            return;
        }
        *word |= 1 << (page % 64);
        let count = &mut self.counts[page / PAGES];
        *count += 1;
        if usize::from(*count) == DENSE {
            self.dense = Some(page / PAGES);
        }
    }

    /// A large page that has become dense since this was last asked, by its number.
    pub fn take_dense(&mut self) -> Option<usize> {
        self.dense.take()
    }

    /// Nothing of a range of large pages is in use any more.
    pub fn forget(&mut self, range: std::ops::Range<usize>) {
        self.pages[range.start * PAGES / 64..range.end * PAGES / 64].fill(0);
        self.counts[range.clone()].fill(0);
        self.dense = self.dense.filter(|large| !range.contains(large));
    }
}

/// Lets the host back the memory at `start`, a large page, by one. On hosts that can't do that nothing changes.
///
/// # Safety
/// It must be mapped, and anonymous.
pub unsafe fn enlarge(start: *mut u8) {
    // SAFETY: what the memory holds stays the same, as seen by all threads.
    unsafe { libc::madvise(start.cast(), LARGE_PAGE, libc::MADV_COLLAPSE) };
}

/// Whether nearly all of `length` bytes at `start`, a page's beginning, are in memory.
///
/// # Safety
/// They must be mapped, and be no more than a large page.
pub unsafe fn is_dense(start: *mut u8, length: usize) -> bool {
    let mut resident = [0_u8; PAGES];
    let pages = length.div_ceil(SMALL_PAGE);
    assert!(pages <= PAGES, "more than a large page");
    // SAFETY: there is room for a byte for each page.
    let known = unsafe { libc::mincore(start.cast(), length, resident.as_mut_ptr()) } == 0;
    known && resident.iter().filter(|&&page| page & 1 != 0).count() >= pages - pages / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_page_is_dense_once_most_of_its_pages_were_written_to() {
        let mut touched = Touched::new(3 * LARGE_PAGE);
        let second = LARGE_PAGE..2 * LARGE_PAGE;
        for offset in second.clone().step_by(SMALL_PAGE).take(DENSE - 1) {
            touched.note(offset);
            touched.note(offset + 8);
        }
        assert_eq!(touched.take_dense(), None);
        touched.note(second.end - 1);
        assert_eq!(touched.take_dense(), Some(1));
        assert_eq!(touched.take_dense(), None, "once is enough");
        touched.note(second.end);
        assert_eq!(touched.take_dense(), None);
    }

    #[test]
    fn what_was_given_back_has_to_become_dense_again() {
        let mut touched = Touched::new(2 * LARGE_PAGE);
        let fill = |touched: &mut Touched| (0..LARGE_PAGE).step_by(SMALL_PAGE).for_each(|offset| touched.note(offset));
        fill(&mut touched);
        touched.forget(0..1);
        assert_eq!(touched.take_dense(), None);
        fill(&mut touched);
        assert_eq!(touched.take_dense(), Some(0));
    }
}
