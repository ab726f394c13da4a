"""`fleet sweep`. Heavy libraries are loaded when the command runs, so that `fleet --help` stays quick."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleet.errors import SpecError
from fleet.names import unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleet.sweep.run import Engine
    from fleet.sweep.spec import Sweep
    from fleet.sweep.store import Cell

_ENGINES = ("local", "dask")


def sweep(
    spec: Annotated[Path, typer.Argument(help="Sweep as a TOML file.", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory for results [runs/NAME]")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once; with 1 measured CPU is undisturbed.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells, with an estimate.")] = False,
    rerun_failed: Annotated[bool, typer.Option("--rerun-failed", help="Also cells that have failed before.")] = False,
    engine: Annotated[str, typer.Option(metavar="E", help="local, or dask (extra tierfleet[dask])")] = "local",
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Of Dask: tcp://HOST:8786, or a scheduler file.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Of a cell on Dask that a machine could not run.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Run an experiment for every combination of values; what is already in DIR is not run again.

    \b
    Examples:
      fleet sweep examples/scalability.toml --dry-run
      fleet sweep examples/scalability.toml --out runs/scalability
      fleet sweep examples/scalability.toml --out runs/scalability --rerun-failed --jobs 2
      fleet sweep examples/scalability.toml --engine dask --scheduler tcp://head:8786
    """
    from fleet.sweep.spec import load_sweep

    chosen = _engine(engine, scheduler, retries, jobs)
    plan = load_sweep(spec)
    out = out or Path("runs", plan.name)

    def rerun(failed: "Cell") -> bool:
        return rerun_failed

    if dry_run:
        _show_plan(plan, out, rerun, jobs, as_json)
        return
    from rich.console import Console

    from fleet.sweep.progress import Display
    from fleet.sweep.run import run_cells

    with Display(Console(stderr=True, highlight=False)) as display:
        cells = run_cells(
            plan.points, out, progress=display, rerun=rerun, engine=chosen, name=plan.name, text=plan.text
        )
    if as_json:
        sys.stdout.write((out / "results.json").read_text("utf-8"))
    else:
        counts = {status: sum(cell.status == status for cell in cells) for status in ("done", "failed", "missing")}
        typer.echo(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        if counts["failed"]:
            typer.echo(f"why:     fleet results show {out}; --rerun-failed runs them again", err=True)
        typer.echo(f"digest:  {json.loads((out / 'results.json').read_text('utf-8'))['digest']}")
        typer.echo(f"results: {out}")
    raise typer.Exit(0 if all(cell.status == "done" for cell in cells) else 1)


def _engine(name: str, scheduler: str | None, retries: int, jobs: int) -> "Engine":
    if name not in _ENGINES:
        raise SpecError("--engine: " + unknown("engine", name, _ENGINES))
    if name == "dask":
        if scheduler is None:
            raise SpecError("--scheduler: where is it? e.g. tcp://HOST:8786 (see deploy/README.md)")
        from fleet.sweep.cluster import DaskEngine

        return DaskEngine(scheduler, retries)
    if scheduler is not None:
        raise SpecError("--scheduler: belongs to --engine dask")
    from fleet.sweep.local import LocalEngine

    return LocalEngine(jobs)


def _show_plan(plan: "Sweep", out: Path, rerun: "Callable[[Cell], bool]", jobs: int, as_json: bool) -> None:
    """The cells, each with its estimate, and what that rests on."""
    from fleet.sweep import estimate, store
    from fleet.sweep.progress import duration
    from fleet.sweep.run import to_run
    from proto.units import format_bytes

    cells = [store.find(out, point) for point in plan.points]
    rate = estimate.rate(cells)
    lines: list[dict[str, Any]] = [
        store.entry(point)
        | {
            "status": cell.status,
            "estimate_s": round(estimate.seconds(point.experiment, rate), 1),
            "memory_bytes": estimate.memory_bytes(point.experiment),
        }
        for point, cell in zip(plan.points, cells, strict=True)
    ]
    todo = {cell.hash: line["estimate_s"] for cell, line in zip(cells, lines, strict=True) if to_run(cell, rerun)}
    left_s = sum(todo.values())
    if as_json:
        total = {"cells": lines, "estimate_s": left_s, "rate": rate.value, "rate_source": rate.source, "jobs": jobs}
        typer.echo(json.dumps(total, indent=2))
        return
    for point, line in zip(plan.points, lines, strict=True):
        size = format_bytes(line["memory_bytes"])
        typer.echo(f"{line['cell']}  {line['status']:7}  {line['estimate_s']:7.1f} s  {size:>9}  {point.label}")
    typer.echo(
        f"{len(lines)} cells, {len(todo)} to run, about {duration(left_s)} one at a time "
        f"({rate.value:.2f} core-seconds per vCPU-second, {rate.source}; {estimate.START_S:g} s to start each)"
    )
