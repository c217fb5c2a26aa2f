//! Tables as text: columns as wide as their widest cell, the last one free.
use std::fmt::Write;

/// Rows under a headline, as lines of text.
pub(crate) fn text(headline: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headline.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let headline: Vec<String> = headline.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&headline).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Text of a stranger, without what moves a terminal's cursor.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".to_owned(), "bbb".to_owned()], vec!["cccc".to_owned(), "d".to_owned()]];
        assert_eq!(text(&["x", "y"], &rows), "x     y\na     bbb\ncccc  d\n");
    }

    #[test]
    fn a_strangers_text_cannot_move_the_cursor() {
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a [2Jb ");
    }
}
