"""The page: one HTML file with everything in it. It asks nobody for anything, and a content policy sees to that."""

import json
from collections.abc import Iterator
from html import escape

from fleet import __version__
from fleet.report.content import Report
from fleet.report.figure import Figure
from fleet.report.interactive import CONFIG, plotly_figure
from fleet.report.table import Table, Value, shown

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; margin: 0 auto; max-width: 1180px; padding: 0 20px 60px }
h1 { font-size: 26px; margin: 24px 0 4px } h2 { font-size: 19px; margin: 34px 0 6px }
nav { columns: 3; margin: 14px 0 } nav a { display: block } a { color: #1b4f8a }
p.note, p.absent { color: #444; margin: 4px 0 8px; max-width: 110ch }
p.files { font-size: 13px; margin: 0 }
.scroll { overflow: auto; max-height: 640px; border: 1px solid #ccc }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: #eee; text-align: left; cursor: pointer; vertical-align: bottom }
th, td { padding: 3px 9px; border-bottom: 1px solid #e4e4e4; vertical-align: top } td.n { text-align: right }
tr.set td { font-weight: 600 } input { font: inherit; margin: 4px 0; padding: 2px 6px; width: 260px }
@media print { .scroll { max-height: none } }
"""

_SCRIPT = """
const config = JSON.parse(document.getElementById("config").textContent);
const draw = (box) => {
  const figure = JSON.parse(document.getElementById(box.dataset.figure).textContent);
  Plotly.newPlot(box, figure.data, figure.layout, config);
};
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, {rootMargin: "800px"});
document.querySelectorAll("[data-figure]").forEach((box) => seen.observe(box));
addEventListener("beforeprint", () => document.querySelectorAll("[data-figure]:empty").forEach(draw));
document.querySelectorAll("th").forEach((head) => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const falling = head.dataset.order !== "rising" ? 1 : -1;
  head.dataset.order = falling === 1 ? "rising" : "falling";
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b), numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
    return falling * (numbers ? x - y : x.localeCompare(y));
  }).forEach((row) => body.append(row));
}));
document.querySelectorAll("input").forEach((field) => field.addEventListener("input", () => {
  const wanted = field.value.toLowerCase();
  for (const row of document.getElementById(field.dataset.table).tBodies[0].rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
}));
"""

_MANY_ROWS = 20


def page(report: Report) -> str:
    """The whole file. Figures are drawn when one scrolls to them, so that a page of many opens at once."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        "<link rel='icon' href='data:,'>",
        f"<title>{escape(report.title)}</title><style>{_CSS}</style></head><body>",
        f"<h1>{escape(report.title)}</h1>",
        f"<p class='note'>Tierfleet {__version__}. A figure's legend toggles its series, a drag zooms, a double click "
        "zooms out. A click on a column's head sorts.</p>",
        *_contents(report),
        *_table(report.tables[0]),
    ]
    for figure in report.gallery.figures:
        parts += _figure(figure)
    for absent in report.gallery.absent:
        parts.append(f"<p class='absent'><b>{escape(absent.title)}</b> is left out: {escape(absent.why)}.</p>")
    for table in report.tables[1:]:
        parts += _table(table)
    parts += [
        f"<script type='application/json' id='config'>{_json(CONFIG)}</script>",
        f"<script>{get_plotlyjs()}</script>",
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _contents(report: Report) -> Iterator[str]:
    first, *rest = report.tables
    entries = [(first.key, first.title), *((one.key, one.title) for one in report.gallery.figures)]
    entries += [(table.key, table.title) for table in rest]
    yield "<nav>" + "".join(f"<a href='#{key}'>{escape(title)}</a>" for key, title in entries) + "</nav>"


def _figure(figure: Figure) -> Iterator[str]:
    files = " ".join(f"<a href='report/{figure.key}.{form}'>{form.upper()}</a>" for form in ("svg", "png", "csv"))
    yield f"<h2 id='{figure.key}'>{escape(figure.title)}</h2>"
    if figure.note:
        yield f"<p class='note'>{escape(figure.note)}</p>"
    drawn = plotly_figure(figure)
    yield f"<div data-figure='data-{figure.key}' style='min-height:{drawn['layout']['height']}px'></div>"
    yield f"<script type='application/json' id='data-{figure.key}'>{_json(drawn)}</script>"
    yield f"<p class='files'>{files}</p>"


def _table(table: Table) -> Iterator[str]:
    yield f"<h2 id='{table.key}'>{escape(table.title)}</h2>"
    if table.note:
        yield f"<p class='note'>{escape(table.note)}</p>"
    if len(table.rows) > _MANY_ROWS:
        yield f"<input data-table='rows-{table.key}' placeholder='only rows with ...' aria-label='filter'>"
    yield f"<div class='scroll'><table id='rows-{table.key}'><thead><tr>"
    yield "".join(f"<th>{escape(column.title)}</th>" for column in table.columns)
    yield "</tr></thead><tbody>"
    numeric = [all(_is_number(row[place]) for row in table.rows) for place in range(len(table.columns))]
    changed = next((place for place, column in enumerate(table.columns) if column.name == "set"), None)
    for row in table.rows:
        mark = " class='set'" if changed is not None and row[changed] not in (None, False) else ""
        yield f"<tr{mark}>{''.join(_cell(*one) for one in zip(row, numeric, strict=True))}</tr>"
    yield "</tbody></table></div>"


def _is_number(value: Value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Value, numeric: bool) -> str:
    if numeric and value is not None:
        return f"<td class='n' data-value='{value}'>{shown(value)}</td>"
    return f"<td>{escape(shown(value))}</td>"


def _json(value: object) -> str:
    """JSON that no part of can end the script that it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
