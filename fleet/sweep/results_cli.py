"""`fleet results` and `fleet compare`. Heavy libraries are loaded when a command runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleet.errors import OutputError, SpecError

if TYPE_CHECKING:
    from fleet.sweep.compare import Comparison
    from fleet.sweep.store import Cell

app = typer.Typer(rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Of a sweep or a run.", show_default=False)]

_SHOWN = ("throughput_mops", "access.fast_ratio", "flushes.total", "agent_cpu.measured_cores",
          "agent_cpu.modelled_cores", "agent_cpu.stolen_s")  # fmt: skip


@app.command("ls")
def ls(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where runs and sweeps lie.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the sweeps and runs below a directory.

    \b
    Example:
      fleet results ls runs
    """
    from fleet.sweep.results import sweep_digest
    from fleet.sweep.store import load

    if not directory.is_dir():
        raise OutputError(f"{directory}: no such directory")
    lines: list[dict[str, Any]] = []
    for path in sorted(path for path in directory.iterdir() if path.is_dir()):
        try:
            cells = load(path)
        except OutputError:
            continue
        line: dict[str, Any] = {"name": path.name, "kind": "sweep" if (path / "cells").is_dir() else "run"}
        line |= {status: sum(cell.status == status for cell in cells) for status in ("done", "failed", "missing")}
        first = next((cell.summary for cell in cells if cell.summary is not None), None)
        own = sweep_digest(cells) if line["kind"] == "sweep" else "" if first is None else first["digest"]
        lines.append(line | {"started": "" if first is None else first["run"]["started"], "digest": own})
    if as_json:
        typer.echo(json.dumps(lines, indent=2))
    else:
        _table(list(lines[0]) if lines else ["nothing here"], [list(line.values()) for line in lines])


@app.command()
def show(
    directory: Directory,
    cell: Annotated[str | None, typer.Option(metavar="HASH", help="Only this cell, in full; a prefix will do.")] = None,
    as_json: Json = False,
) -> None:
    """Show the cells of a sweep with their main figures, or one run in full.

    \b
    Examples:
      fleet results show runs/scalability
      fleet results show runs/scalability --cell 4be0
    """
    from fleet.sweep.store import load

    cells = load(directory)
    if cell is not None:
        near = [one for one in cells if one.hash.startswith(cell)]
        if len({one.hash for one in near}) != 1:
            raise SpecError(
                f"--cell {cell}: {'no cell' if not near else 'several cells'} of {directory} begin with that"
            )
        cells = near[:1]
    if len(cells) == 1 and (cell is not None or not cells[0].axes):
        _show_one(cells[0], as_json)
    else:
        _show_all(directory, cells, as_json)


@app.command()
def query(
    directory: Directory, sql: Annotated[str, typer.Argument(help="One statement.")], as_json: Json = False
) -> None:
    """Ask in SQL: tables results (a row per cell and VM), intervals and events (extra tierfleet[sql]).

    \b
    Example: cores that agents took, by number of VMs
      fleet results query runs/scalability 'select vms, policy, sum("agent_cpu.measured_cores") as cores
        from results group by all order by all'
    """
    from fleet.sweep import query as engine

    columns, rows = engine.query(directory, sql)
    if as_json:
        plain = [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]
        typer.echo(json.dumps(plain, indent=2, default=str))
    else:
        _table(columns, rows)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="DIR or DIR:KEY=VALUE,...", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="M", help="Path in summary.json, or sum:PATH over VMs; repeatable"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say in which figures B differs from A, by how much and how surely.

    Deterministic figures are compared exactly, measured CPU by a permutation test over repetitions.

    \b
    Examples:
      fleet compare runs/before runs/after
      fleet compare runs/scalability:policy=g-tpp runs/scalability:policy=h-tpp --metric flushes.total
    """
    from fleet.sweep import compare as engine

    metrics = [engine.metric_of(text) for text in metric] if metric else engine.METRICS
    found = engine.compare_cells(a, b, metrics)
    if metric and len(found.findings) < len(metrics):
        absent = next(one for one in metrics if one not in [finding.metric for finding in found.findings])
        raise SpecError(f"--metric {absent.label}: neither side has it; paths are those of summary.json below a VM")
    lines = [_finding(finding) for finding in found.findings]
    if as_json:
        head = {"a": a, "b": b, "points": found.points, "unmatched": found.unmatched, "disturbed": found.disturbed}
        typer.echo(json.dumps(head | {"metrics": lines}, indent=2))
    else:
        _print_comparison(found, lines)


def _plain(value: Any) -> Any:
    """A number that JSON has no word for is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finding(finding: Any) -> dict[str, Any]:
    found = finding.difference
    bounded = math.isfinite(found.low) and math.isfinite(found.high)
    line = {
        "metric": finding.metric.label,
        "kind": "deterministic" if finding.metric.deterministic else "measured",
        "a": found.a,
        "b": found.b,
        "difference": found.difference,
        "ratio": found.b / found.a if found.a else None,
        "exact": finding.exact,
        "interval_95": [found.low, found.high] if bounded and not finding.exact else None,
        "pairs": finding.pairs,
        "equal_pairs": finding.equal_pairs,
    }
    if not finding.metric.deterministic:
        line["p"] = found.p
    return line | {"verdict": finding.verdict}


def _print_comparison(found: "Comparison", lines: Sequence[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        ends = line["interval_95"]
        interval = "exact" if line["exact"] else f"{_number(ends[0])} .. {_number(ends[1])}" if ends else "unbounded"
        percent = "" if line["ratio"] is None else f"{100 * (line['ratio'] - 1):+.1f} %"
        p = f"{line['p']:.3f}" if "p" in line else ""
        rows.append(
            (line["metric"], line["kind"], _number(line["a"]), _number(line["b"]), _number(line["difference"]),
             percent, interval, p, line["verdict"])
        )  # fmt: skip
    _table(("metric", "kind", "A", "B", "B - A", "", "95 % interval", "p", "verdict"), rows)
    typer.echo(f"{found.points} points compared" + (f", {found.unmatched} cells unmatched" if found.unmatched else ""))
    if found.disturbed:
        typer.echo(f"{found.disturbed} of the cells ran beside others: their measured CPU is disturbed (--jobs 1)")


def _show_one(cell: "Cell", as_json: bool) -> None:
    if cell.summary is None:
        raise OutputError(f"{cell.path}: {cell.reason or 'has not been run to its end'}")
    if as_json:
        typer.echo(json.dumps(cell.summary, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from fleet.table import print_summary

    print_summary(cell.summary, Console(highlight=False), cell.path)


def _show_all(directory: Path, cells: "Sequence[Cell]", as_json: bool) -> None:
    from fleet.sweep.compare import metric_of
    from fleet.sweep.results import overview

    whole = overview(directory.name, cells)
    if as_json:
        typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    metrics = [metric_of(path) for path in _SHOWN]
    axes = list(whole["axes"])
    rows = []
    for cell in cells:
        values = ["-" if (value := metric.of(cell)) is None else _number(value) for metric in metrics]
        own = [str(cell.axes.get(key, "")) for key in axes]
        rows.append((cell.hash[:8], *own, str(cell.repetition), cell.status, *values))
    _table(("cell", *axes, "rep.", "status", *(metric.label for metric in metrics)), rows)
    for failure in whole["failures"]:
        typer.echo(f"FAILED {failure['cell'][:8]}: {failure['reason']}")
    typer.echo(", ".join(f"{count} {status}" for status, count in whole["counts"].items() if count))
    typer.echo(f"digest: {whole['digest']}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 or value == int(value) else f"{value:.4g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from fleet.plain_table import print_table

    print_table(heading, [["" if cell is None else str(cell) for cell in row] for row in rows])
