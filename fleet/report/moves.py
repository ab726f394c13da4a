"""The move trace: which page went where, when (events.parquet)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.report.addresses import Addresses, AddressMap
from fleet.report.figure import Absent, Axis, Figure, Look, Series, Values
from fleet.report.heat import address_space
from fleet.report.series_over_time import TIME
from fleet.report.subject import chosen_vms
from fleet.sweep.store import Cell

_LOOKS = {
    "promote": Look(marker=2, colour=0),
    "demote": Look(marker=3, colour=1),
    "exchange": Look(marker=5, colour=2),
    "split": Look(marker=4, colour=3),
}


def move_traces(cells: Sequence[Cell]) -> Iterator[Figure | Absent]:
    """A figure for each VM of `chosen_vms` of which a page was moved."""
    drawn = 0
    for cell, vm, label in chosen_vms(cells):
        path = cell.path / "events.parquet"
        found = _moves(path, vm["id"]) if path.is_file() else {}
        if found:
            drawn += 1
            regions = AddressMap.of(np.concatenate([address for _, address in found.values()]))
            series = tuple(
                Series(kind, time_s, regions.place(address), _LOOKS[kind], "points")
                for kind, (time_s, address) in found.items()
            )
            where = "gVA of the page" if address_space(vm) == "gva" else "guest-physical address of the page"
            note = "Every page that was moved, populating included. Holes between regions are left out."
            axis = Axis(where, "", addresses=regions)
            yield Figure(f"moves-{drawn}", f"Move trace: {label}", TIME, axis, series, note)
    if not drawn:
        yield Absent("Move trace", "no page of these VMs was moved (events.parquet)")


def _moves(path: Path, vm: int) -> dict[str, tuple[Values, Addresses]]:
    """Per kind of move: times and addresses."""
    table = pq.read_table(path, filters=[("vm", "=", vm)], columns=["time_s", "kind", "gva"])
    kinds = table["kind"].cast(pa.string())
    found = {}
    for kind in _LOOKS:
        part = table.filter(pc.equal(kinds, kind))
        if part.num_rows:
            found[kind] = (part["time_s"].to_numpy().astype(np.float64), part["gva"].to_numpy().astype(np.int64))
    return found
