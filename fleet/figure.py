"""The picture of a run: fast-tier share and throughput over virtual time, and CPU per VM by stage; also as a sparkline.

The picture is legible in greyscale: policies differ in dashes and markers, stages in hatching. Time is the fleet's
virtual time; only intervals of the run phase are drawn, as populating is a phase of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 12
"""With more VMs than this the first of each policy and workload is drawn, as the others lie on it."""
MOST_BARS = 24

_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "v", "D", "x", "+", "*", "P", "<", ">", "h")
_GREYS = ("0.0", "0.35", "0.55")
_COLOURS = ("#1b4f8a", "#c2571a", "#2e7d4f", "#7b3f98", "#a12b3a", "#5c5c2e")
_STAGES = (("track", "0.25", ""), ("classify", "0.55", "//"), ("migrate", "0.80", ".."))
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#%"

Series = tuple[list[float], list[float]]
"""Times in virtual seconds, values."""


def read_series(timeseries: Path, column: str) -> dict[int, Series]:
    """Per VM: a column of ``timeseries.parquet`` over the run phase, without its nulls."""
    table = pq.read_table(timeseries, columns=["vm", "time_s", "phase", column])
    table = table.filter(pc.and_(pc.equal(table["phase"], "run"), pc.is_valid(table[column])))
    return series(table, column)


def series(table: pa.Table, column: str) -> dict[int, Series]:
    """Per VM: the times and the values of a column."""
    found: dict[int, Series] = {}
    rows = zip(*(table[name].to_pylist() for name in ("vm", "time_s", column)), strict=True)
    for vm, time_s, value in rows:
        times, values = found.setdefault(vm, ([], []))
        times.append(time_s)
        values.append(value)
    return found


def chosen_vms(vms: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The VMs to draw: all, or with more than ``most`` the first of each policy and workload."""
    if len(vms) <= most:
        return list(vms)
    firsts: dict[tuple[str, str], Mapping[str, Any]] = {}
    for vm in vms:
        firsts.setdefault((vm["policy"], vm["workload"]), vm)
    return list(firsts.values())[:most]


def draw(summary: Mapping[str, Any], timeseries: Path, target: Path) -> None:
    """Draw the run into the PNG file ``target``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["fast", "fast"], ["throughput", "throughput"], ["agent", "stolen"]])
    vms = chosen_vms(summary["vms"], MOST_LINES)
    fast = {vm: (t, [100 * v for v in values]) for vm, (t, values) in read_series(timeseries, "fast_ratio").items()}
    _lines(axes["fast"], vms, fast, "accesses to the fast tier (%)")
    axes["fast"].set_ylim(0, 100)
    _lines(axes["throughput"], vms, read_series(timeseries, "throughput_mops"), "throughput (M accesses/s)")
    axes["throughput"].set_ylim(bottom=0)
    axes["throughput"].set_xlabel("virtual time of the fleet (s)")
    handles, labels = axes["fast"].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    bars = [vm for vm in chosen_vms(summary["vms"], MOST_BARS) if "agent_cpu" in vm]
    _stages(axes["agent"], bars)
    _stolen(axes["stolen"], bars)
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png")


def _lines(axes: "Axes", vms: Sequence[Mapping[str, Any]], data: Mapping[int, Series], label: str) -> None:
    for index, vm in enumerate(vms):
        times, values = data.get(vm["id"], ([], []))
        axes.plot(
            times,
            values,
            linestyle=_DASHES[index % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markevery=max(1, len(times) // 12),
            markersize=4,
            linewidth=1.3,
            color=_COLOURS[index % len(_COLOURS)],
            label=f"vm{vm['id']} {vm['policy']} {vm['workload']}",
        )
    axes.set_ylabel(label)
    _grid(axes)


def _stages(axes: "Axes", vms: Sequence[Mapping[str, Any]]) -> None:
    """Measured and modelled CPU of each VM's tiering, stacked by stage: two bars a VM."""
    width = 0.38
    for offset, kind, edge in ((-width / 2, "measured_s", "black"), (width / 2, "modelled_s", "#c2571a")):
        bottom = [0.0] * len(vms)
        for stage, grey, hatch in _STAGES:
            heights = [1000 * vm["agent_cpu"][kind][stage] for vm in vms]
            places = [index + offset for index in range(len(vms))]
            label = stage if kind == "measured_s" else None
            axes.bar(
                places, heights, width, bottom, color=grey, hatch=hatch, edgecolor=edge, linewidth=0.8, label=label
            )
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    _vm_ticks(axes, vms)
    axes.set_ylabel("agent CPU (ms)")
    axes.set_title("left bar: measured, right bar: modelled", fontsize=9)
    axes.legend(fontsize=8, frameon=False)


def _stolen(axes: "Axes", vms: Sequence[Mapping[str, Any]]) -> None:
    heights = [1000 * vm["agent_cpu"]["stolen_s"] for vm in vms]
    axes.bar(range(len(vms)), heights, 0.6, color="0.7", edgecolor="black", linewidth=0.8, hatch="xx")
    _vm_ticks(axes, vms)
    axes.set_ylabel("stolen vCPU time (ms)")


def _vm_ticks(axes: "Axes", vms: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xticks(range(len(vms)), [f"vm{vm['id']}\n{vm['policy']}" for vm in vms], fontsize=8)
    axes.set_ylim(bottom=0)
    _grid(axes, "y")


def _grid(axes: "Axes", which: Any = "both") -> None:
    axes.grid(axis=which, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sparkline(values: Sequence[float], width: int, low: float, high: float, ascii_only: bool = False) -> str:
    """``values`` from ``low`` to ``high`` as at most ``width`` characters, each the mean of its stretch."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    count = min(width, len(values))
    span = high - low
    line = ""
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        share = (sum(part) / len(part) - low) / span if span > 0 else 0.0
        line += blocks[min(len(blocks) - 1, max(0, int(share * len(blocks))))]
    return line


def sparklines(summary: Mapping[str, Any], timeseries: Path, width: int = 60, ascii_only: bool = False) -> list[str]:
    """A line per drawn VM: its fast-tier share over the run, from 0 to 100 %, with first and last value."""
    data = read_series(timeseries, "fast_ratio")
    lines = []
    for vm in chosen_vms(summary["vms"], MOST_LINES):
        _, values = data.get(vm["id"], ([], []))
        if values:
            drawn = sparkline(values, width, 0.0, 1.0, ascii_only)
            label = f"vm{vm['id']} {vm['policy']} {vm['workload']}"
            lines.append(f"{label:<28.28} {100 * values[0]:5.1f} % {drawn} {100 * values[-1]:5.1f} %")
    return lines
