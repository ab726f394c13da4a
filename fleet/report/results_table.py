"""The figures of each VM of a run, or of each point of a sweep; and of a sweep its cells one by one."""

from collections.abc import Sequence

from fleet.report.subject import Spread, Subject, is_run
from fleet.report.table import Column, Table, Value
from fleet.sweep.store import Cell

_FIGURES = (
    # column, path in a VM's entry, whether VMs add up, factor
    (Column("throughput", "M accesses/s"), "throughput_mops", True, 1),
    (Column("fast share", "%"), "access.fast_ratio", False, 100),
    (Column("oracle", "%"), "hotness.oracle_fast_ratio", False, 100),
    (Column("of oracle", "%"), "hotness.share_of_oracle", False, 100),
    (Column("precision", "%"), "hotness.precision", False, 100),
    (Column("recall", "%"), "hotness.recall", False, 100),
    (Column("F1", "%"), "hotness.f1", False, 100),
    (Column("flushes"), "flushes.total", True, 1),
    (Column("remote flushes"), "flushes.remote_requests", True, 1),
    (Column("agent CPU measured", "cores"), "agent_cpu.measured_cores", True, 1),
    (Column("agent CPU modelled", "cores"), "agent_cpu.modelled_cores", True, 1),
    (Column("vCPU time stolen", "s"), "agent_cpu.stolen_s", True, 1),
    (Column("promoted", "pages"), "migration.promoted_pages", True, 1),
    (Column("demoted", "pages"), "migration.demoted_pages", True, 1),
    (Column("latency p50", "ns"), "access.latency_ns.p50", False, 1),
    (Column("latency p99", "ns"), "access.latency_ns.p99", False, 1),
    (Column("run", "virtual s"), "virtual_s", False, 1),
)


def results_table(cells: Sequence[Cell], found: Sequence[Subject]) -> Table:
    """A row per VM, or per point of a sweep."""
    run = is_run(cells)
    axes = () if run else tuple(dict.fromkeys(key for subject in found for key in subject.axes))
    repeated = any(len(subject.fleets) > 1 for subject in found)
    head = (Column("VM"), Column("outcome")) if run else (*map(Column, axes), *([Column("repetitions")] * repeated))
    used = [one for one in _FIGURES if any(subject.total(one[1]) for subject in found)]
    columns: list[Column] = list(head)
    for column, *_ in used:
        columns.append(column)
        columns += [Column(f"{column.name} range", column.unit)] * repeated
    rows = []
    for subject in found:
        row: list[Value] = (
            [subject.label, str(subject.fleets[0][0]["outcome"])]
            if run
            else [_plain(subject.axes.get(key)) for key in axes]
        )
        if repeated:
            row.append(len(subject.fleets))
        for _, path, adds_up, factor in used:
            spread = subject.total(path) if adds_up else subject.mean(path)
            row.append(None if spread is None else _number(factor * spread.mean))
            if repeated:
                row.append(None if spread is None else _range(spread, factor))
        rows.append(tuple(row))
    note = "" if run else "Throughput, flushes, CPU and pages: sum over the VMs; others: mean over them."
    if repeated:
        note += " Mean over the repetitions, and their range."
    return Table("results", "VMs" if run else "Points of the sweep", tuple(columns), tuple(rows), note)


def cells_table(cells: Sequence[Cell]) -> Table:
    """Every cell with how it ended, and its digest."""
    axes = tuple(dict.fromkeys(key for cell in cells for key in cell.axes))
    rows: list[tuple[Value, ...]] = []
    for cell in cells:
        summary = cell.summary or {}
        rows.append(
            (
                cell.hash, *(_plain(cell.axes.get(key)) for key in axes), cell.repetition,
                summary.get("run", {}).get("seed"), cell.status, cell.reason or None,
                summary.get("elapsed", {}).get("wall_s"), summary.get("digest"),
            )
        )  # fmt: skip
    columns = (
        Column("cell"), *map(Column, axes), Column("repetition"), Column("seed"), Column("status"), Column("reason"),
        Column("wall", "s"), Column("digest"),
    )  # fmt: skip
    return Table("cells", "Cells", columns, tuple(rows), "A cell has a report of its own: fleet report DIR/cells/CELL.")


def _number(value: float) -> Value:
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


def _range(spread: Spread, factor: float) -> str:
    return f"{factor * spread.low:.4g} to {factor * spread.high:.4g}"


def _plain(value: object) -> Value:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
