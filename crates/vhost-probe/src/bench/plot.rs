//! The figures as a picture: for each case a bar for everybody's requests a second, with the range of the rounds.
use std::fmt::Write;

use super::report::{CaseFigures, Measured, Report};

const WIDTH: f64 = 860.0;
const LABEL: f64 = 190.0;
const BAR: f64 = 16.0;
const GAP: f64 = 6.0;
const TITLE: f64 = 34.0;
/// What is written right of the longest bar.
const TEXT: f64 = 250.0;

/// Floors are grey, the others have a colour each.
const FLOOR: &str = "#9aa3ad";
const COLOURS: [&str; 6] = ["#2f6fb0", "#c8702a", "#3d8f5f", "#8a55a8", "#b0413e", "#7a6a2f"];

/// An SVG picture of the report.
pub(crate) fn svg(report: &Report) -> String {
    let height: f64 = report.cases.iter().map(height_of).sum::<f64>() + 40.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">Requests a second: median, range of the rounds, time to the floor's, \
         back-end CPU</text>\n"
    );
    let mut top = 40.0;
    for case in &report.cases {
        draw(&mut text, case, top);
        top += height_of(case);
    }
    text.push_str("</svg>\n");
    text
}

fn height_of(case: &CaseFigures) -> f64 {
    TITLE + case.contenders.len() as f64 * (BAR + GAP) + GAP
}

fn draw(text: &mut String, case: &CaseFigures, top: f64) {
    let rates =
        case.contenders.iter().filter_map(|c| c.measured.as_ref()).map(|m| m.requests_per_second.most);
    let most = rates.fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABEL - TEXT) / most;
    let _ = writeln!(
        text,
        "<text x=\"10\" y=\"{:.1}\" font-weight=\"bold\">{}</text>",
        top + 20.0,
        escape(&case.case)
    );
    let mut colour = 0;
    for (at, contender) in case.contenders.iter().enumerate() {
        let y = top + TITLE + at as f64 * (BAR + GAP);
        let base = y + BAR - 4.0;
        let fill = if contender.name.starts_with("floor-") {
            FLOOR
        } else {
            colour += 1;
            COLOURS[(colour - 1) % COLOURS.len()]
        };
        let name = escape(&contender.name);
        let _ =
            writeln!(text, "<text x=\"{}\" y=\"{base:.1}\" text-anchor=\"end\">{name}</text>", LABEL - 8.0);
        match &contender.measured {
            Some(measured) => bar(text, measured, y, scale, fill),
            None => {
                let why = escape(contender.error.as_deref().unwrap_or("no figures"));
                let _ = writeln!(text, "<text x=\"{LABEL}\" y=\"{base:.1}\" fill=\"#777\">{why}</text>");
            }
        }
    }
}

fn bar(text: &mut String, measured: &Measured, y: f64, scale: f64, fill: &str) {
    let rate = &measured.requests_per_second;
    let (middle, left, right) = (y + BAR / 2.0, LABEL + rate.least * scale, LABEL + rate.most * scale);
    let _ = writeln!(
        text,
        "<rect x=\"{LABEL}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{fill}\"/>\
         <path d=\"M{left:.1} {middle:.1}H{right:.1}M{left:.1} {:.1}v6M{right:.1} {:.1}v6\" stroke=\"black\"/>",
        rate.median * scale,
        middle - 3.0,
        middle - 3.0,
    );
    let ratio = measured.time_to_floor.map_or(String::new(), |ratio| format!(", x{:.2}", ratio.median));
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\">{:.0}k/s{ratio}, {:.2} us</text>",
        right + 8.0,
        y + BAR - 4.0,
        rate.median / 1e3,
        measured.backend_cpu_us_per_request.median,
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
