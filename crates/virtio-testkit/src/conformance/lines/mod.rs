//! The table of lines, and what is common to writing them.
mod faults;
mod iommu;
mod layouts;
mod lifecycle;
mod messages;
mod negotiation;
mod pauses;
mod rings;
mod state;

use vm_virtio::Features;

use super::{Bench, Checked, Line, Place, Run, Span};
use crate::RingLayout;

pub(super) use faults::fault;

/// Every line, in the order of the standard.
pub(super) fn all() -> Vec<Line> {
    [
        negotiation::lines(),
        lifecycle::lines(),
        rings::lines(),
        layouts::lines(),
        pauses::lines(),
        messages::lines(),
        iommu::lines(),
        faults::lines(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

type Test = fn(&mut Bench<'_>) -> Checked;

fn line(id: &'static str, section: &'static str, text: &'static str, run: Test) -> Line {
    let none = Features::empty();
    Line {
        id,
        section,
        text,
        place: Place::Anywhere,
        span: Span::One,
        layout: None,
        with: none,
        without: none,
        run: Run::Plain(run),
    }
}

impl Line {
    fn wire(self) -> Line {
        Line { place: Place::Wire, ..self }
    }

    fn layouts(self) -> Line {
        Line { span: Span::Layouts, ..self }
    }

    fn subsets(self) -> Line {
        Line { span: Span::Subsets, ..self }
    }

    fn only(self, layout: RingLayout) -> Line {
        let span = if self.span == Span::One { Span::Layouts } else { self.span };
        Line { layout: Some(layout), span, ..self }
    }

    fn with(self, features: Features) -> Line {
        Line { with: features, ..self }
    }

    fn without(self, features: Features) -> Line {
        Line { without: features, ..self }
    }
}
