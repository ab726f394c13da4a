"""What ``fleet validate`` prints: the TLB-flush table, the scalability figure's points, the groups, the verdicts."""

from collections.abc import Iterable, Sequence
from fractions import Fraction

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.validate.claims import STAGES
from fleet.validate.published import COUNTERS
from fleet.validate.runner import Report
from fleet.validate.verdict import Judgement, Verdict


def print_report(report: Report, console: Console) -> None:
    """All of it."""
    _line(
        console,
        f"scale {report.scale}; GUPS of the table: {report.table_updates:.3g} updates before scale (an assumption)\n",
    )
    if report.flushes:
        _print_flushes(report, console)
    if report.figure:
        _print_figure(report, console)
    _line(console, "Dimensionless groups, at full size and at this scale")
    rows = [
        (group.name, f"{group.full:.4g}", f"{group.here:.4g}", "kept" if group.kept else "BROKEN", group.note)
        for group in report.groups
    ]
    _print(console, ("group", "full", "here", "", ""), rows)
    _line(console, "\nClaims")
    heading = ("claim", "published", "emulated", "emu/pub", "range", "verdict", "basis")
    _print(console, heading, [_claim_line(one) for one in report.judgements])
    for one in report.judgements:
        _line(console, f"\n{one.claim}: {one.statement}")
        for text in _notes(one):
            _line(console, f"  {text}")
    for name, why in report.failed.items():
        _line(console, f"FAILED {name}: {why}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _print_flushes(report: Report, console: Console) -> None:
    n = f" (x {1 / Fraction(report.scale)})" if report.scale != "1" else ""
    _line(console, f"TLB flushes: emulated{n} | published")
    _print(console, ("", *(row.policy for row in report.flushes)), _flush_lines(report))
    _line(console, "net: less the background, the fewest local single flushes of any column (the emulator has none)\n")


def _print_figure(report: Report, console: Console) -> None:
    _line(console, "Scalability: cores that tiering burns (modelled) in all VMs together, which have 36 vCPUs; ")
    _line(console, f"TCO = cores a VM x VMs x price of a core ({report.price:g})")
    points = []
    for row in report.figure:
        figures = (row.cores, *(row.stages[stage] for stage in STAGES), row.stolen_cores, row.virtual_s, row.tco)
        points.append((row.policy, str(row.vms), *(f"{figure:.3f}" for figure in figures)))
    _print(console, ("policy", "VMs", "cores", *STAGES, "stolen vCPUs", "virtual s", "TCO"), points)
    for policy in report.absent:
        _line(console, f"{policy}: not there (this installation has no such policy)")
    _line(console, "")


def _flush_lines(report: Report) -> list[tuple[str, ...]]:
    rows = report.flushes

    def count(here: float, there: float | None = None) -> str:
        whole = "" if report.scale == "1" else f" ({float(here / Fraction(report.scale)):.3g})"
        shown = f"{here:,}" if isinstance(here, int) else f"{here:.3f}"
        return f"{shown}{whole}" + ("" if there is None else f" | {there:,}")

    lines: list[tuple[str, ...]] = [
        (name, *(count(row.raw[name], row.published[name]) for row in rows)) for name in (*COUNTERS, "total")
    ]
    lines += [
        ("total, net", *(count(row.net, row.published_net) for row in rows)),
        ("INVEPT executed", *(count(row.invepts) for row in rows)),
        ("executions/request", *(f"{row.executions_per_request:.2f} | {_number(row.published_executions_per_request)}"
                                 for row in rows)),
        ("elapsed s", *(count(row.elapsed_s, row.published["elapsed_s"]) for row in rows)),
        ("with populating", *(count(row.elapsed_with_populate_s) + " | as above" for row in rows)),
        ("in guest mode", *(f"{100 * row.guest_mode_ratio:.1f} %" for row in rows)),
        ("fast-tier share", *(f"{100 * row.fast_ratio:.1f} %" for row in rows)),
        ("M updates/s", *(f"{row.mops:.1f}" for row in rows)),
    ]  # fmt: skip
    return lines


def _claim_line(one: Judgement) -> tuple[str, ...]:
    span = "" if one.low is None or one.high is None else f"{one.low:.3g} - {one.high:.3g}"
    return (
        one.claim, _number(one.published), _number(one.emulated), _number(one.ratio), span, one.verdict, one.basis,
    )  # fmt: skip


def _notes(one: Judgement) -> list[str]:
    notes = [one.evidence] if one.evidence else []
    if one.verdict is Verdict.NOT_COMPARABLE:
        notes.append("this scale breaks: " + ", ".join(one.breaks))
    if one.varied:
        beyond = f"; at an end it {', or '.join(one.range_verdicts)}" if one.range_verdicts else ""
        bounds = (f"{cost} {' .. '.join(f'{at:.3g}' for at in values)}" for cost, values in one.varied.items())
        notes.append(f"with a cost at its lowest .. highest: {', '.join(bounds)}{beyond}")
    if one.unvaried:
        notes.append(f"not moved: {', '.join(one.unvaried)} (--costs all)")
    if one.confounders:
        notes.append("confounded by: " + "; ".join(one.confounders))
    return notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _print(console: Console, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, title in enumerate(heading):
        table.add_column(title, no_wrap=number == 0 and len(heading) > 4, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
