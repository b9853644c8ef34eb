//! Jobs of many owners, in the order in which they came.

use std::collections::VecDeque;

/// Jobs of one owner, of which one is done at a time. For every job that is put, some worker of a pool comes by in the order in which
/// all owners' jobs were put; whoever comes while a job is being done leaves the next one to whoever does that. So a worker goes on with
/// an owner's next job only when the turn of that job has come, and no owner waits for later jobs of another.
#[derive(Debug)]
pub(super) struct Turns<J> {
    jobs: VecDeque<J>,
    busy: bool,
    /// Turns that came while a job was being done.
    come: usize,
}

impl<J> Default for Turns<J> {
    fn default() -> Self {
        Self { jobs: VecDeque::new(), busy: false, come: 0 }
    }
}

impl<J> Turns<J> {
    pub(super) fn put(&mut self, job: J) {
        self.jobs.push_back(job);
    }

    /// A turn has come: what the worker is to do, if anything.
    pub(super) fn begin(&mut self) -> Option<J> {
        if self.busy {
            self.come += 1;
            return None;
        }
        self.take()
    }

    /// The job that was begun is done: what its worker is to do next, if anything.
    pub(super) fn next(&mut self) -> Option<J> {
        self.busy = false;
        self.come = self.come.checked_sub(1)?;
        self.take()
    }

    /// Forgets the jobs that are not begun.
    pub(super) fn clear(&mut self) {
        self.jobs.clear();
    }

    /// Whether there is nothing to do and nothing is being done.
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty() && !self.busy
    }

    fn take(&mut self) -> Option<J> {
        let job = self.jobs.pop_front();
        self.busy = job.is_some();
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_worker_does_the_jobs_of_all_owners_in_order() {
        let mut owners = [Turns::default(), Turns::default(), Turns::default()];
        // Turns come as jobs are put, whatever is put while one is being done.
        let mut queue: VecDeque<usize> = VecDeque::new();
        let mut done = Vec::new();
        for round in 0..3 {
            for (owner, turns) in owners.iter_mut().enumerate() {
                turns.put((owner, round));
                queue.push_back(owner);
            }
        }
        while let Some(owner) = queue.pop_front() {
            let mut job = owners[owner].begin();
            while let Some(now) = job {
                done.push(now);
                job = owners[owner].next();
            }
        }
        let want: Vec<_> = (0..3).flat_map(|round| (0..3).map(move |owner| (owner, round))).collect();
        assert_eq!(done, want);
        assert!(owners.iter().all(Turns::is_idle));
    }

    #[test]
    fn whoever_comes_too_early_leaves_the_job_to_the_one_at_work() {
        let mut turns = Turns::default();
        (1..=3).for_each(|job| turns.put(job));
        assert_eq!(turns.begin(), Some(1));
        assert_eq!(turns.begin(), None, "one at a time");
        assert_eq!(turns.next(), Some(2), "whose turn came");
        assert_eq!(turns.next(), None, "the turn of the third has not come");
        assert!(!turns.is_idle());
        assert_eq!(turns.begin(), Some(3));
        turns.put(4);
        turns.clear();
        assert_eq!((turns.begin(), turns.next()), (None, None), "nothing is left");
        assert!(turns.is_idle());
    }
}
