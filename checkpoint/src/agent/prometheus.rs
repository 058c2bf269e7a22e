//! The Prometheus text format: pages of counters, histograms and gauges. What is counted is not known here
//! ([`super::metrics`]).

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::Mutex;

use super::lock;

/// Upper bounds of the buckets of all times, seconds.
const BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Counters of one name.
#[derive(Debug)]
pub(super) struct Counters<const N: usize> {
    name: &'static str,
    help: &'static str,
    labels: [&'static str; N],
    values: Mutex<BTreeMap<[&'static str; N], u64>>,
}

impl<const N: usize> Counters<N> {
    /// All that can occur are there from the beginning, so that the first increment is seen as one.
    pub fn new(
        name: &'static str,
        help: &'static str,
        labels: [&'static str; N],
        known: impl IntoIterator<Item = [&'static str; N]>,
    ) -> Self {
        let values = Mutex::new(known.into_iter().map(|k| (k, 0)).collect());
        Counters { name, help, labels, values }
    }

    pub fn add(&self, values: [&'static str; N], by: u64) {
        let mut all = lock(&self.values);
        let value = all.entry(values).or_default();
        *value = value.saturating_add(by);
    }

    pub fn render(&self, page: &mut Page) {
        page.head(self.name, self.help, "counter");
        for (values, count) in lock(&self.values).iter() {
            let labels: Vec<(&str, &str)> = self.labels.iter().copied().zip(values.iter().copied()).collect();
            page.sample(self.name, &labels, count);
        }
    }
}

/// Times in buckets.
#[derive(Debug, Default)]
pub(super) struct Histogram(Mutex<Times>);

#[derive(Clone, Debug, Default)]
struct Times {
    /// Per bucket, not summed up; the last is for longer ones.
    counts: [u64; BUCKETS.len() + 1],
    sum: f64,
}

impl Histogram {
    pub fn add(&self, seconds: f64) {
        let at = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        let mut times = lock(&self.0);
        times.counts[at] += 1;
        times.sum += seconds;
    }

    pub fn render(&self, page: &mut Page, name: &str, labels: &[(&str, &str)]) {
        let times = lock(&self.0).clone();
        let mut all = 0;
        let bounds = BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(times.counts) {
            all += count;
            let labels: Vec<(&str, &str)> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            page.sample(&format!("{name}_bucket"), &labels, all);
        }
        page.sample(&format!("{name}_sum"), labels, times.sum);
        page.sample(&format!("{name}_count"), labels, all);
    }
}

/// A page in the making.
#[derive(Debug, Default)]
pub(super) struct Page(pub String);

impl Page {
    pub fn head(&mut self, name: &str, help: &str, kind: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        match pairs.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", pairs.join(","))),
        }
    }

    pub fn gauge(&mut self, name: &str, help: &str, samples: &[(&[(&str, &str)], u64)]) {
        self.head(name, help, "gauge");
        for (labels, value) in samples {
            self.sample(name, labels, value);
        }
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{line}");
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(render: impl FnOnce(&mut Page)) -> String {
        let mut page = Page::default();
        render(&mut page);
        page.0
    }

    #[test]
    fn counters_are_there_from_the_beginning_and_grow() {
        let counters = Counters::new("x_total", "Why \\ and\nhow.", ["a", "b"], [["q", "no"], ["q", "yes"]]);
        counters.add(["q", "yes"], 2);
        counters.add(["q", "yes"], u64::MAX);
        counters.add(["p", "new"], 1);
        let expected = "# HELP x_total Why \\\\ and\\nhow.\n# TYPE x_total counter\nx_total{a=\"p\",b=\"new\"} 1\n\
                        x_total{a=\"q\",b=\"no\"} 0\nx_total{a=\"q\",b=\"yes\"} 18446744073709551615\n";
        assert_eq!(text(|page| counters.render(page)), expected);
    }

    #[test]
    fn a_time_counts_in_its_bucket_and_in_all_longer_ones() {
        let times = Histogram::default();
        for seconds in [0.005, 0.0051, 0.75, 1000.0] {
            times.add(seconds);
        }
        let expected: String = [
            ("0.005", 1),
            ("0.01", 2),
            ("0.025", 2),
            ("0.05", 2),
            ("0.1", 2),
            ("0.25", 2),
            ("0.5", 2),
            ("1", 3),
            ("2.5", 3),
            ("5", 3),
            ("10", 3),
            ("30", 3),
            ("60", 3),
            ("300", 3),
            ("+Inf", 4),
        ]
        .iter()
        .map(|(le, n)| format!("t_seconds_bucket{{phase=\"dump\",le=\"{le}\"}} {n}\n"))
        .collect();
        let rest = "t_seconds_sum{phase=\"dump\"} 1000.7601\nt_seconds_count{phase=\"dump\"} 4\n";
        assert_eq!(text(|page| times.render(page, "t_seconds", &[("phase", "dump")])), expected + rest);
    }

    #[test]
    fn a_name_with_quotes_backslashes_and_newlines_stays_one_value() {
        let page = text(|page| page.sample("m", &[("host", "a\"b\\c\nd"), ("version", "1")], 1));
        assert_eq!(page, "m{host=\"a\\\"b\\\\c\\nd\",version=\"1\"} 1\n");
    }
}
