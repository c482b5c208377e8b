//! Links to other pages.
//!
//! A direct branch to another page leads where the page tables say, and those are another address space's sooner or later.
//! But a global page is in the same place in all of them, until a flush that concerns global pages: the processor may go on
//! using what it knows of it whatever CR3 is (Intel SDM 3A 4.10.2.4). So kernels' branches, most of which lead to other
//! pages, are linked if the target's pages are global, whatever the branch's own page is, and all of these links are undone
//! when what is known of global pages is forgotten. Where code is not in a global page itself, its branches are not made to be
//! linked: one that can't be asks the dispatcher each time.

use super::{Cache, LinkId};

impl Cache {
    /// Global pages may be elsewhere: undoes all links that go by them. One that was made of another branch since loses nothing
    /// but time.
    pub fn unlink_far(&mut self) {
        let links = std::mem::take(&mut self.far_links);
        for link in links {
            if self.leads_somewhere(link) {
                self.unlink(link);
            }
        }
    }

    /// Whether one more link can be noted without a list that grows.
    pub fn has_room_for_link(&self) -> bool {
        self.far_links.len() < self.far_links.capacity()
    }

    /// Notes a link that goes by global pages.
    pub(super) fn note_far_link(&mut self, link: LinkId) {
        if self.far_links.len() == self.far_links.capacity() {
            let mut links = std::mem::take(&mut self.far_links);
            links.retain(|link| self.leads_somewhere(*link));
            links.sort_unstable();
            links.dedup();
            // With room for many more, or else it comes here again soon.
            links.reserve(links.len() / 2 + 64);
            self.far_links = links;
        }
        self.far_links.push(link);
    }

    fn leads_somewhere(&mut self, link: LinkId) -> bool {
        let there = self.blocks.get(link.block.index()).is_some_and(|b| b.live && link.index < b.link_count);
        there && self.link_state(link).to.is_some()
    }
}
