"""``heat.parquet`` and its picture: which 2 MiB of gVA, gPA and hPA a VM's accesses went to, interval by interval.

A row per VM, sampling interval of the run phase, space and bin that was accessed or in the policy's hot set
(`guestd.heat`). The picture shows the three spaces of a VM side by side, for as many VMs as fit on a page: hot data
that lie together in gVA and apart in gPA and hPA are why a range tree over gVA needs few ranges.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.atomic import replacing
from fleet.figure import chosen_vms
from proto.layout import HEAT, HEAT_SPACES
from proto.units import PS_PER_S

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = pa.schema(
    [
        ("vm", pa.int32()),
        ("time_s", pa.float64()),
        ("space", pa.dictionary(pa.int8(), pa.string())),
        ("address", pa.int64()),
        ("accesses", pa.int64()),
        ("hot_pages", pa.int64()),
    ]
)
BIN_BYTES = 1 << 21
MOST_VMS = 3
_GAP_BINS = 64
"""A longer stretch without an access is left out of the picture."""
_AT_A_TIME = 1 << 20
_TITLES = {"gva": "gVA", "gpa": "gPA", "hpa": "hPA"}


def merge(parts: Iterable[Path], target: Path) -> int:
    """Merge the guests' binary files into ``target`` and remove them; the number of rows.

    A file of a guest that was killed may end within a record: the rest is dropped. A million rows at a time.
    """
    present = [path for path in parts if path.exists()]
    rows = 0
    with replacing(target) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for path in present:
            count = path.stat().st_size // HEAT.itemsize
            for start in range(0, count, _AT_A_TIME):
                records = np.fromfile(path, HEAT, min(_AT_A_TIME, count - start), offset=start * HEAT.itemsize)
                writer.write_table(_rows(records))
            rows += count
    for path in present:
        path.unlink()
    return rows


def _rows(records: npt.NDArray[np.void]) -> pa.Table:
    columns = {name: np.ascontiguousarray(records[name]) for name in ("vm", "address", "accesses", "hot_pages")}
    columns["time_s"] = records["time_ps"] / PS_PER_S
    columns["space"] = pa.DictionaryArray.from_arrays(records["space"].astype(np.int8), pa.array(HEAT_SPACES))
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def draw(summary: Mapping[str, Any], table: Path, target: Path) -> bool:
    """Draw the VMs' maps into the PNG file ``target``; False, and no file, if nothing was accessed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heat = pq.read_table(table, filters=[("accesses", ">", 0)])
    vms = [vm for vm in chosen_vms(summary["vms"], MOST_VMS) if pc.any(pc.equal(heat["vm"], vm["id"])).as_py()]
    if not vms:
        return False
    figure = Figure(figsize=(13, 1.2 + 4.3 * len(vms)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(vms), len(HEAT_SPACES), squeeze=False, sharex="row")
    for row, vm in zip(grid, vms, strict=True):
        mine = heat.filter(pc.equal(heat["vm"], vm["id"]))
        scale = _scale(mine["accesses"].to_numpy())
        for axes, space in zip(row, HEAT_SPACES, strict=True):
            mesh = _map(axes, mine.filter(pc.equal(mine["space"].cast(pa.string()), space)), scale)
            axes.set_title(_title(vm, space), fontsize=9)
        row[0].set_ylabel(f"vm{vm['id']} {vm['policy']} {vm['workload']}\naddress (dashed: a hole, left out)")
        if mesh is not None:
            figure.colorbar(mesh, ax=row[-1], label="accesses to 2 MiB in an interval (log)")
    for axes in grid[-1]:
        axes.set_xlabel("virtual time of the fleet (s)")
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _title(vm: Mapping[str, Any], space: str) -> str:
    found = vm.get("locality", {}).get(space, {})
    words = [_TITLES[space]]
    if "ranges" in found:
        words.append(f"{found['ranges']} ranges, the hottest hold {100 * found['ranges_fast_ratio']:.0f} %")
    if "bins_fast_ratio" in found:
        words.append(f"best 2 MiB bins {100 * found['bins_fast_ratio']:.0f} %")
    return "\n".join(words)


def _scale(accesses: npt.NDArray[np.int64]) -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(float(accesses.min()), max(float(accesses.max()), float(accesses.min()) * 1.001))


def _map(axes: "Axes", rows: pa.Table, scale: Any) -> Any:
    """Address by time; dark is hot, also in greyscale. Addresses are ranks, with long holes cut out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if rows.num_rows == 0:
        return None
    times, column = np.unique(rows["time_s"].to_numpy(), return_inverse=True)
    bins = rows["address"].to_numpy() // BIN_BYTES
    used = np.unique(bins)
    cuts = np.flatnonzero(np.diff(used) > _GAP_BINS)
    starts, ends = used[np.concatenate([[0], cuts + 1])], used[np.concatenate([cuts, [used.size - 1]])] + 1
    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    stretch = np.searchsorted(starts, bins, side="right") - 1
    cells = np.zeros((int(offsets[-1]), times.size))
    cells[offsets[stretch] + bins - starts[stretch], column] = rows["accesses"].to_numpy()
    # The palest shades are left out: on white, a rare access must still be seen.
    shades = ListedColormap(colormaps["magma_r"](np.linspace(0.15, 1, 256)))
    first = times[0] - (times[1] - times[0] if times.size > 1 else times[0])
    edges = np.concatenate([[first], times])
    mesh = axes.pcolormesh(edges, np.arange(cells.shape[0] + 1), np.ma.masked_equal(cells, 0), cmap=shades, norm=scale,
                           rasterized=True)  # fmt: skip
    for cut in offsets[1:-1]:
        axes.axhline(cut, color="black", linewidth=0.6, linestyle="--")
    ticks = [
        (low + part, start + part)
        for (low, high), start in zip(pairwise(offsets.tolist()), starts.tolist(), strict=True)
        for part in range(0, high - low, max(1, cells.shape[0] // 6))
    ]
    axes.set_yticks([at for at, _ in ticks], [f"{number * BIN_BYTES:#x}" for _, number in ticks], fontsize=7,
                    family="monospace")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return mesh
