"""What a report speaks of: the VMs of a run one by one, or the points of a sweep, each with its repetitions.

A point is one choice of the axes' values; a figure of it is the sum or the mean over its VMs in each repetition, and
then the mean over the repetitions with their lowest and highest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fleet.sweep.store import Cell
from fleet.table import figure as figure_at

Vm = Mapping[str, Any]


class Spread(NamedTuple):
    """A mean over repetitions, and their lowest and highest."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Subject:
    """One thing with a label. ``fleets``: the VMs of each repetition (of a run's VM: itself, once)."""

    label: str
    axes: dict[str, object]
    fleets: tuple[tuple[Vm, ...], ...]

    def total(self, path: str) -> Spread | None:
        """The sum over the VMs of a figure of `fleet.table.figure`; None where no VM has it."""
        return self.spread(lambda vm: figure_at(vm, path), sum)

    def mean(self, path: str) -> Spread | None:
        """The mean over the VMs."""
        return self.spread(lambda vm: figure_at(vm, path), lambda values: sum(values) / len(values))

    def spread(self, figure: Callable[[Vm], float | None], reduce: Callable[[list[float]], float]) -> Spread | None:
        """``figure`` of each VM, reduced over the VMs of each repetition that have it."""
        each = [
            reduce(values) for fleet in self.fleets if (values := [v for vm in fleet if (v := figure(vm)) is not None])
        ]
        return Spread(sum(each) / len(each), min(each), max(each)) if each else None


def subjects(cells: Sequence[Cell]) -> list[Subject]:
    """Of a run its VMs, of a sweep its points in the order in which they come; what left no summary is left out."""
    if is_run(cells):
        summary = cells[0].summary
        vms = [] if summary is None else summary["vms"]
        return [Subject(vm_label(vm), {}, ((vm,),)) for vm in vms]
    points: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.summary is not None and cell.status == "done":
            points.setdefault(repr(cell.axes), []).append(cell)
    implied = implied_axes(cells)
    return [
        Subject(
            axes_label(group[0].axes, implied),
            group[0].axes,
            tuple(tuple(cell.summary["vms"]) for cell in group if cell.summary),
        )
        for group in points.values()
    ]


def is_run(cells: Sequence[Cell]) -> bool:
    """Whether this is one run and no sweep."""
    return len(cells) == 1 and not (cells[0].path / "cell.json").is_file()


def vm_label(vm: Vm) -> str:
    """``vm0 g-tpp gups``."""
    return f"vm{vm['id']} {vm['policy']} {vm['workload']}"


def axes_label(axes: Mapping[str, object], without: tuple[str, ...] = ()) -> str:
    """``3 VMs g-tpp scan_period=1s``: values that say what they are alone, others after the end of their key."""
    parts = []
    for key, value in axes.items():
        if key in without:
            continue
        if key == "vms":
            parts.append(f"{value} VM{'' if value == 1 else 's'}")
        elif key in ("policy", "workload"):
            parts.append(str(value))
        else:
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return " ".join(parts) or "all"


def advancing_with(key: str, points: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """``key`` and the axes that have one value for each of its values, as those have that a sweep zips with it."""
    values: dict[str, dict[object, set[str]]] = {}
    for axes in points:
        for name, value in axes.items():
            values.setdefault(name, {}).setdefault(axes[key], set()).add(repr(value))
    return tuple(name for name, by_key in values.items() if all(len(each) == 1 for each in by_key.values()))


def implied_axes(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Axes that labels leave out, as the number of VMs tells them: the memory of each, say."""
    points = [cell.axes for cell in cells]
    if not all("vms" in axes for axes in points):
        return ()
    return tuple(name for name in advancing_with("vms", points) if name not in ("vms", "policy", "workload"))


def cell_label(cell: Cell, without: tuple[str, ...] = ()) -> str:
    """The label of a cell's point, with the repetition where it is not the first."""
    return axes_label(cell.axes, without) + (f" #{cell.repetition + 1}" if cell.repetition else "")


MOST_VMS = 4
"""VMs that have a figure to themselves; more are in the reports of their cells."""
MOST_CELLS = 8


def typical(cells: Sequence[Cell]) -> list[Cell]:
    """Of a sweep, the cell of each policy with the most VMs (first values of other axes, first repetition)."""
    chosen: dict[str, Cell] = {}
    for cell in cells:
        if cell.status != "done" or cell.summary is None or cell.repetition:
            continue
        kind = axes_label({key: value for key, value in cell.axes.items() if key in ("policy", "workload")})
        if kind not in chosen or len(cell.summary["vms"]) > len((chosen[kind].summary or {})["vms"]):
            chosen[kind] = cell
    return list(chosen.values())[:MOST_CELLS]


def chosen_vms(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Vm, str]]:
    """At most `MOST_VMS`, each with its label: the first of each policy and workload of a run, or of typical cells."""
    found: list[tuple[Cell, Vm, str]] = []
    run, implied = is_run(cells), implied_axes(cells)
    for cell in cells if run else typical(cells):
        kinds: set[tuple[str, str]] = set()
        for vm in (cell.summary or {}).get("vms", []):
            kind = (vm["policy"], vm["workload"])
            if kind not in kinds and vm["policy"] != "none":
                kinds.add(kind)
                found.append((cell, vm, vm_label(vm) if run else f"{cell_label(cell, implied)}, vm{vm['id']}"))
    yield from found[:MOST_VMS]
