//! Life-cycles: which states a hot slot and a stored page may be in, and the only function that moves them on.
//!
//! ```text
//! slot   Free ──Fetch──> Loading ──Arrive──> Resident ──Evict──> Leaving ──Release──> Free
//!        Loading ──Fail──> Free
//! page   Open ──Seal──> Warm ──Write──> Writing ──Durable──> Backed ──Drop──> Cold ──Verify──> Mapped
//!        Writing ──Fail──> Warm        Mapped ──Load──> Backed        Cold ──Reject──> Damaged        readable ones ──Reopen──> Open
//! ```

/// State of one slot of the hot tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotLife {
    /// Holds nothing.
    Free,
    /// A transfer is filling it.
    Loading,
    /// Its unit can be attended.
    Resident,
    /// Chosen for eviction; nobody may start to read it.
    Leaving,
}

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotEvent {
    /// A transfer into it is submitted.
    Fetch,
    /// The transfer is complete.
    Arrive,
    /// The transfer failed.
    Fail,
    /// A policy chose it as a victim.
    Evict,
    /// The last reader is gone.
    Release,
}

/// State of one page in host memory and on disk. Warm memory is the authoritative copy until the cold one is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageLife {
    /// Tokens are still being added.
    Open,
    /// Complete, in host memory only.
    Warm,
    /// Complete, being written to disk.
    Writing,
    /// Complete, in host memory and durable on disk.
    Backed,
    /// On disk only, checksum not yet checked.
    Cold,
    /// On disk only, mapped, checksum checked.
    Mapped,
    /// On disk only, and what is there is not what was written. Final.
    Damaged,
}

/// What happens to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageEvent {
    /// Its last token arrived.
    Seal,
    /// Tokens were cut off (truncation), more may follow.
    Reopen,
    /// Write-back is submitted.
    Write,
    /// The write is complete and flushed.
    Durable,
    /// The write failed.
    Fail,
    /// Its warm memory is given up.
    Drop,
    /// Its checksum was compared and fits.
    Verify,
    /// Its checksum was compared and differs.
    Reject,
    /// It was copied back into memory of our own.
    Load,
}

/// An event that the state does not allow: a fault of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("life-cycle: {event:?} is not allowed in state {state:?}")]
pub struct IllegalTransition<S: std::fmt::Debug, E: std::fmt::Debug> {
    /// State before.
    pub state: S,
    /// Refused event.
    pub event: E,
}

impl SlotLife {
    /// The state after `event`.
    ///
    /// # Errors
    /// [`IllegalTransition`] when the life-cycle has no such edge.
    pub const fn next(self, event: SlotEvent) -> Result<Self, IllegalTransition<Self, SlotEvent>> {
        match (self, event) {
            (Self::Free, SlotEvent::Fetch) => Ok(Self::Loading),
            (Self::Loading, SlotEvent::Arrive) => Ok(Self::Resident),
            (Self::Loading, SlotEvent::Fail) => Ok(Self::Free),
            (Self::Resident, SlotEvent::Evict) => Ok(Self::Leaving),
            (Self::Leaving, SlotEvent::Release) => Ok(Self::Free),
            (state, event) => Err(IllegalTransition { state, event }),
        }
    }
}

impl PageLife {
    /// The state after `event`.
    ///
    /// # Errors
    /// [`IllegalTransition`] when the life-cycle has no such edge. In particular nothing leads out of
    /// [`PageLife::Damaged`], and no page loses its warm copy before the cold one is durable.
    pub const fn next(self, event: PageEvent) -> Result<Self, IllegalTransition<Self, PageEvent>> {
        match (self, event) {
            (Self::Open, PageEvent::Seal) | (Self::Writing, PageEvent::Fail) => Ok(Self::Warm),
            (Self::Warm, PageEvent::Write) => Ok(Self::Writing),
            (Self::Writing, PageEvent::Durable) | (Self::Mapped, PageEvent::Load) => Ok(Self::Backed),
            (Self::Backed, PageEvent::Drop) => Ok(Self::Cold),
            (Self::Cold | Self::Mapped, PageEvent::Verify) => Ok(Self::Mapped),
            (Self::Cold, PageEvent::Reject) => Ok(Self::Damaged),
            // A cut page is copied back into memory of its own; an unverified one is not, since nobody may read it.
            (Self::Open | Self::Warm | Self::Writing | Self::Backed | Self::Mapped, PageEvent::Reopen) => {
                Ok(Self::Open)
            }
            (state, event) => Err(IllegalTransition { state, event }),
        }
    }

    /// Whether attention may read the page where it lies.
    #[must_use]
    pub const fn is_readable(self) -> bool {
        !matches!(self, Self::Cold | Self::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: [PageLife; 7] = [
        PageLife::Open,
        PageLife::Warm,
        PageLife::Writing,
        PageLife::Backed,
        PageLife::Cold,
        PageLife::Mapped,
        PageLife::Damaged,
    ];
    const PAGE_EVENTS: [PageEvent; 9] = [
        PageEvent::Seal,
        PageEvent::Reopen,
        PageEvent::Write,
        PageEvent::Durable,
        PageEvent::Fail,
        PageEvent::Drop,
        PageEvent::Verify,
        PageEvent::Reject,
        PageEvent::Load,
    ];

    #[test]
    fn a_slot_has_five_edges_and_returns_to_free() {
        let states = [SlotLife::Free, SlotLife::Loading, SlotLife::Resident, SlotLife::Leaving];
        let events =
            [SlotEvent::Fetch, SlotEvent::Arrive, SlotEvent::Fail, SlotEvent::Evict, SlotEvent::Release];
        let edges = states.iter().flat_map(|s| events.iter().map(|e| s.next(*e))).filter(Result::is_ok);
        assert_eq!(edges.count(), 5);
        let round = [SlotEvent::Fetch, SlotEvent::Arrive, SlotEvent::Evict, SlotEvent::Release];
        let end = round.iter().try_fold(SlotLife::Free, |state, event| state.next(*event));
        assert_eq!(end.unwrap(), SlotLife::Free);
    }

    #[test]
    fn warm_memory_goes_only_after_the_cold_copy_is_durable() {
        for state in PAGES {
            assert_eq!(state.next(PageEvent::Drop).is_ok(), state == PageLife::Backed, "{state:?}");
        }
    }

    #[test]
    fn an_unverified_page_is_never_readable_and_damage_is_final() {
        for state in PAGES {
            for event in PAGE_EVENTS {
                let Ok(next) = state.next(event) else { continue };
                assert_ne!(state, PageLife::Damaged);
                if !state.is_readable() && next.is_readable() {
                    assert_eq!(event, PageEvent::Verify);
                }
            }
        }
        let refusal = PageLife::Damaged.next(PageEvent::Verify).unwrap_err().to_string();
        assert!(refusal.contains("Verify") && refusal.contains("Damaged"), "{refusal}");
    }
}
