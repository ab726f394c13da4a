"""`fleet trace import` and `fleet trace info`.

Heavy libraries are loaded when a command runs, so that `fleet --help` stays quick. Figures go to standard output,
everything else to standard error.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from proto.errors import TraceError, UnitError
from proto.units import format_bytes, parse_bytes

app = typer.Typer(help="Recorded memory accesses: import them, look at them.", no_args_is_help=True)

_PROGRESS_BYTES = 8 << 20


class FormatName(StrEnum):
    """Recording formats (`fleet.trace.importer.Format`, which loads too much to be imported here)."""

    LACKEY = "lackey"
    PERF = "perf"
    CSV = "csv"
    PARQUET = "parquet"


class TimeUnit(StrEnum):
    """Units of a table's time column."""

    NS = "ns"
    US = "us"
    MS = "ms"
    S = "s"


@contextmanager
def _bad_input() -> Iterator[None]:
    """A user's mistake ends in one line and exit code 2."""
    try:
        yield
    except (TraceError, UnitError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


_IMPORT_HELP = "\n\n".join(
    (
        "Make a .trace of a recording; plain, .zst or .gz.",
        "lackey: valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM. L, S and M lines are kept, I lines "
        "count as compute between them, Valgrind's own lines are skipped.",
        "perf: samples with data addresses (perf mem record, or perf record -d), as text: perf script -F "
        "time,event,addr (any fields, as long as addr is one), or perf mem report -D (with or without -x SEP).",
        "csv, parquet: columns address and rw (r, w or m; load, store or modify; 0 or 1), if there are any also time "
        "and size, in any order. A CSV without header is read as address, rw with or without time before and size "
        "behind. Addresses with 0x are hexadecimal.",
        "Lines that cannot be read are reported. More of them than --max-garbage, or a truncated .zst or .gz, are an "
        "error; then nothing is written.",
    )
)


@app.command("import", help=_IMPORT_HELP)
def import_command(
    file: Annotated[Path, typer.Argument(help="Recording; - reads standard input.", show_default=False)],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Trace to write. Default: NAME.trace in this directory."),
    ] = None,
    format_: Annotated[
        FormatName | None, typer.Option("--format", help="Default: found out.", case_sensitive=False)
    ] = None,
    dropped_per_line: Annotated[
        float | None,
        typer.Option(help="References that a cache filter dropped for each line it left in the recording."),
    ] = None,
    references_before_filter: Annotated[
        int | None, typer.Option(min=1, help="The same as a total: data references before that filter.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Drop references that hit in an LRU cache of this size, e.g. 1MiB.", show_default=False),
    ] = None,
    max_garbage: Annotated[float, typer.Option(help="Lines that may be unreadable, per cent.")] = 1.0,
    time_unit: Annotated[
        TimeUnit, typer.Option(help="Unit of a table's time column, where its name (time_us) does not say.")
    ] = TimeUnit.NS,
    hex_: Annotated[bool, typer.Option("--hex", help="A table's addresses are hexadecimal even without 0x.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    from fleet.trace.importer import Format, ImportOptions, import_trace

    with _bad_input():
        target = out or Path(_default_name(file))
        options = ImportOptions(
            format=Format(format_.value) if format_ else None,
            dropped_per_line=dropped_per_line,
            references_before_filter=references_before_filter,
            cache_bytes=parse_bytes(cache) if cache else 0,
            max_garbage=max_garbage,
            time_unit=time_unit.value,
            hexadecimal=hex_,
        )
        with _progress(file) as progress:
            imported = import_trace(file, target, options, progress)
    for warning in imported.warnings:
        typer.echo(f"warning: {warning}", err=True)
    meta = imported.meta
    if json_:
        typer.echo(json.dumps({"trace": str(target), "references": imported.references, **asdict(meta)}))
        return
    details = [f"{meta.lines} lines", f"{meta.skipped} skipped", f"{meta.garbage} unreadable"]
    details += [f"{meta.instructions} instructions"] if meta.instructions else []
    details += [f"{meta.filtered} dropped by the cache"] if meta.filtered else []
    size = format_bytes(target.stat().st_size)
    typer.echo(f"{target}: {imported.references} references ({size}) from {meta.source_format}: {', '.join(details)}")


def _default_name(file: Path) -> str:
    if str(file) == "-":
        raise TraceError("standard input has no name; say what to write with --out X.trace")
    return f"{file.name.removesuffix('.zst').removesuffix('.gz').rpartition('.')[0] or file.name}.trace"


@contextmanager
def _progress(file: Path) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, for files long enough to want one."""
    if not sys.stderr.isatty() or not file.is_file() or file.stat().st_size < _PROGRESS_BYTES // 8:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"import {file.name}", total=1.0)
        yield lambda share: bar.update(task, completed=share)


@app.command("info")
def info_command(
    trace: Annotated[Path, typer.Argument(help="A .trace file.", show_default=False)],
    png: Annotated[Path | None, typer.Option(help="Write the heat map to this PNG file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Footprint, mix, reuse, regions and a heat map (address by time) of a trace."""
    from fleet.trace.info import describe
    from proto.trace import read_trace

    with _bad_input():
        info = describe(read_trace(trace), str(trace))
        if png:
            from fleet.trace.heatmap import write_png

            write_png(info, png)
    summary = info.summary() | ({"png": str(png)} if png else {})
    if json_:
        typer.echo(json.dumps(summary))
        return
    from rich.console import Console

    from fleet.trace.heatmap import heat_map, render_text

    console = Console()
    for line in _text(summary):
        typer.echo(line)
    typer.echo()
    columns = min(max((console.width if console.is_terminal else 100) - 40, 20), 120)
    plain = not console.is_terminal or "utf" not in (sys.stdout.encoding or "").lower()
    for line in render_text(heat_map(info, 24, columns), ascii_only=plain):
        typer.echo(line)
    if png:
        typer.echo(f"\nheat map: {png}")


_SHOWN_REGIONS = 20


def _text(summary: dict[str, Any]) -> Iterator[str]:
    references = summary["references"]
    footprint, mix, compute, reuse = (summary[key] for key in ("footprint", "mix", "compute", "reuse"))
    yield f"{summary['trace']}  (from {summary['source'] or '?'}, {summary['source_format'] or '?'})"
    yield f"  references   {references:,}, {summary['page_crossing_references']:,} of them across a page boundary"
    yield f"  footprint    {footprint['pages']:,} pages of 4 KiB, {format_bytes(footprint['bytes'])}"
    shares = ", ".join(f"{100 * count / references:.3g} % {name}" for name, count in mix.items())
    yield f"  mix          {shares}"
    unit = {"instruction": "instructions", "ns": "ns"}.get(compute["unit"])
    between = f"{compute['per_reference']:.4g} {unit} per reference" if unit else "not recorded"
    yield f"  compute      {between}; {compute['dropped_per_reference']:.5g} references filtered out for each kept"
    popular = summary["popularity"]
    yield (
        f"  per page     {popular['references_per_page_mean']:.4g} references mean, "
        f"{popular['references_per_page_median']:g} median; {popular['pages_used_once']:,} pages used once"
    )
    distance = reuse["distance_pages"]
    yield (
        f"  reuse        distance {distance['p50']:,} pages (median), {distance['p90']:,} (p90), "
        f"{distance['p99']:,} (p99); {100 * reuse['first_use_share']:.3g} % are first uses"
    )
    tiers = summary["served_by_fast_tier"]
    yield "  served by a fast tier of   " + "".join(f"{100 * tier['footprint_share']:>8.0f} %" for tier in tiers)
    yield "    most used pages, static  " + "".join(f"{100 * tier['static']:>8.1f} %" for tier in tiers)
    yield "    LRU over pages           " + "".join(f"{100 * tier['lru']:>8.1f} %" for tier in tiers)
    regions = sorted(summary["regions"], key=lambda region: -region["touched_pages"])
    yield f"  regions      {len(regions)}, apart by holes of more than 1 MiB; names are guessed from the addresses"
    yield f"    {'name':12} {'start':>16} {'end':>16} {'pages':>9} {'touched':>9} {'references':>12}"
    for region in regions[:_SHOWN_REGIONS]:
        yield (
            f"    {region['name']:12} {region['start']:>16} {region['end']:>16} {region['span_pages']:>9,} "
            f"{region['touched_pages']:>9,} {region['references']:>12,}"
        )
    if len(regions) > _SHOWN_REGIONS:
        yield f"    and {len(regions) - _SHOWN_REGIONS} smaller ones (--json lists all)"
