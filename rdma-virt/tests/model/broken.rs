//! What a rule that is not kept looks like, one at a time: so that the model is known to notice.

/// One rule not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// Trailing unsignalled sends count as done.
    NoMarker,
    /// The drain does not look at sends.
    CloseAtOnce,
    /// The drain does not wait for messages the other end has sent.
    IgnoreExpected,
    /// Receives are held back from the suspension on.
    HoldReceives,
    /// A resume lets new sends pass while held ones are still there.
    PassWhileFlushing,
    /// A resume forgets what was held.
    ForgetHeld,
    /// Receives are not posted again on the new queue.
    ForgetReceives,
    /// The application polls the real CQ before the fake one.
    RealFirst,
    /// Completions polled by the drain are not kept.
    DropPolled,
    /// An end sends as soon as it has switched, though the other has not.
    NoBarrier,
}
