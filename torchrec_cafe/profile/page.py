"""The report as one page that needs nothing else: no network, no scripts."""

from __future__ import annotations

from html import escape

from torchrec_cafe.config.text import human_bytes
from torchrec_cafe.profile.plots import table_plot
from torchrec_cafe.profile.report import (
    Report,
    TableReport,
    compression_line,
    compression_text,
    count,
    fixed,
    percent,
)

# A table with so many times more rows than distinct ids seen is said to be sparse.
_SPARSE = 20

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d2230;
  background: #f6f7f9; margin: 0 auto; max-width: 1280px; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 34px 0 10px; }
p { max-width: 82ch; margin: 6px 0; } .muted { color: #6b7280; }
code { font: 13px/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; padding: 10px 18px; }
.tile b { display: block; font-size: 21px; } .tile span { color: #6b7280; font-size: 13px; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { color: #6b7280; font-weight: 600; vertical-align: bottom; }
thead tr:last-child th { border-bottom: 1px solid #d5d9e0; }
th.group { text-align: center; border-bottom: 1px solid #e3e6eb; color: #1d2230; }
tbody tr + tr td { border-top: 1px solid #f0f1f4; }
tbody a { color: #1f5fa8; text-decoration: none; } tbody a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(580px, 1fr)); gap: 16px; }
.card { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; padding: 14px 18px; }
.card h3 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
.card img { width: 100%; height: auto; display: block; margin-top: 8px; }
.card p { font-size: 13.5px; margin: 2px 0; }
@media (max-width: 640px) { .cards { grid-template-columns: 1fr; } body { padding: 16px 10px; } }
"""

_GUIDE = """
<p><b>Own row</b>: share of the lookups that go to ids with a row of their own if the tables are
<code>Cafe(compression=c)</code>: tables of equal dim share a budget, small ones are whole (100),
and the hot rows go to the most frequent ids of the others. It is what a sketch that makes no
mistakes would reach.</p>
<p><b>Hits</b>: share of the distinct rows of a batch that a cache holds when the batch is planned,
before it brings rows in. <i>LRU</i> is FBGEMM's cache (32-way sets); <i>ahead</i> is
<code>Lookahead</code>, whose other rows are on their way, so that nothing waits for them. A dash:
it is too small for the rows of one batch.</p>
<p><b>Drift a day</b>: of the traffic of a day's hottest ids (1 % of the first day's), the
part that is lost if the day before's hottest are used instead. A dash: one day was seen.</p>
"""


def as_page(report: Report) -> str:
    """The report as HTML.

    Args:
        report: of the trace.
    """
    tables = report.tables
    lookups = sum(table.statistics.num_lookups for table in tables)
    tiles = {
        "tables": f"{len(tables)}",
        "samples": count(report.num_samples),
        "lookups": count(lookups),
        "distinct ids": count(sum(table.statistics.num_distinct for table in tables)),
        "uncompressed": human_bytes(report.dense_bytes),
    }
    tiles_html = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>'
        for name, value in tiles.items()
    )
    costs = "".join(f"<li>{escape(compression_line(cost))}</li>" for cost in report.costs)
    cards = "".join(_card(table, report) for table in tables)
    batch = tables[0].statistics.batch_size
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>torchrec-cafe profile</title>
<style>{_CSS}</style>
</head>
<body>
<h1>What the tables cost, and what each way of keeping them catches</h1>
<p class="muted">{escape(report.source)} · batches of {batch:,} samples · look-ahead of
{report.depth} batches</p>
<div class="tiles">{tiles_html}</div>
<h2>All tables</h2>
<div class="scroll">{_overview(report)}</div>
<ul>{costs}</ul>
{_GUIDE}
<h2>Each table</h2>
<div class="cards">{cards}</div>
<p class="muted">Made by <code>{escape(report.command)}</code></p>
</body>
</html>
"""


def _overview(report: Report) -> str:
    labels = [cache.label for cache in report.tables[0].caches]
    groups = f"""<tr><th></th><th class="group" colspan="6">ids</th>
<th class="group" colspan="{max(1, len(report.costs))}">own row, % of lookups</th>
<th class="group" colspan="{max(1, 2 * len(labels))}">hits, % of a batch's rows:
cache of so many rows</th></tr>"""
    names = ["table", "rows", "distinct", "lookups", "a sample", "Zipf", "drift a day, %"]
    names += [compression_text(cost.compression) for cost in report.costs]
    names += [f"{label}<br>{kind}" for label in labels for kind in ("LRU", "ahead")]
    header = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(_overview_row(table) for table in report.tables)
    return f"<table><thead>{groups}<tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _overview_row(table: TableReport) -> str:
    statistics = table.statistics
    cells = [f'<td><a href="#table-{_anchor(table.name)}">{escape(table.name)}</a></td>']
    values = [count(table.shape.num_embeddings), count(statistics.num_distinct)]
    values += [count(statistics.num_lookups), fixed(statistics.bag_size)]
    values += [fixed(statistics.zipf_exponent), percent(statistics.drift_per_day)]
    cells += [f"<td>{value}</td>" for value in values]
    cells += [_shaded(None if own is None else own.share, "217, 115, 13") for own in table.owning]
    for cache in table.caches:
        cells += [_shaded(cache.lru, "110, 118, 130"), _shaded(cache.lookahead, "42, 138, 87")]
    return f"<tr>{''.join(cells)}</tr>"


def _anchor(name: str) -> str:
    return escape(name.replace(" ", "-"), quote=True)


def _shaded(share: float | None, color: str) -> str:
    depth = 0.0 if share is None else 0.42 * share
    return f'<td style="background: rgba({color}, {depth:.2f})">{percent(share)}</td>'


def _card(table: TableReport, report: Report) -> str:
    statistics, shape = table.statistics, table.shape
    facts = [
        f"{shape.num_embeddings:,} rows × {shape.embedding_dim}, {human_bytes(shape.dense_bytes)}",
        f"{count(statistics.num_distinct)} distinct of {count(statistics.num_lookups)} lookups",
        f"Zipf {fixed(statistics.zipf_exponent)}",
    ]
    if statistics.drift_per_day == statistics.drift_per_day:
        facts.append(
            f"drift {percent(statistics.drift_per_day)} % a day of the "
            f"{statistics.drift_ids:,} hottest"
        )
    caches = " · ".join(
        f"{escape(cache.label)}: {count(cache.rows)} rows, {human_bytes(cache.num_bytes)}"
        for cache in table.caches
    )
    whole = [
        compression_text(cost.compression)
        for cost, own in zip(report.costs, table.owning, strict=True)
        if own is not None and own.is_whole
    ]
    sparse = ""
    if shape.num_embeddings > _SPARSE * statistics.num_distinct:
        sparse = (
            "<p>Most rows are never looked up, so that shares of them say little: map the ids to "
            "fewer rows, or ask for caches by their rows.</p>"
        )
    whole_text = f"<p>Whole at {', '.join(whole)}.</p>" if whole else ""
    name = escape(table.name)
    return f"""<section class="card" id="table-{_anchor(table.name)}"><h3>{name}</h3>
<p class="muted">{" · ".join(facts)}</p>
<img alt="Coverage and hit rates of {name}" src="{table_plot(table, list(report.costs))}">
{whole_text}{sparse}<p class="muted">Look-ahead caches: {caches}</p></section>
"""
