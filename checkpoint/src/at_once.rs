//! One question put to many at the same time: agents and shims answer in their own time, and the slowest is waited for,
//! not all of them one after the other. A thread each, so it is for agents and processes, not for QPs.

use std::{panic, thread};

/// What `ask` says of each of `items`, in their order. A panic of one goes on in the caller.
pub(crate) fn at_once<T: Send, R: Send>(items: impl IntoIterator<Item = T>, ask: impl Fn(T) -> R + Sync) -> Vec<R> {
    let mut items: Vec<T> = items.into_iter().collect();
    // The caller is a thread, too.
    let Some(own) = items.pop() else { return Vec::new() };
    let ask = &ask;
    thread::scope(|scope| {
        let asked: Vec<_> = items.into_iter().map(|item| scope.spawn(move || ask(item))).collect();
        let own = ask(own);
        let mut said: Vec<R> =
            asked.into_iter().map(|t| t.join().unwrap_or_else(|p| panic::resume_unwind(p))).collect();
        said.push(own);
        said
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn all_are_asked_at_the_same_time_and_answers_stay_in_order() {
        let all_here = Barrier::new(5);
        let doubled = at_once(0..5, |n| {
            all_here.wait();
            n * 2
        });
        assert_eq!(doubled, [0, 2, 4, 6, 8]);
        assert_eq!(at_once(Vec::<u8>::new(), |n| n), Vec::<u8>::new());
    }

    #[test]
    #[should_panic(expected = "the second")]
    fn a_panic_of_one_is_the_callers() {
        at_once(["first", "second", "third"], |name| assert_ne!(name, "second", "the second"));
    }
}
