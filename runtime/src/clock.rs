//! Wall-clock times as text. No calendar crate for one format.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in UTC, with nanoseconds: `2026-01-31T23:59:59.000000001Z`.
pub fn rfc3339_now() -> String {
    rfc3339(SystemTime::now())
}

/// `time` as RFC 3339 in UTC.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let secs = since.as_secs();
    let (year, month, day) = civil(secs / 86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        secs / 3600 % 24,
        secs / 60 % 60,
        secs % 60,
        since.subsec_nanos()
    )
}

/// Days since 1970-01-01 to year, month, day (proleptic Gregorian; the era
/// arithmetic counts years from March so that leap days come last).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_instants_are_rendered() {
        let at = |secs| rfc3339(UNIX_EPOCH + Duration::from_secs(secs));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56.000000000Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59.000000000Z");
    }
}
