//! Columns of text, and numbers for people.
use std::time::Duration;

/// A table whose columns are as wide as they must be. Columns of numbers are aligned to the right.
pub(crate) struct Table {
    left: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these heads; one that begins with `<` is of text.
    pub(crate) fn new(heads: &[&str]) -> Table {
        let left = heads.iter().map(|head| head.starts_with('<')).collect();
        let heads = heads.iter().map(|head| head.trim_start_matches('<').to_owned()).collect();
        Table { left, rows: vec![heads] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.left.len()).map(width).collect();
        self.rows.iter().map(move |row| {
            let cells = row.iter().zip(&widths).zip(&self.left).map(|((cell, width), left)| {
                if *left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
    }
}

/// A number in three to four characters, with a suffix.
pub(crate) fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T"])
}

/// Bytes, in units of 1024.
pub(crate) fn bytes(value: f64) -> String {
    scaled(value, 1024.0, &["", "Ki", "Mi", "Gi", "Ti"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = units.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    while value >= step {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / step, next);
    }
    if name.is_empty() && (value.fract() == 0.0 || value >= 100.0) {
        format!("{value:.0}")
    } else if value < 10.0 {
        format!("{value:.1}{name}")
    } else {
        format!("{value:.0}{name}")
    }
}

/// Microseconds.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// How long something has been there: its two largest units.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{}.{} s", seconds, time.subsec_millis() / 100),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        let counts =
            [(0.0, "0"), (7.0, "7"), (0.5, "0.5"), (999.0, "999"), (1000.0, "1.0k"), (123_456.0, "123k")];
        for (value, text) in counts {
            assert_eq!(count(value), text);
        }
        assert_eq!(bytes(1536.0), "1.5Ki");
        assert_eq!(count(1e18), "1000000T");
        assert_eq!(
            (micros(16), micros(2048), micros(4_194_304)),
            ("16 µs".into(), "2.0 ms".into(), "4.2 s".into())
        );
        assert_eq!(span(Duration::from_secs(3 * 3600 + 125)), "3 h 2 min");
        assert_eq!(span(Duration::from_millis(1234)), "1.2 s");
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Table::new(&["<NAME", "N"]);
        table.row(["a".into(), "100".into()]);
        table.row(["longer".into(), "1".into()]);
        let lines: Vec<String> = table.lines().collect();
        assert_eq!(lines, ["NAME      N", "a       100", "longer    1"]);
    }
}
