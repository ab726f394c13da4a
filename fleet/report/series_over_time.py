"""Throughput, fast-tier share and accuracy over virtual time: a line per VM of a run, or per cell of a sweep.

A cell's line is of all its VMs together. The best that any placement could do is drawn beside the share: from the time
series where it has a column of it, else as the level in the summary (`guestd.hotness`). Only the run phase is drawn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.report.figure import NO_MARKER, Absent, Axis, Figure, Look, Series, Values
from fleet.report.subject import cell_label, implied_axes, is_run, typical, vm_label
from fleet.sweep.store import Cell

MOST_SHOWN = 8
"""Lines that are drawn at first; the others are in the legend."""
MOST_LINES = 48
"""Lines of which a legend can be read; cells beyond have reports of their own."""

TIME = Axis("virtual time of the fleet", "s")


class Track(NamedTuple):
    """The intervals of one VM, or of all VMs of a cell together."""

    label: str
    shown: bool
    time_s: Values
    throughput_mops: Values
    fast_ratio: Values
    oracle: Values
    """float64[n], as the next two; NaN where unknown."""
    precision: Values
    recall: Values


def tracks(cells: Sequence[Cell]) -> tuple[list[Track], str]:
    """The lines, and what must be said about those that are not there."""
    if is_run(cells):
        found = list(_vm_tracks(cells[0]))
        more = len(found) - MOST_LINES
    else:
        chosen, implied = typical(cells), implied_axes(cells)
        found = [
            track
            for cell in cells
            if cell.status == "done"
            and (track := _cell_track(cell, cell_label(cell, implied), cell in chosen)) is not None
        ]
        found.sort(key=lambda track: not track.shown)
        more = len(found) - MOST_LINES
    hidden = sum(not track.shown for track in found[:MOST_LINES])
    note = f"{hidden} more lines can be switched on in the legend. " if hidden else ""
    return found[:MOST_LINES], note + (f"{more} further lines are left out." if more > 0 else "")


def throughput(found: Sequence[Track], note: str) -> Figure | Absent:
    """Million accesses per virtual second."""
    title = "Throughput over time"
    series = [
        Series(track.label, track.time_s, track.throughput_mops, Look.number(index), shown=track.shown)
        for index, track in enumerate(found)
    ]
    if not series:
        return Absent(title, NOTHING)
    return Figure("throughput", title, TIME, Axis("throughput", "M accesses/s"), tuple(series), note)


def fast_share(found: Sequence[Track], note: str) -> Figure | Absent:
    """Accesses to the fast tier, and the oracle's."""
    title = "Fast-tier share over time"
    series: list[Series] = []
    for index, track in enumerate(found):
        series.append(Series(track.label, track.time_s, 100 * track.fast_ratio, Look.number(index), shown=track.shown))
    best = _alike(found)
    for members in best:
        track = found[members[0]]
        label = "oracle" if len(best) == 1 else f"oracle of {track.label}" + (" and alike" if members[1:] else "")
        look = Look(dash=2, marker=NO_MARKER, colour=members[0])
        shown = any(found[index].shown for index in members)
        series.append(Series(label, track.time_s, 100 * track.oracle, look, shown=shown))
    if not found:
        return Absent(title, NOTHING)
    about = (
        "Oracle: the share that the best placement of the pages would give."
        if best
        else "No oracle: none of these workloads tells its own heat."
    )
    axis = Axis("accesses to the fast tier", "%", limits=(0, 100))
    return Figure("fast-share", title, TIME, axis, tuple(series), f"{about} {note}".strip())


def _alike(found: Sequence[Track]) -> list[list[int]]:
    """Tracks with an oracle, in groups whose oracles are within one percentage point of the first's: one line each."""
    groups: list[list[int]] = []
    for index, track in enumerate(found):
        if np.isnan(track.oracle).all():
            continue
        for group in groups:
            first = found[group[0]].oracle
            if len(first) == len(track.oracle) and np.allclose(first, track.oracle, 0.0, 0.01, equal_nan=True):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def accuracy(found: Sequence[Track], note: str) -> Figure | Absent:
    """Precision and recall of the policy's hot set."""
    title = "Accuracy of the hot set over time"
    series = [
        Series(f"{track.label} ({what})", track.time_s, 100 * share, Look(dash, index, index), shown=track.shown)
        for index, track in enumerate(found)
        for dash, (what, share) in enumerate((("precision", track.precision), ("recall", track.recall)))
        if not np.isnan(share).all()
    ]
    if not series:
        return Absent(title, "the time series has no precision and recall (hotness.precision, hotness.recall)")
    about = "Solid: share of the pages taken for hot that are. Dashed: share of the hot pages that are taken for hot."
    axis = Axis("pages", "%", limits=(0, 100))
    return Figure("accuracy", title, TIME, axis, tuple(series), f"{about} {note}".strip())


_TRUTHS = ("oracle_fast_ratio", "precision", "recall")
NOTHING = "no interval of a run phase is recorded (timeseries.parquet)"


def _vm_tracks(cell: Cell) -> Iterator[Track]:
    table = _intervals(cell)
    if table is None or cell.summary is None:
        return
    kinds: set[tuple[str, str]] = set()
    vms = cell.summary["vms"]
    for vm in vms:
        part = table.filter(pc.equal(table["vm"], vm["id"]))
        if not part.num_rows:
            continue
        kind = (vm["policy"], vm["workload"])
        shown = len(vms) <= MOST_SHOWN or kind not in kinds
        kinds.add(kind)
        yield _track(vm_label(vm), shown, part, vm.get("hotness", {}).get("oracle_fast_ratio"))


def _cell_track(cell: Cell, label: str, shown: bool) -> Track | None:
    table = _intervals(cell)
    if table is None or not table.num_rows or cell.summary is None:
        return None
    weights = [
        (vm["hotness"]["oracle_fast_ratio"], vm["access"]["total"])
        for vm in cell.summary["vms"]
        if "oracle_fast_ratio" in vm.get("hotness", {})
    ]
    known = len(weights) == len(cell.summary["vms"]) and sum(total for _, total in weights) > 0
    oracle = sum(ratio * total for ratio, total in weights) / sum(total for _, total in weights) if known else None
    return _track(label, shown, table, oracle)


def _track(label: str, shown: bool, table: pa.Table, oracle: float | None) -> Track:
    """All VMs of ``table`` together: intervals end at barriers of the fleet, hence at about the same time."""
    time_s, length_s = _column(table, "time_s"), _column(table, "interval_s")
    total, fast = _column(table, "access.total"), _column(table, "access.fast")
    nominal = max(float(np.median(length_s)), 1e-12)
    _, bins = np.unique(np.rint(time_s / nominal).astype(np.int64), return_inverse=True)
    first_vm = bins * (1 + int(_column(table, "vm").max())) + _column(table, "vm").astype(np.int64)
    _, places = np.unique(first_vm, return_inverse=True)
    each_s = np.bincount(places, length_s)
    bin_of = np.zeros(len(each_s), np.int64)
    bin_of[places] = bins
    longest_s = np.zeros(bins.max() + 1)
    np.maximum.at(longest_s, bin_of, each_s)
    ends = np.zeros(bins.max() + 1)
    np.maximum.at(ends, bins, time_s)
    accesses = np.bincount(bins, total)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.bincount(bins, fast) / accesses
    rate = accesses / np.maximum(longest_s, 1e-12) / 1e6
    best, precision, recall = (_mean(table, f"hotness.{name}", bins, total) for name in _TRUTHS)
    if oracle is not None and np.isnan(best).all():
        best = np.full(len(ends), oracle)
    return Track(label, shown, ends, rate, ratio, best, precision, recall)


def _mean(table: pa.Table, name: str, bins: npt.NDArray[np.int64], weight: Values) -> Values:
    """Per bin, a column's mean over the VMs by their accesses; NaN where one that ran does not know it."""
    if name not in table.column_names:
        return np.full(int(bins.max()) + 1, np.nan)
    product = np.where(weight > 0, _column(table, name) * weight, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.bincount(bins, product) / np.bincount(bins, weight)


def _column(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


def _intervals(cell: Cell) -> pa.Table | None:
    path = cell.path / "timeseries.parquet"
    if not path.is_file():
        return None
    wanted = ["vm", "time_s", "interval_s", "phase", "access.total", "access.fast"]
    names = pq.read_schema(path).names
    table = pq.read_table(path, columns=wanted + [name for name in map("hotness.{}".format, _TRUTHS) if name in names])
    return table.filter(pc.equal(table["phase"], "run"))
