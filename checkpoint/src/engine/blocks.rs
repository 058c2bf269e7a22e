//! Which blocks of a file differ from those that were sent before: pure, by a hash of each block.
//!
//! Dirty bits of the kernel would not do: none of them is set by what a NIC writes. So every block is hashed inside the
//! pause, and the hash has to be quick above all. It has 64 bits: of 2^64 changed blocks one is taken for unchanged, which
//! is far from what memory itself gets wrong. And as nothing here comes from page tables, a block need not be a page:
//! messages are often shorter, and what lies beside them would be sent along.

use std::ops::Range;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_inline};

/// Bytes. A page has several, so that a hole of a file begins and ends with one.
pub const BLOCK: usize = 1024;

/// Blocks that are looked at together.
pub const CHUNK: usize = 4096;

/// What is known of a block: a hash.
pub type Print = u64;

/// All zeros, as in a fresh file.
const ZEROS: Print = print(&[0; BLOCK]);

/// What it takes to make the known blocks the present ones. Numbers are relative to the first block compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Of the present blocks, as many as were compared.
    pub prints: Vec<Print>,
    /// First block and number of blocks, in order, whose contents are `bytes`.
    pub runs: Vec<(u32, u32)>,
    pub bytes: Vec<u8>,
    /// Blocks that have become all zeros.
    pub zeros: Vec<(u32, u32)>,
}

impl Diff {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.zeros.is_empty()
    }
}

/// Compares whole blocks with what is known of them; what is not known is zeros. Blocks of `now` that are not in `data`
/// (ranges of their numbers, in order) are zeros, too, and not looked at. `now` may change meanwhile: a block that is sent
/// is the one that its print is of.
pub fn diff(known: &[Print], data: &[Range<usize>], now: &[u8]) -> Diff {
    let end = data.last().map_or(0, |range| range.end).min(now.len() / BLOCK);
    let mut diff = Diff { prints: Vec::with_capacity(end.max(known.len())), ..Diff::default() };
    let mut data = data.iter().peekable();
    for i in 0..end.max(known.len()) {
        let before = known.get(i).copied().unwrap_or(ZEROS);
        let block = i as u32;
        while data.next_if(|range| range.end <= i).is_some() {}
        if i >= end || data.peek().is_none_or(|range| i < range.start) {
            if before != ZEROS {
                add(&mut diff.zeros, block);
            }
            diff.prints.push(ZEROS);
            continue;
        }
        let here = &now[i * BLOCK..(i + 1) * BLOCK];
        if print(here) == before {
            diff.prints.push(before);
            continue;
        }
        let copied = diff.bytes.len();
        diff.bytes.extend_from_slice(here);
        let print = print(&diff.bytes[copied..]);
        if print != before && print != ZEROS {
            add(&mut diff.runs, block);
        } else {
            diff.bytes.truncate(copied);
            if print != before {
                add(&mut diff.zeros, block);
            }
        }
        diff.prints.push(print);
    }
    diff
}

/// One more block at the end of a list of runs.
fn add(runs: &mut Vec<(u32, u32)>, block: u32) {
    match runs.last_mut() {
        Some((first, count)) if *first + *count == block => *count += 1,
        _ => runs.push((block, 1)),
    }
}

/// The variant without a word that would hide the one beside it.
const fn print(block: &[u8]) -> Print {
    rapidhash_v3_inline::<true, false, true>(block, &DEFAULT_RAPID_SECRETS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(old: &mut [u8], diff: &Diff) {
        let mut bytes = diff.bytes.chunks_exact(BLOCK);
        for (first, count) in &diff.runs {
            for block in *first..first + count {
                let at = block as usize * BLOCK;
                old[at..at + BLOCK].copy_from_slice(bytes.next().unwrap());
            }
        }
        assert!(bytes.next().is_none(), "no more bytes than runs");
        for (first, count) in &diff.zeros {
            old[*first as usize * BLOCK..(first + count) as usize * BLOCK].fill(0);
        }
    }

    fn image(blocks: &[u8]) -> Vec<u8> {
        // One byte different is enough, wherever it is; content 0 is all zeros.
        let block = |seed: &u8| {
            let mut block = vec![0; BLOCK];
            block[usize::from(*seed) * 13] = *seed;
            block
        };
        blocks.iter().flat_map(block).collect()
    }

    /// A block of content 0 is a hole, or has memory: every second one.
    fn data(blocks: &[u8]) -> Vec<Range<usize>> {
        (0..blocks.len()).filter(|i| blocks[*i] != 0 || i % 2 == 0).map(|i| i..i + 1).collect()
    }

    proptest! {
        #[test]
        fn what_is_sent_makes_the_old_blocks_the_new_ones_and_is_not_sent_twice(
            rounds in proptest::collection::vec(proptest::collection::vec(0_u8..4, 1..40), 1..6),
        ) {
            let longest = rounds.iter().map(Vec::len).max().unwrap_or(0);
            let mut there = vec![0; longest * BLOCK];
            let mut known = Vec::new();
            for round in rounds {
                let mut now = image(&round);
                now.resize(there.len(), 0);
                let changed = now.chunks(BLOCK).zip(there.chunks(BLOCK)).filter(|(a, b)| a != b).count();
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
        assert_eq!((step.runs, step.bytes.len()), (vec![(0, 2), (3, 1)], 3 * BLOCK));
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
