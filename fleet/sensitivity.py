"""Which costs of the host a result depends on: each is moved to both ends of its plausible range, alone.

One run at the spec's own costs, then two for every figure of the host profile whose range has a width. A curve is
stretched about its first factor, 1, until its last one lies at the end of the range. Interactions between costs are
left out: a result that two costs decide only together is not found.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from fleet import hosts, metric
from fleet.atomic import write_atomic
from fleet.cells import Summary, failure, run_cells
from fleet.errors import ProfileError, SpecError
from fleet.experiment import Experiment
from fleet.hosts import Figure, Profile
from fleet.names import unknown
from fleet.sweep.progress import Progress

DECIDES = 0.02
"""Share of the metric by which a cost must move it to count: the bound by which the emulator's own settings may."""


class Effect(Struct, frozen=True):
    """What one cost does to a metric.

    ``at_low`` and ``at_high`` are None where that run failed, or where the engine can't have a cost of that value.
    """

    cost: str
    unit: str
    low: float
    default: float
    high: float
    metric: str
    at_low: float | None
    at_default: float
    at_high: float | None
    grade: str
    source: str
    failed: bool
    """Whether the run at an end failed."""

    @property
    def swing(self) -> float:
        """Distance between the lowest and the highest value met, as a share of the default's; inf where that is 0."""
        met = [value for value in (self.at_low, self.at_default, self.at_high) if value is not None]
        width = max(met) - min(met)
        return width / abs(self.at_default) if self.at_default else math.inf if width else 0.0

    @property
    def decides(self) -> bool:
        """Whether the metric depends on it."""
        return self.swing > DECIDES or self.failed


def choose(profile: Profile, names: Sequence[str], grades: Sequence[str]) -> list[Figure]:
    """The figures to vary: of these names (all if none), of these grades (all if none), with a range.

    Raises SpecError for one that does not exist or has no range to vary.
    """
    for name in names:
        if name not in profile.figures:
            raise SpecError("--cost: " + unknown("cost", name, profile.figures))
        if not _varies(profile.figures[name]):
            raise SpecError(f"--cost: {name} is fixed at {profile.figures[name].value} {profile.figures[name].unit}")
    for grade in grades:
        if grade not in hosts.GRADES:
            raise SpecError("--grade: " + unknown("grade", grade, hosts.GRADES))
    return [
        figure
        for figure in profile.figures.values()
        if _varies(figure) and (not names or figure.key in names) and (not grades or figure.grade in grades)
    ]


def _varies(figure: Figure) -> bool:
    return figure.low < figure.high and not (isinstance(figure.value, tuple) and len(figure.value) == 1)


def moved(experiment: Experiment, figure: Figure, value: object, profile: Profile) -> Experiment:
    """The experiment with one cost at ``value`` (in the figure's unit; of a curve, its last factor).

    Raises ProfileError for a value that the engine can't work with.
    """
    if isinstance(figure.value, tuple):
        costs = _stretched(experiment, figure, Fraction(str(value)))
    else:
        costs = hosts.override(experiment.costs, figure.key, f"{value} {figure.unit}", profile)
    # What the spec says of this cost is no longer so; it would win when the experiment is read again.
    overrides = {key: given for key, given in experiment.host_overrides.items() if key != figure.key}
    return replace(experiment, costs=costs, host_overrides=overrides)


def _stretched(experiment: Experiment, figure: Figure, last: Fraction) -> Any:
    tier, field = figure.key.split(".")
    table = getattr(experiment.costs, tier)
    points = getattr(table, field)
    factor = (last - 1) / (Fraction(points[-1][1], 1000) - 1)
    curve = tuple((at, 1000 + round((y - 1000) * factor)) for at, y in points)
    changed = msgspec.structs.replace(table, **{field: curve})
    where = f"{figure.key} at {float(last):g}"
    return hosts.checked(msgspec.structs.replace(experiment.costs, **{tier: changed}), where)


def variants(experiment: Experiment, figures: Iterable[Figure], profile: Profile) -> dict[str, Experiment]:
    """The experiments to run: ``default``, and ``COST low`` and ``COST high`` for each figure that can take them."""
    cells = {"default": experiment}
    for figure in figures:
        for end, bound in (("low", figure.low), ("high", figure.high)):
            try:
                cells[f"{figure.key} {end}"] = moved(experiment, figure, bound, profile)
            except ProfileError:
                continue  # a geometry that no cache has is no plausible value
    return cells


def analyse(
    experiment: Experiment, figures: Sequence[Figure], profile: Profile, path: str, root: Path,
    *, jobs: int = 1, progress: Progress | None = None,
) -> list[Effect]:  # fmt: skip
    """Run it all; the effects, the largest swing first. Raises MetricError before the variants run."""
    cells = variants(experiment, figures, profile)
    base = run_cells({"default": experiment}, root)["default"]
    if base["outcome"] != "ok":
        raise SpecError("the run at the spec's own costs failed: " + failure(base))
    at_default = metric.value(base, path)
    summaries = run_cells(cells, root, jobs=jobs, progress=progress)
    effects = [_effect(figure, experiment, profile, path, at_default, summaries) for figure in figures]
    return sorted(effects, key=lambda one: (-one.swing, one.cost))


def _effect(
    figure: Figure, experiment: Experiment, profile: Profile, path: str, at_default: float,
    summaries: Mapping[str, Summary],
) -> Effect:  # fmt: skip
    """One cost's, from the runs named by `variants`."""
    there = {end: summaries[name] for end in ("low", "high") if (name := f"{figure.key} {end}") in summaries}
    met = {end: metric.value(summary, path) for end, summary in there.items() if summary["outcome"] == "ok"}
    return Effect(
        cost=figure.key,
        unit=figure.unit,
        low=float(figure.low),
        default=hosts.in_unit(experiment.costs, figure, profile),
        high=float(figure.high),
        metric=path,
        at_low=met.get("low"),
        at_default=at_default,
        at_high=met.get("high"),
        grade=figure.grade,
        source=figure.source,
        failed=len(met) < len(there),
    )


def write(effects: Sequence[Effect], directory: Path) -> Path:
    """``sensitivity.json``: the list of effects; its path."""
    path = directory / "sensitivity.json"
    write_atomic(path, json.dumps(msgspec.to_builtins(effects), indent=2) + "\n")
    return path
