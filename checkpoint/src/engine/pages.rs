//! Which pages of a file differ from those that were sent before: pure, by a hash of each page.
//!
//! Dirty bits of the kernel would not do: none of them is set by what a NIC writes. So every page is hashed inside the
//! pause, and the hash has to be quick above all. It has 64 bits: of 2^64 changed pages one is taken for unchanged, which
//! is far from what memory itself gets wrong.

use std::ops::Range;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_inline};

/// Bytes.
pub const PAGE: usize = 4096;

/// Pages that are looked at together.
pub const CHUNK: usize = 1024;

/// What is known of a page: a hash.
pub type Print = u64;

/// All zeros, as in a fresh file.
const ZEROS: Print = print(&[0; PAGE]);

/// What it takes to make the known pages the present ones. Page numbers are relative to the first page compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Of the present pages, as many as were compared.
    pub prints: Vec<Print>,
    /// First page and number of pages, in order, whose contents are `bytes`.
    pub runs: Vec<(u32, u32)>,
    pub bytes: Vec<u8>,
    /// Pages that have become all zeros.
    pub zeros: Vec<(u32, u32)>,
}

impl Diff {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.zeros.is_empty()
    }
}

/// Compares whole pages with what is known of them; what is not known is zeros. Pages of `now` that are not in `data`
/// (ranges of page numbers, in order) are zeros, too, and not looked at. `now` may change meanwhile: a page that is sent
/// is the one that its print is of.
pub fn diff(known: &[Print], data: &[Range<usize>], now: &[u8]) -> Diff {
    let end = data.last().map_or(0, |range| range.end).min(now.len() / PAGE);
    let mut diff = Diff { prints: Vec::with_capacity(end.max(known.len())), ..Diff::default() };
    let mut data = data.iter().peekable();
    for i in 0..end.max(known.len()) {
        let before = known.get(i).copied().unwrap_or(ZEROS);
        let page = i as u32;
        while data.next_if(|range| range.end <= i).is_some() {}
        if i >= end || data.peek().is_none_or(|range| i < range.start) {
            if before != ZEROS {
                add(&mut diff.zeros, page);
            }
            diff.prints.push(ZEROS);
            continue;
        }
        let here = &now[i * PAGE..(i + 1) * PAGE];
        if print(here) == before {
            diff.prints.push(before);
            continue;
        }
        let copied = diff.bytes.len();
        diff.bytes.extend_from_slice(here);
        let print = print(&diff.bytes[copied..]);
        if print != before && print != ZEROS {
            add(&mut diff.runs, page);
        } else {
            diff.bytes.truncate(copied);
            if print != before {
                add(&mut diff.zeros, page);
            }
        }
        diff.prints.push(print);
    }
    diff
}

/// One more page at the end of a list of runs.
fn add(runs: &mut Vec<(u32, u32)>, page: u32) {
    match runs.last_mut() {
        Some((first, count)) if *first + *count == page => *count += 1,
        _ => runs.push((page, 1)),
    }
}

/// The variant without a word that would hide the one beside it.
const fn print(page: &[u8]) -> Print {
    rapidhash_v3_inline::<true, false, true>(page, &DEFAULT_RAPID_SECRETS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(old: &mut [u8], diff: &Diff) {
        let mut bytes = diff.bytes.chunks_exact(PAGE);
        for (first, count) in &diff.runs {
            for page in *first..first + count {
                let at = page as usize * PAGE;
                old[at..at + PAGE].copy_from_slice(bytes.next().unwrap());
            }
        }
        assert!(bytes.next().is_none(), "no more bytes than runs");
        for (first, count) in &diff.zeros {
            old[*first as usize * PAGE..(first + count) as usize * PAGE].fill(0);
        }
    }

    fn image(pages: &[u8]) -> Vec<u8> {
        // One byte different is enough, wherever it is; page content 0 is all zeros.
        let page = |seed: &u8| {
            let mut page = vec![0; PAGE];
            page[usize::from(*seed) * 13] = *seed;
            page
        };
        pages.iter().flat_map(page).collect()
    }

    /// A page of content 0 is a hole, or has memory: every second one.
    fn data(pages: &[u8]) -> Vec<Range<usize>> {
        (0..pages.len()).filter(|i| pages[*i] != 0 || i % 2 == 0).map(|i| i..i + 1).collect()
    }

    proptest! {
        #[test]
        fn what_is_sent_makes_the_old_pages_the_new_ones_and_is_not_sent_twice(
            rounds in proptest::collection::vec(proptest::collection::vec(0_u8..4, 1..40), 1..6),
        ) {
            let longest = rounds.iter().map(Vec::len).max().unwrap_or(0);
            let mut there = vec![0; longest * PAGE];
            let mut known = Vec::new();
            for round in rounds {
                let mut now = image(&round);
                now.resize(there.len(), 0);
                let changed = now.chunks(PAGE).zip(there.chunks(PAGE)).filter(|(a, b)| a != b).count();
                let step = diff(&known, &data(&round), &now);
                let sent: u32 = step.runs.iter().chain(&step.zeros).map(|(_, n)| n).sum();
                prop_assert_eq!(sent as usize, changed);
                apply(&mut there, &step);
                prop_assert_eq!(&there, &now);
                known = step.prints;
                prop_assert!(diff(&known, &data(&round), &now).is_empty());
            }
        }
    }

    #[test]
    fn neighbours_go_as_one_run() {
        let step = diff(&[], &data(&[1, 2, 0, 3]), &image(&[1, 2, 0, 3]));
        assert_eq!((step.runs, step.bytes.len()), (vec![(0, 2), (3, 1)], 3 * PAGE));
        assert!(step.zeros.is_empty(), "a fresh file is zeros");
    }

    #[test]
    fn what_has_no_memory_is_not_looked_at() {
        let known = diff(&[], &data(&[1, 2, 3]), &image(&[1, 2, 3])).prints;
        let step = diff(&known, &data(&[1, 2, 3])[1..2], &image(&[9, 2, 9]));
        assert_eq!((step.runs, step.zeros), (vec![], vec![(0, 1), (2, 1)]));
        let shorter = diff(&known, &data(&[1, 2, 3]), &image(&[1]));
        assert_eq!((shorter.runs, shorter.zeros), (vec![], vec![(1, 2)]), "a view ends with its file");
    }
}
