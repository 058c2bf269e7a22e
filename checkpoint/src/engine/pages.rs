//! Which pages of a file differ from those that were sent before: pure, by a hash of each page.
//!
//! Dirty bits of the kernel would not do: none of them is set by what a NIC writes.

use xxhash_rust::xxh3::xxh3_128;

/// Bytes.
pub const PAGE: usize = 4096;

/// Pages that are looked at together.
pub const CHUNK: usize = 1024;

/// What is known of a page: 0 for one that is all zeros (as in a fresh file), else a hash.
pub type Print = u128;

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

/// Compares whole pages with what is known of them; what is not known is zeros.
pub fn diff(known: &[Print], now: &[u8]) -> Diff {
    let mut diff = Diff { prints: Vec::with_capacity(now.len() / PAGE), ..Diff::default() };
    for (i, page) in now.chunks_exact(PAGE).enumerate() {
        let print = print(page);
        diff.prints.push(print);
        if known.get(i).copied().unwrap_or(0) == print {
            continue;
        }
        let list = if print == 0 { &mut diff.zeros } else { &mut diff.runs };
        match list.last_mut() {
            Some((first, count)) if *first + *count == i as u32 => *count += 1,
            _ => list.push((i as u32, 1)),
        }
        if print != 0 {
            diff.bytes.extend_from_slice(page);
        }
    }
    diff
}

fn print(page: &[u8]) -> Print {
    if is_zero(page) {
        return 0;
    }
    xxh3_128(page).max(1)
}

/// Whether all is zero.
fn is_zero(page: &[u8]) -> bool {
    // Slices are compared many bytes at a time.
    page.chunks(PAGE).all(|part| *part == [0; PAGE][..part.len()])
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
                let step = diff(&known, &now);
                let sent: u32 = step.runs.iter().chain(&step.zeros).map(|(_, n)| n).sum();
                prop_assert_eq!(sent as usize, changed);
                apply(&mut there, &step);
                prop_assert_eq!(&there, &now);
                known = step.prints;
                prop_assert!(diff(&known, &now).is_empty());
            }
        }
    }

    #[test]
    fn neighbours_go_as_one_run() {
        let step = diff(&[], &image(&[1, 2, 0, 3]));
        assert_eq!((step.runs, step.bytes.len()), (vec![(0, 2), (3, 1)], 3 * PAGE));
        assert!(step.zeros.is_empty(), "a fresh file is zeros");
    }
}
