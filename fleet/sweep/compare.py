"""Two sets of cells against each other, metric by metric, at equal points of their axes.

A metric that the summary's digest covers is deterministic: a difference is exact, and there is none only where all
pairs of equal point and seed agree; the interval is then over seeds. What this machine measured varies from run
to run: there the permutation test decides (`fleet.sweep.permutation`), which needs repetitions.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fleet.errors import SpecError
from fleet.names import unknown
from fleet.summary import is_deterministic
from fleet.sweep.permutation import LEVEL, Difference, compare, untested
from fleet.sweep.results import numbers
from fleet.sweep.store import Cell, load
from fleet.sweep.where import comparable


class Metric(NamedTuple):
    """A number of a cell."""

    path: str
    """In a VM's entry of the summary, or from its top (``elapsed.``, ``host.``)."""
    over: Literal["sum", "mean"] = "mean"
    """What is made of the VMs' values."""

    @property
    def deterministic(self) -> bool:
        """Whether two runs of one spec agree in it."""
        return is_deterministic(self.path if self.of_run else f"vms.0.{self.path}")

    @property
    def of_run(self) -> bool:
        """Whether the run as a whole has it."""
        return self.path.startswith(("elapsed.", "host."))

    @property
    def label(self) -> str:
        """``sum:flushes.total``."""
        return self.path if self.over == "mean" else f"{self.over}:{self.path}"

    def of(self, cell: Cell) -> float | None:
        """Its value; None if the cell has none."""
        if cell.summary is None:
            return None
        parts: Iterable[Mapping[str, Any]] = [cell.summary] if self.of_run else cell.summary["vms"]
        found = [values[self.path] for part in parts if self.path in (values := dict(numbers(part)))]
        return None if not found else sum(found) / (len(found) if self.over == "mean" else 1)


METRICS = (
    Metric("throughput_mops"),
    Metric("access.fast_ratio"),
    Metric("access.latency_ns.p99"),
    Metric("flushes.total", "sum"),
    Metric("flushes.remote_requests", "sum"),
    Metric("migration.promoted_pages", "sum"),
    Metric("migration.demoted_pages", "sum"),
    Metric("agent_cpu.modelled_cores", "sum"),
    Metric("agent_cpu.stolen_s", "sum"),
    Metric("agent_cpu.measured_cores", "sum"),
)


class Finding(NamedTuple):
    """One metric, compared."""

    metric: Metric
    pairs: int
    equal_pairs: int
    exact: bool
    """Nothing in the difference is up to chance: deterministic, and no side has several cells at a point."""
    difference: Difference

    @property
    def verdict(self) -> str:
        """In words."""
        found = self.difference
        if self.metric.deterministic:
            if not self.pairs:
                return "cannot tell: no seed in common"
            if self.equal_pairs == self.pairs:
                return "no difference"
            return "differs" if self.equal_pairs == 0 else f"differs in {self.pairs - self.equal_pairs} of {self.pairs}"
        if found.smallest_p > LEVEL:
            return "cannot tell: too few repetitions"
        return "differs" if found.p <= LEVEL else "no difference"


class Comparison(NamedTuple):
    """Everything that `fleet compare` says."""

    points: int
    """Of the axes, at which both sides have cells."""
    unmatched: int
    """Cells without a counterpart."""
    disturbed: int
    """Compared cells that ran beside others: their measured CPU is not to be trusted."""
    findings: list[Finding]


def select(where: str) -> tuple[list[Cell], set[str]]:
    """The done cells of ``DIR`` or ``DIR:KEY=VALUE,...``, and the keys that were selected by. Raises SpecError."""
    directory, colon, conditions = where.rpartition(":")
    if not colon or "=" not in conditions or Path(where).exists():
        directory, conditions = where, ""
    cells = [cell for cell in load(Path(directory)) if cell.status == "done"]
    keys = {key for cell in cells for key in cell.axes}
    chosen: dict[str, str] = {}
    for condition in conditions.split(",") if conditions else []:
        key, equals, value = (part.strip() for part in condition.partition("="))
        if not equals or key not in keys:
            raise SpecError(
                f"{where}: " + (unknown("axis", key, keys) if equals else f"write KEY=VALUE, not {condition}")
            )
        chosen[key] = value
    for key, value in chosen.items():
        there = list(dict.fromkeys(shown(cell.axes.get(key)) for cell in cells))
        cells = [cell for cell in cells if comparable(cell.axes.get(key)) == comparable(TRUTH.get(value, value))]
        if not cells:
            raise SpecError(f"{where}: no cell has {key}={value}; there are {', '.join(there)}")
    if not cells:
        raise SpecError(f"{where}: has no cell that is done")
    return cells, set(chosen)


def compare_cells(a: str, b: str, metrics: Sequence[Metric] = METRICS) -> Comparison:
    """Compare two selections; metrics that no pair has are left out. Raises SpecError."""
    sides = [select(a), select(b)]
    selected = sides[0][1] | sides[1][1]
    grouped = [_by_point(cells, selected) for cells, _ in sides]
    points = [point for point in grouped[0] if point in grouped[1]]
    if not points:
        raise SpecError(f"{a} and {b} have no point in common: " + " / ".join(_shown(group) for group in grouped))
    compared = [cell for group in grouped for point in points for cell in group[point].values()]
    findings = []
    for metric in metrics:
        blocks, pairs, equal = [], 0, 0
        for point in points:
            left, right = ({key: value for key, cell in group[point].items() if (value := metric.of(cell)) is not None}
                           for group in grouped)  # fmt: skip
            if left and right:
                blocks.append((list(left.values()), list(right.values())))
                common = left.keys() & right.keys()
                pairs += len(common)
                equal += sum(left[key] == right[key] for key in common)
        if blocks:
            repeated = any(len(side) > 1 for block in blocks for side in block)
            exact = metric.deterministic and not repeated and pairs > 0
            difference = untested(blocks) if exact else compare(blocks)
            findings.append(Finding(metric, pairs, equal, exact, difference))
    return Comparison(
        points=len(points),
        unmatched=sum(len(cells) for cells, _ in sides) - len(compared),
        disturbed=sum(cell.info.get("cpu_measured") == "shared" for cell in compared),
        findings=findings,
    )


def metric_of(text: str) -> Metric:
    """The metric of ``PATH``, ``mean:PATH`` or ``sum:PATH``. Raises SpecError."""
    over, colon, path = text.rpartition(":")
    known = next((metric for metric in METRICS if metric.path == text), None)
    if not colon:
        return known or Metric(text)
    if over == "sum":
        return Metric(path, "sum")
    if over == "mean":
        return Metric(path, "mean")
    raise SpecError(f"--metric {text}: " + unknown("summary of VMs", over, ("sum", "mean")))


TRUTH: dict[str, object] = {"true": True, "false": False}


def shown(value: object) -> str:
    """An axis value as a selection names it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


Point = tuple[tuple[str, str], ...]


def _by_point(cells: Sequence[Cell], selected: set[str]) -> dict[Point, dict[int, Cell]]:
    """Cells by point (all axes but the selected ones), then by seed; two of a kind would be a mixture.

    Where it is seeds that are compared, repetitions stand for them.
    """
    grouped: dict[Point, dict[int, Cell]] = {}
    for cell in cells:
        point = tuple(sorted((key, str(value)) for key, value in cell.axes.items() if key not in selected))
        there = grouped.setdefault(point, {})
        assert cell.summary is not None  # they are done
        seed = cell.repetition if "seed" in selected else int(cell.summary["run"]["seed"])
        if seed in there:
            free = sorted(key for key in cell.axes if key in selected)
            raise SpecError(f"several cells are equal but for {', '.join(free)}; select one value on both sides")
        there[seed] = cell
    return grouped


def _shown(group: Mapping[Point, Any]) -> str:
    point = next(iter(group))
    return " ".join(f"{key}={value}" for key, value in point) or "no axes"
