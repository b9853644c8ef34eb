//! Worker threads of the engine, and how a step gets onto them without an allocation.
//!
//! Rayon takes work from outside its pool through a queue that allocates a block every so many jobs; work that starts inside
//! needs none. So one thread of the pool stays at a desk: it takes a step from the caller by address, runs it as a
//! member of the pool, where all further splitting is free, and reports back.
#![allow(unsafe_code, reason = "a borrowed closure is handed to a thread that outlives it")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::ThreadPool;

use crate::error::{Error, Result};

/// Rounds in which a waiting thread lets others run before it sleeps, as rayon's own workers do: at a step every few
/// microseconds the other side answers within them.
const PATIENT_ROUNDS: usize = 32;

/// A pool with one thread at the desk.
pub(super) struct Crew {
    pool: ThreadPool,
    desk: Arc<Desk>,
}

#[derive(Default)]
struct Desk {
    /// A caller has the desk.
    taken: AtomicBool,
    /// Hints for spinning; what counts is `letter`.
    posted: AtomicBool,
    answered: AtomicBool,
    letter: Mutex<Letter>,
    at_work: Condvar,
    at_caller: Condvar,
}

#[derive(Default)]
enum Letter {
    #[default]
    Empty,
    Work(Work),
    Running,
    Done,
    Closed,
}

/// Address of a closure on the caller's stack.
struct Work(*mut (dyn FnMut() + Send + 'static));

// SAFETY: the closure is `Send`, and the caller does not touch it while the letter is out.
unsafe impl Send for Work {}

impl Crew {
    /// `num_threads` threads, the one at the desk included; 0 = one per core, or as many as `RAYON_NUM_THREADS` says.
    ///
    /// # Errors
    /// [`Error::Pool`] when the threads cannot be started.
    pub(super) fn start(num_threads: usize) -> Result<Self> {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(num_threads);
        let pool = builder
            .thread_name(|i| format!("floe-{i}"))
            // The first look into a queue registers the thread with its memory reclamation, which allocates.
            .start_handler(|_| drop(crossbeam::epoch::pin()))
            .build()
            .map_err(|e| Error::Pool { threads: num_threads, reason: e.to_string() })?;
        // All of them have started when this returns, not sometime during the first steps.
        pool.broadcast(|_| ());
        let desk = Arc::new(Desk::default());
        let at_desk = desk.clone();
        pool.spawn(move || at_desk.serve());
        Ok(Self { pool, desk })
    }

    /// Runs `work` inside the pool and waits for it. Allocates nothing, unless somebody else is being served: then the work
    /// queues for the other threads.
    pub(super) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        if self.pool.current_thread_index().is_some() {
            return work();
        }
        if self.desk.taken.swap(true, Ordering::Acquire) {
            return if self.pool.current_num_threads() > 1 { self.pool.install(work) } else { work() };
        }
        let mut work = Some(work);
        let mut result = None;
        let mut call = || result = work.take().map(|work| catch_unwind(AssertUnwindSafe(work)));
        self.desk.post(&mut call);
        self.desk.taken.store(false, Ordering::Release);
        match result.expect("the desk runs what is posted before it answers") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        *self.desk.open() = Letter::Closed;
        self.desk.posted.store(true, Ordering::Release);
        self.desk.at_work.notify_one();
    }
}

impl Desk {
    /// The lock of the standard library: parking_lot's table of waiting threads grows with the first wait of each. Nothing
    /// panics under it, so it is never poisoned.
    fn open(&self) -> MutexGuard<'_, Letter> {
        self.letter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `call` to the thread at the desk and returns when it has run.
    fn post(&self, call: &mut (dyn FnMut() + Send)) {
        let call: *mut (dyn FnMut() + Send + '_) = call;
        // SAFETY: only the lifetime changes. This function does not return, nor unwind, before the thread at the desk has
        // run the closure and put `Done` on the desk; it keeps no copy of the address.
        let call = unsafe {
            std::mem::transmute::<*mut (dyn FnMut() + Send + '_), *mut (dyn FnMut() + Send + 'static)>(call)
        };
        *self.open() = Letter::Work(Work(call));
        self.posted.store(true, Ordering::Release);
        self.at_work.notify_one();
        patiently(&self.answered);
        let mut letter = self.open();
        while !matches!(*letter, Letter::Done) {
            letter = self.at_caller.wait(letter).unwrap_or_else(PoisonError::into_inner);
        }
        *letter = Letter::Empty;
        self.answered.store(false, Ordering::Release);
    }

    fn serve(&self) {
        loop {
            patiently(&self.posted);
            let mut letter = self.open();
            let Work(call) = loop {
                match std::mem::replace(&mut *letter, Letter::Running) {
                    Letter::Work(work) => break work,
                    Letter::Closed => return,
                    other => *letter = other,
                }
                letter = self.at_work.wait(letter).unwrap_or_else(PoisonError::into_inner);
            };
            self.posted.store(false, Ordering::Release);
            drop(letter);
            // SAFETY: the caller waits in `post` and keeps the closure alive and untouched; it catches its own panics.
            unsafe { (*call)() };
            *self.open() = Letter::Done;
            self.answered.store(true, Ordering::Release);
            self.at_caller.notify_one();
        }
    }
}

/// Waits a little for a hint; whoever waits in earnest sleeps afterwards.
fn patiently(hint: &AtomicBool) {
    for _ in 0..PATIENT_ROUNDS {
        if hint.load(Ordering::Acquire) {
            return;
        }
        std::thread::yield_now();
    }
}

/// Runs `work` on the engine's own threads; without such, on those of the pool that the caller is in, or on the crew that
/// all engines of the process share.
pub(super) fn on_threads<R: Send>(own: Option<&Crew>, work: impl FnOnce() -> R + Send) -> R {
    static SHARED: OnceLock<Option<Crew>> = OnceLock::new();
    match own {
        Some(crew) => crew.run(work),
        None if rayon::current_thread_index().is_some() => work(),
        // A machine that cannot start threads still has rayon's own way of making do.
        None => match SHARED.get_or_init(|| Crew::start(0).ok()) {
            Some(crew) => crew.run(work),
            None => work(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn work_runs_in_the_pool_on_borrowed_data_and_comes_back() {
        for threads in [1, 3] {
            let crew = Crew::start(threads).unwrap();
            let mut numbers = vec![1u64; 1000];
            for round in 0..200 {
                let sum: u64 = crew.run(|| {
                    assert_eq!(rayon::current_num_threads(), threads);
                    numbers.par_iter_mut().for_each(|x| *x += 1);
                    crew.run(|| numbers.par_iter().sum())
                });
                assert_eq!(sum, 1000 * (round + 2));
            }
        }
    }

    #[test]
    fn callers_at_once_are_all_served() {
        let crew = Crew::start(2).unwrap();
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..6u64)
                .map(|i| {
                    let crew = &crew;
                    scope.spawn(move || (0..300).map(|j| crew.run(|| i * j)).sum::<u64>())
                })
                .collect();
            for (i, caller) in (0u64..).zip(callers) {
                assert_eq!(caller.join().unwrap(), i * 299 * 150);
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_desk_goes_on() {
        let crew = Crew::start(1).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| crew.run(|| assert_eq!(1 + 1, 3))));
        assert!(panicked.is_err());
        assert_eq!(crew.run(|| 7), 7);
    }
}
