//! Where the registered memory of QPs comes from: every buffer has memory and a registration of its own, or all are parts
//! of one, as in programs that manage a pool.

use crate::layout::Layout;
use crate::link::Link;
use crate::verbs::{Memory, Mr, Pd};
use crate::workload::Workload;
use std::io;

const PAGE: usize = 4096;

/// Gives out registered memory, and keeps every registration until the end.
#[derive(Debug, Default)]
pub struct Buffers {
    made: Vec<Mr>,
    bytes: usize,
    pool: Option<Pool>,
}

#[derive(Debug)]
struct Pool {
    memory: Memory,
    mr: Mr,
    taken: usize,
}

/// How a buffer is registered, where it has a registration of its own.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The other end reads, writes, and does atomics there.
    pub remote: bool,
    /// By `ibv_reg_mr_iova2`.
    pub by_iova: bool,
}

impl Buffers {
    /// From now on buffers are parts of one registration in `pd`: of `total` bytes, or more if the QPs need more.
    ///
    /// # Errors
    /// When there is no memory, or as the library says.
    pub fn share(&mut self, pd: &Pd, w: &Workload, total: usize) -> io::Result<()> {
        let layout = Layout::new(w);
        let of_qp = [Link::send_bytes(w), layout.total(), layout.stride() * w.recv_depth as usize + LINE];
        let needed = of_qp.iter().map(|n| n.next_multiple_of(PAGE)).sum::<usize>() * usize::from(w.qps);
        let memory = Memory::map(needed.max(total).next_multiple_of(PAGE), 0)?;
        let mr = self.register(pd, &memory, Way { remote: true, by_iova: false })?;
        self.bytes = memory.len();
        self.pool = Some(Pool { memory, mr, taken: 0 });
        Ok(())
    }

    /// A buffer of `len` bytes that begins `skew` bytes into a page, registered.
    ///
    /// # Errors
    /// When there is no memory, or as the library says.
    pub fn take(&mut self, pd: &Pd, len: usize, skew: usize, way: Way) -> io::Result<(Memory, Mr)> {
        if let Some(pool) = &mut self.pool {
            let at = pool.taken + skew;
            pool.taken = (at + len).next_multiple_of(PAGE);
            return Ok((pool.memory.part(at, len), pool.mr));
        }
        let memory = Memory::map(len, skew)?;
        let mr = self.register(pd, &memory, way)?;
        self.bytes += len;
        Ok((memory, mr))
    }

    /// Registers a buffer once more; the same registration where all share one.
    ///
    /// # Errors
    /// As the library says.
    pub fn again(&mut self, pd: &Pd, memory: &Memory, way: Way) -> io::Result<Mr> {
        match &self.pool {
            Some(pool) => Ok(pool.mr),
            None => self.register(pd, memory, way),
        }
    }

    /// Fills memory that is used by nobody, so that `total` bytes are registered in all; `None` if there are as many.
    ///
    /// # Errors
    /// When there is no memory, or as the library says.
    pub fn idle(&mut self, pd: &Pd, total: usize) -> io::Result<Option<Memory>> {
        if let Some(pool) = &mut self.pool {
            let rest = pool.memory.len() - pool.taken;
            let idle = pool.memory.part(pool.taken, rest);
            pool.taken += rest;
            idle.fill();
            return Ok((rest > 0).then_some(idle));
        }
        let Some(rest) = total.checked_sub(self.bytes).map(|n| n / PAGE * PAGE).filter(|n| *n > 0) else {
            return Ok(None);
        };
        let (idle, _) = self.take(pd, rest, 0, Way { remote: true, by_iova: false })?;
        idle.fill();
        Ok(Some(idle))
    }

    /// Bytes registered.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Ends every registration, the first one first.
    ///
    /// # Errors
    /// As the library says.
    pub fn dereg(self) -> io::Result<()> {
        self.made.into_iter().try_for_each(Mr::dereg)
    }

    fn register(&mut self, pd: &Pd, memory: &Memory, way: Way) -> io::Result<Mr> {
        let mr = Mr::register(pd, memory, way.remote, way.by_iova)?;
        self.made.push(mr);
        Ok(mr)
    }
}

/// Largest distance of a buffer from the start of a page, bytes.
const LINE: usize = 64;
