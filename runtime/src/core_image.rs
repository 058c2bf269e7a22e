//! What CRIU's image of a task (`core-PID.img`) says of pending signals, and of the timers that send some.
//!
//! Field numbers are those of CRIU's `core.proto`, `timer.proto` and `siginfo.proto`. Whatever else is in the file is
//! passed over.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use protobuf::CodedInputStream;
use protobuf::rt::skip_field_for_tag;
use serde::{Deserialize, Serialize};

/// `IMG_COMMON_MAGIC` and `CORE_MAGIC`.
const MAGICS: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x47, 0x38, 0x05, 0x55];

/// Wire types: a varint, and bytes with their length before them.
const NUMBER: u32 = 0;
const BYTES: u32 = 2;

/// What one image says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Core {
    /// Pending for the process.
    pub shared: SignalSet,
    /// Pending for this thread alone.
    pub own: SignalSet,
    /// Those of the process.
    pub timers: Vec<Timer>,
}

/// As the kernel keeps it: bit 0 is signal 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SignalSet(pub u64);

impl SignalSet {
    pub fn insert(&mut self, signal: i32) {
        if (1..=64).contains(&signal) {
            self.0 |= 1 << (signal - 1);
        }
    }

    pub fn without(self, other: SignalSet) -> SignalSet {
        SignalSet(self.0 & !other.0)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = i32> {
        (1..=64).filter(move |signal| self.0 & (1 << (signal - 1)) != 0)
    }
}

impl FromIterator<i32> for SignalSet {
    fn from_iter<I: IntoIterator<Item = i32>>(signals: I) -> Self {
        let mut set = SignalSet::default();
        signals.into_iter().for_each(|signal| set.insert(signal));
        set
    }
}

/// A timer that sends a signal, and how it was set when CRIU looked at it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timer {
    pub signal: i32,
    /// The thread that gets the signal; the process where `None`.
    pub thread: Option<i32>,
    /// What the signal says of its timer. An interval timer (setitimer) says nothing.
    pub word: Option<TimerWord>,
    /// Zero for a timer that goes off once.
    pub interval: Duration,
    /// Until it goes off; zero when it has, or was never set.
    pub left: Duration,
}

/// What comes with the signal of a timer made by timer_create.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerWord {
    pub id: i32,
    /// `si_value`.
    pub value: u64,
}

/// Reads the image of a task.
pub fn read(path: &Path) -> Result<Core> {
    let name = || format!("{} is malformed", path.display());
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&bytes).with_context(name)
}

fn parse(bytes: &[u8]) -> Result<Core> {
    let Some(rest) = bytes.strip_prefix(&MAGICS) else { bail!("it is no image of a task") };
    let (len, rest) = rest.split_at_checked(4).context("it is cut")?;
    let len = u32::from_le_bytes(len.try_into()?) as usize;
    let message = rest.get(..len).context("it is cut")?;
    let mut core = Core::default();
    fields(message, |field| match field {
        Field::Bytes(3, task) => fields(&task, |field| match field {
            Field::Bytes(7, timers) => task_timers(&timers, &mut core.timers),
            Field::Bytes(10, queue) => signals(&queue, &mut core.shared),
            _ => Ok(()),
        }),
        Field::Bytes(5, thread) => fields(&thread, |field| match field {
            Field::Bytes(9, queue) => signals(&queue, &mut core.own),
            _ => Ok(()),
        }),
        _ => Ok(()),
    })?;
    Ok(core)
}

/// `signal_queue_entry`.
fn signals(queue: &[u8], set: &mut SignalSet) -> Result<()> {
    fields(queue, |field| match field {
        Field::Bytes(1, entry) => fields(&entry, |field| match field {
            Field::Bytes(1, siginfo) => {
                // It begins with si_signo.
                let number = siginfo.first_chunk().context("a siginfo is cut")?;
                set.insert(i32::from_le_bytes(*number));
                Ok(())
            }
            _ => Ok(()),
        }),
        _ => Ok(()),
    })
}

/// `task_timers_entry`.
fn task_timers(message: &[u8], timers: &mut Vec<Timer>) -> Result<()> {
    fields(message, |field| {
        match field {
            Field::Bytes(1, timer) => timers.push(interval_timer(&timer, libc::SIGALRM)?),
            Field::Bytes(2, timer) => timers.push(interval_timer(&timer, libc::SIGVTALRM)?),
            Field::Bytes(3, timer) => timers.push(interval_timer(&timer, libc::SIGPROF)?),
            Field::Bytes(4, timer) => timers.extend(posix_timer(&timer)?),
            _ => {}
        }
        Ok(())
    })
}

/// `itimer_entry`.
fn interval_timer(message: &[u8], signal: i32) -> Result<Timer> {
    let [_, isec, iusec, vsec, vusec] = numbers(message)?;
    let time = |sec, usec: u64| Duration::from_secs(sec).saturating_add(Duration::from_micros(usec));
    Ok(Timer { signal, interval: time(isec, iusec), left: time(vsec, vusec), ..Timer::default() })
}

/// `posix_timer_entry`; `None` for one that sends no signal.
fn posix_timer(message: &[u8]) -> Result<Option<Timer>> {
    let [_, id, _, signal, notify, value, _, isec, insec, vsec, vnsec, thread] = numbers(message)?;
    let thread = match notify as i32 {
        libc::SIGEV_SIGNAL => None,
        libc::SIGEV_THREAD_ID => Some(thread as i32),
        _ => return Ok(None),
    };
    let time = |sec, nsec| Duration::from_secs(sec).saturating_add(Duration::from_nanos(nsec));
    Ok(Some(Timer {
        signal: signal as i32,
        thread,
        word: Some(TimerWord { id: id as i32, value }),
        interval: time(isec, insec),
        left: time(vsec, vnsec),
    }))
}

/// The fields of a message of numbers, by their own; those that are missing are zero.
fn numbers<const N: usize>(message: &[u8]) -> Result<[u64; N]> {
    let mut all = [0; N];
    fields(message, |field| {
        if let Field::Number(n, value) = field
            && let Some(at) = all.get_mut(n as usize)
        {
            *at = value;
        }
        Ok(())
    })?;
    Ok(all)
}

/// A field with its number.
enum Field {
    Number(u32, u64),
    Bytes(u32, Vec<u8>),
}

fn fields(message: &[u8], mut each: impl FnMut(Field) -> Result<()>) -> Result<()> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag & 7 {
            NUMBER => each(Field::Number(tag >> 3, input.read_uint64()?))?,
            BYTES => each(Field::Bytes(tag >> 3, input.read_bytes()?))?,
            _ => skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use protobuf::CodedOutputStream;

    use super::*;

    /// A message of these fields.
    fn message(write: impl FnOnce(&mut CodedOutputStream)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut out = CodedOutputStream::vec(&mut bytes);
        write(&mut out);
        out.flush().unwrap();
        drop(out);
        bytes
    }

    fn of_numbers(values: &[u64]) -> Vec<u8> {
        message(|out| {
            for (n, value) in values.iter().enumerate() {
                out.write_uint64(n as u32 + 1, *value).unwrap();
            }
        })
    }

    fn queue(signals: &[i32]) -> Vec<u8> {
        message(|out| {
            for signal in signals {
                let mut siginfo = [0; 128];
                siginfo[..4].copy_from_slice(&signal.to_le_bytes());
                out.write_bytes(1, &message(|out| out.write_bytes(1, &siginfo).unwrap())).unwrap();
            }
        })
    }

    fn image(message: &[u8]) -> Vec<u8> {
        [&MAGICS[..], &(message.len() as u32).to_le_bytes(), message].concat()
    }

    fn sample() -> Vec<u8> {
        let timers = message(|out| {
            out.write_bytes(1, &of_numbers(&[0, 0, 3, 500_000])).unwrap();
            out.write_bytes(2, &of_numbers(&[0, 0, 0, 0])).unwrap();
            out.write_bytes(3, &of_numbers(&[1, 0, 0, 7])).unwrap();
            out.write_bytes(4, &of_numbers(&[4, 1, 36, 0, u64::MAX, 0, 0, 0, 0, 0])).unwrap();
            out.write_bytes(4, &of_numbers(&[5, 1, 32, 4, 7, 0, 2, 1, 0, 9, 12])).unwrap();
            // SIGEV_NONE.
            out.write_bytes(4, &of_numbers(&[6, 1, 0, 1, 0, 0, 0, 0, 1, 0])).unwrap();
        });
        let task = message(|out| {
            out.write_uint64(1, 1).unwrap();
            out.write_string(6, "job").unwrap();
            out.write_bytes(7, &timers).unwrap();
            out.write_bytes(10, &queue(&[libc::SIGTERM, 40])).unwrap();
        });
        let thread = message(|out| {
            out.write_sint32(3, -5).unwrap();
            out.write_bytes(9, &queue(&[libc::SIGUSR1])).unwrap();
        });
        image(&message(|out| {
            out.write_uint64(1, 1).unwrap();
            out.write_fixed64(90, 1).unwrap();
            out.write_bytes(3, &task).unwrap();
            out.write_bytes(5, &thread).unwrap();
        }))
    }

    #[test]
    fn signals_and_timers_are_found_among_other_things() {
        let core = parse(&sample()).unwrap();
        assert_eq!(core.shared.iter().collect::<Vec<_>>(), [libc::SIGTERM, 40]);
        assert_eq!(core.own.iter().collect::<Vec<_>>(), [libc::SIGUSR1]);
        let interval = |signal| Timer { signal, ..Timer::default() };
        let timers = [
            Timer { left: Duration::from_millis(3500), ..interval(libc::SIGALRM) },
            interval(libc::SIGVTALRM),
            Timer { interval: Duration::from_secs(1), left: Duration::from_micros(7), ..interval(libc::SIGPROF) },
            Timer { signal: 36, word: Some(TimerWord { id: 4, value: u64::MAX }), ..Timer::default() },
            Timer {
                signal: 32,
                thread: Some(12),
                word: Some(TimerWord { id: 5, value: 7 }),
                interval: Duration::new(2, 1),
                left: Duration::from_nanos(9),
            },
        ];
        assert_eq!(core.timers, timers);
    }

    #[test]
    fn what_is_cut_anywhere_or_no_image_is_refused() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len}");
        }
        let mut other = whole.clone();
        other[4] ^= 1;
        assert!(parse(&other).is_err());
        assert!(parse(&image(&[0x1a, 0x05, 0x52])).is_err(), "a field that is longer than the message");
        assert_eq!(parse(&image(&[])).unwrap(), Core::default());
    }
}
