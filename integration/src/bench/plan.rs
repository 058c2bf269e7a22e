//! What is measured in which order. Pure: it knows neither the lab nor what was measured already.
//!
//! A round holds every wanted measurement once, in an order of its own, so that a lab that gets slower or faster with
//! time does so for all of them alike; what is compared is compared within a round. The baseline is measured more often:
//! before and after every cell that is compared with it, since the lab changes its pace within minutes.

use super::statistics::Random;
use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is moved, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// No RDMA in use, moved by `migrrdma migrate`.
    A,
    /// RDMA, moved with pre-setup.
    B,
    /// RDMA, moved with `--no-pre-setup`.
    C,
    /// No RDMA in use, moved by `runc checkpoint`, a copy and `runc restore`.
    D,
}

impl Variant {
    /// All, in order.
    pub const ALL: [Variant; 4] = [Variant::A, Variant::B, Variant::C, Variant::D];

    /// Its letter.
    pub fn letter(self) -> char {
        match self {
            Variant::A => 'a',
            Variant::B => 'b',
            Variant::C => 'c',
            Variant::D => 'd',
        }
    }

    /// What it is, in a few words.
    pub fn title(self) -> &'static str {
        match self {
            Variant::A => "no RDMA in use",
            Variant::B => "RDMA, pre-setup",
            Variant::C => "RDMA, --no-pre-setup",
            Variant::D => "no RDMA in use, plain runc",
        }
    }

    /// Whether the container uses RDMA.
    pub fn rdma(self) -> bool {
        matches!(self, Variant::B | Variant::C)
    }

    /// Variants from their letters.
    pub fn from_letters(letters: &str) -> Result<Vec<Variant>> {
        let mut all = Vec::new();
        for c in letters.chars() {
            let Some(v) = Variant::ALL.into_iter().find(|v| v.letter() == c) else {
                bail!("variant {c:?}: there are a, b, c and d, as in --variants ab");
            };
            if !all.contains(&v) {
                all.push(v);
            }
        }
        ensure!(!all.is_empty(), "--variants names none");
        all.sort();
        Ok(all)
    }
}

/// What a container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cell {
    /// QPs in all; 0 without RDMA.
    pub qps: u16,
    /// MiB of memory registered, or held without RDMA, in all.
    pub registered: u32,
    /// Processes in the container, each with a peer process of its own; QPs and memory are dealt out evenly.
    pub peers: u16,
}

impl Cell {
    /// The cell without RDMA that this one is compared with.
    pub fn baseline(self) -> Cell {
        Cell { qps: 0, ..self }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.qps > 0 {
            write!(f, "{} QPs, ", self.qps)?;
        }
        write!(f, "{} MiB, {} peer{}", self.registered, self.peers, if self.peers == 1 { "" } else { "s" })
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Item {
    /// Counted from 0; what is compared has the same number.
    pub round: u32,
    /// What is moved.
    pub variant: Variant,
    /// With how much.
    #[serde(flatten)]
    pub cell: Cell,
    /// Which of several alike in the round; only of variant a are there several.
    #[serde(default)]
    pub nth: u16,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// Numbers of QPs.
    pub qps: Vec<u16>,
    /// MiB registered.
    pub registered: Vec<u32>,
    /// Numbers of peers.
    pub peers: Vec<u16>,
    /// Variants.
    pub variants: Vec<Variant>,
    /// Rounds.
    pub repeats: u32,
}

impl Matrix {
    /// Refuses what the checker or the nodes cannot do.
    pub fn check(&self) -> Result<()> {
        ensure!(self.repeats > 0, "--repeats must be at least 1");
        for (what, empty) in [
            ("--qps", self.qps.is_empty()),
            ("--registered", self.registered.is_empty()),
            ("--peers", self.peers.is_empty()),
        ] {
            ensure!(!empty, "{what} names no number");
        }
        ensure!(self.qps.iter().all(|q| (1..=512).contains(q)), "--qps: 1 to 512 are possible");
        ensure!(self.peers.iter().all(|p| (1..=16).contains(p)), "--peers: 1 to 16 are possible");
        ensure!(self.registered.iter().all(|m| (1..=1024).contains(m)), "--registered: 1 to 1024 MiB are possible");
        ensure!(
            self.cells().iter().any(|c| c.qps > 0),
            "no combination of --qps, --registered and --peers can be dealt out evenly to the peers"
        );
        Ok(())
    }

    /// Every combination that can be dealt out evenly, each preceded by its baseline.
    pub fn cells(&self) -> Vec<Cell> {
        let mut all = Vec::new();
        for &registered in &self.registered {
            for &peers in self.peers.iter().filter(|p| registered % u32::from(**p) == 0) {
                all.push(Cell { qps: 0, registered, peers });
                let even = self.qps.iter().filter(|q| *q % peers == 0);
                all.extend(even.map(|&qps| Cell { qps, registered, peers }));
            }
        }
        all.sort();
        all.dedup();
        all
    }

    /// The measurements of one round in the order they are made.
    pub fn round(&self, round: u32) -> Vec<Item> {
        let mut random = Random::new(u64::from(round));
        let mut baselines: Vec<Cell> = self.cells().into_iter().filter(|c| c.qps == 0).collect();
        random.shuffle(&mut baselines);
        baselines.into_iter().flat_map(|b| self.beside(round, b, &mut random)).collect()
    }

    /// A baseline and what is compared with it.
    fn beside(&self, round: u32, baseline: Cell, random: &mut Random) -> Vec<Item> {
        let wanted = |v: &Variant| self.variants.contains(v);
        let mut blocks: Vec<Vec<Item>> = Vec::new();
        for cell in self.cells().into_iter().filter(|c| c.qps > 0 && c.baseline() == baseline) {
            let rdma = self.variants.iter().filter(|v| v.rdma());
            let mut block: Vec<_> = rdma.map(|&variant| Item { round, variant, cell, nth: 0 }).collect();
            random.shuffle(&mut block);
            blocks.extend((!block.is_empty()).then_some(block));
        }
        random.shuffle(&mut blocks);
        let before = |nth| wanted(&Variant::A).then_some(Item { round, variant: Variant::A, cell: baseline, nth });
        let mut all: Vec<Item> = before(0).into_iter().collect();
        for (block, nth) in blocks.into_iter().zip(1..) {
            all.extend(block.into_iter().chain(before(nth)));
        }
        if wanted(&Variant::D) {
            let at = random.below(all.len() + 1);
            all.insert(at, Item { round, variant: Variant::D, cell: baseline, nth: 0 });
        }
        all
    }

    /// All measurements in the order they are made.
    pub fn items(&self) -> Vec<Item> {
        (0..self.repeats).flat_map(|r| self.round(r)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Matrix {
        Matrix {
            qps: vec![1, 8, 32],
            registered: vec![16],
            peers: vec![1, 2],
            variants: Variant::ALL.to_vec(),
            repeats: 3,
        }
    }

    #[test]
    fn every_round_holds_everything_once_and_rounds_differ_in_order() {
        let m = matrix();
        let sorted = |r| {
            let mut items: Vec<_> = m.round(r).iter().map(|i| (i.variant, i.cell, i.nth)).collect();
            items.sort();
            items
        };
        assert_eq!(sorted(0), sorted(1));
        // 3 × (b, c), 4 × a and d with one peer; 2 × (b, c), 3 × a and d with two: one QP has no second peer.
        assert_eq!(sorted(0).len(), 11 + 8);
        let alone: std::collections::BTreeSet<_> = sorted(0).into_iter().collect();
        assert_eq!(alone.len(), sorted(0).len());
        let order = |r| m.round(r).iter().map(|i| (i.variant, i.cell)).collect::<Vec<_>>();
        assert_ne!(order(0), order(1));
        assert_eq!(order(1), order(1));
        assert_eq!(m.items().len(), 3 * 19);
    }

    #[test]
    fn whatever_is_compared_with_a_baseline_has_one_before_and_one_after_it() {
        let m = Matrix { variants: Variant::from_letters("ab").unwrap(), ..matrix() };
        for round in 0..3 {
            let items = m.round(round);
            assert_eq!(items.len(), 7 + 5);
            for (at, item) in items.iter().enumerate().filter(|(_, i)| i.variant == Variant::B) {
                for beside in [&items[at - 1], &items[at + 1]] {
                    assert_eq!((beside.variant, beside.cell), (Variant::A, item.cell.baseline()));
                }
            }
        }
        let without = Matrix { variants: vec![Variant::B], ..matrix() };
        assert_eq!(without.round(0).len(), 5);
        let alone = Matrix { variants: vec![Variant::A], ..matrix() };
        assert_eq!(alone.round(0).len(), 2, "with nothing to compare, one of each amount");
    }

    #[test]
    fn more_repeats_begin_with_the_same_measurements() {
        let m = matrix();
        let more = Matrix { repeats: 5, ..matrix() };
        assert_eq!(m.items(), more.items()[..m.items().len()]);
    }

    #[test]
    fn letters_name_variants() {
        assert_eq!(Variant::from_letters("ba").unwrap(), [Variant::A, Variant::B]);
        assert!(Variant::from_letters("x").is_err() && Variant::from_letters("").is_err());
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_option_to_change() {
        assert!(matrix().check().is_ok());
        let bad = Matrix { qps: vec![0], ..matrix() };
        assert!(bad.check().unwrap_err().to_string().contains("--qps"));
        let uneven = Matrix { qps: vec![1], peers: vec![2], ..matrix() };
        assert!(uneven.check().is_err());
    }
}
