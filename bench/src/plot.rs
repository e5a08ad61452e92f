//! Curves, drawn as SVG: one picture, a panel for each figure, a curve for each kind of run.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::combinators::LogCoord;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;

/// Pixels of one panel.
const PANEL: (u32, u32) = (340, 300);

/// Pixels of the line with the names of the curves, below the panels.
const LEGEND: u32 = 60;

/// Told apart by everybody, on white: of the palette by Okabe and Ito.
const COLORS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// The largest value by the smallest from which on the upward axis is logarithmic, too: with fewer
/// doublings it has hardly a mark, and what is level would look restless.
const WIDE: f64 = 16.0;

/// How steps are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    Log,
}

/// What is drawn beside what.
#[derive(Debug)]
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) curves: Vec<Curve>,
}

/// One kind of run.
#[derive(Debug)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Draws the panels side by side, all over the same values of `across`.
pub(crate) fn draw(path: &Path, across: &str, scale: Scale, panels: &[Panel]) -> Result<()> {
    let count = u32::try_from(panels.len())?;
    let size = (PANEL.0 * count, PANEL.1 + LEGEND);
    let area = SVGBackend::new(path, size).into_drawing_area();
    let drawn = draw_on(&area, across, scale, panels);
    drawn.map_err(|error| anyhow!("drawing {}: {error}", path.display()))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// A failure of the backend, in words: its own type borrows the path.
type Drawn = Result<(), String>;

fn draw_on(area: &Area<'_>, across: &str, scale: Scale, panels: &[Panel]) -> Drawn {
    area.fill(&WHITE).map_err(text)?;
    let (above, below) = area.split_vertically(PANEL.1);
    for (place, panel) in above.split_evenly((1, panels.len())).iter().zip(panels) {
        draw_panel(place, across, scale, panel)?;
    }
    let names = panels.first().map(|panel| &panel.curves[..]);
    draw_legend(&below, names.unwrap_or_default())?;
    area.present().map_err(text)
}

fn draw_panel(place: &Area<'_>, across: &str, scale: Scale, panel: &Panel) -> Drawn {
    let points = || panel.curves.iter().flat_map(|curve| &curve.points);
    let (x, y) = (
        || points().map(|point| point.0),
        || points().map(|point| point.1),
    );
    let (upward, y) = match scale {
        Scale::Log if spread(y()) >= WIDE => (Scale::Log, range(Scale::Log, y())),
        _ => (Scale::Linear, range(Scale::Linear, y())),
    };
    let x = range(scale, x());
    let mut chart = ChartBuilder::on(place);
    chart
        .caption(panel.title, ("sans-serif", 18))
        .margin(8)
        .margin_right(16)
        .x_label_area_size(36)
        .y_label_area_size(48);
    match (scale, upward) {
        (Scale::Linear, _) => fill(chart.build_cartesian_2d(x, y), across, panel),
        (Scale::Log, Scale::Linear) => {
            fill(chart.build_cartesian_2d(doubling(x), y), across, panel)
        }
        (Scale::Log, Scale::Log) => fill(
            chart.build_cartesian_2d(doubling(x), doubling(y)),
            across,
            panel,
        ),
    }
}

/// Sizes are powers of two, so the marks of a logarithmic axis are, too.
fn doubling(range: Range<f64>) -> LogCoord<f64> {
    range.log_scale().base(2.0).into()
}

/// A chart, if it could be laid out.
type Chart<'c, 'a, X, Y> = Result<
    ChartContext<'c, SVGBackend<'a>, Cartesian2d<X, Y>>,
    DrawingAreaErrorKind<std::io::Error>,
>;

/// The axes and the curves.
fn fill<X, Y>(chart: Chart<'_, '_, X, Y>, across: &str, panel: &Panel) -> Drawn
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = chart.map_err(text)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(6)
        .y_labels(6)
        .x_desc(across)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 14))
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .draw()
        .map_err(text)?;
    for (curve, color) in panel.curves.iter().zip(COLORS.iter().cycle()) {
        let points = curve.points.iter().copied();
        let line = LineSeries::new(points, color.stroke_width(2)).point_size(3);
        chart.draw_series(line).map_err(text)?;
    }
    Ok(())
}

/// The names of the curves, each beside a piece of its line.
fn draw_legend(place: &Area<'_>, curves: &[Curve]) -> Drawn {
    let (width, _) = place.dim_in_pixel();
    let columns = i32::try_from(width).unwrap_or(i32::MAX) / 2;
    for ((at, curve), color) in (0..).zip(curves).zip(COLORS.iter().cycle()) {
        let (x, y) = (20 + at % 2 * columns, 14 + at / 2 * 22);
        let line = PathElement::new([(x, y), (x + 28, y)], color.stroke_width(2));
        place.draw(&line).map_err(text)?;
        let name = Text::new(curve.name.clone(), (x + 36, y - 8), ("sans-serif", 16));
        place.draw(&name).map_err(text)?;
    }
    Ok(())
}

/// From nothing to a little more than the largest, or from the smallest to the largest.
fn range(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let largest = values.clone().fold(0.0, f64::max);
    let smallest = values.fold(f64::INFINITY, f64::min);
    match scale {
        Scale::Linear => 0.0..largest.max(1e-3) * 1.05,
        Scale::Log => smallest.min(largest) / 1.3..largest * 1.3,
    }
}

fn spread(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().fold(0.0, f64::max) / values.fold(f64::INFINITY, f64::min)
}

/// As few digits as tell the labels of an axis apart.
fn short(value: &f64) -> String {
    let rounded = (value * 1000.0).round() / 1000.0;
    rounded.to_string()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_every_curve_and_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let panel = |title| Panel {
            title,
            curves: ["scan", "kept"]
                .map(|name| Curve {
                    name: name.to_owned(),
                    points: vec![(1.0, 2.0), (16.0, 3.0), (256.0, 4.0)],
                })
                .into(),
        };
        for scale in [Scale::Linear, Scale::Log] {
            let path = dir.path().join("plot.svg");
            draw(&path, "GiB", scale, &[panel("wall s"), panel("wire MB")]).unwrap();
            let svg = std::fs::read_to_string(path).unwrap();
            for word in ["wall s", "wire MB", "GiB", "scan", "kept"] {
                assert!(svg.contains(word), "{word}");
            }
            let is_curve =
                |line: &&str| line.starts_with("<polyline") && line.contains(r#"stroke-width="2""#);
            let curves = svg.lines().filter(is_curve).count();
            assert_eq!(curves, 2 * 2 + 2, "in each panel, and in the legend");
        }
    }
}
