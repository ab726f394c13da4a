"""The spec of a sweep: a TOML file with ``name``, ``[base]`` and ``[axes]``, resolved into cells or refused.

``[base]`` holds the keys of a run (a path in its place names a run's own spec), ``[axes]`` a list, range, comma list
or named set for any of them or of the parameters; an axis overrides the base as a flag does. Further keys: ``zip``
(lists of axes that advance together), ``where`` (expressions that a point must satisfy), ``repetitions`` (of each
point, with seeds that count up from the base's). Every cell is resolved before the first one starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fleet.errors import SpecError
from fleet.experiment import Experiment
from fleet.names import unknown
from fleet.spec import MAX_SEED, Registries, check_key, installed, resolve
from fleet.spec_file import flatten, read_toml
from fleet.spec_values import Given, integer
from fleet.sweep.axes import Axes, points, values_of
from fleet.sweep.where import holds

KEYS = ("name", "base", "axes", "zip", "where", "repetitions")
_MOST_REPETITIONS = 10_000


class Point(NamedTuple):
    """One cell to run: where it lies on the axes, and what it is."""

    axes: Mapping[str, object]
    """Values as given, by full key."""
    experiment: Experiment
    repetition: int = 0

    @property
    def hash(self) -> str:
        """Name of the cell: the digest of its experiment, cut to 16 hex digits (64 bits)."""
        return self.experiment.digest.removeprefix("sha256:")[:16]

    @property
    def label(self) -> str:
        """How a person tells it from the others: ``vms=3 policy=g-tpp``."""
        parts = [f"{key}={value}" for key, value in self.axes.items()]
        return " ".join(parts + ([f"repetition={self.repetition}"] if self.repetition else [])) or "the only cell"


@dataclass(frozen=True)
class Sweep:
    """A whole sweep, resolved."""

    name: str
    axes: Axes
    points: list[Point]
    text: str
    """The file as it was."""


def load_sweep(path: Path, registries: Registries | None = None) -> Sweep:
    """The sweep of a file. Raises SpecError or ProfileError, for any of its cells too."""
    data = read_toml(path)
    where = f"{path.name}: "
    for key in data:
        if key not in KEYS:
            raise SpecError(where + unknown("key of a sweep", key, KEYS) + " (keys of a run go into [base])")
    if "axes" not in data:
        raise SpecError(f"{where}has no [axes]; to run one experiment: fleet run {path}")
    registries = registries or installed()
    base, base_where, folder = _base(data.get("base", {}), path)
    axes = _axes(data["axes"], where, registries)
    filters = _texts(data.get("where", []), where + "where")
    crossed = points(axes, _lists(data.get("zip", []), where + "zip"), where)
    chosen = [point for point in crossed if all(holds(text, point, where + "where") for text in filters)]
    if not chosen:
        raise SpecError(f"{where}where: no point is left")
    repetitions = integer(Given(data.get("repetitions", 1), where + "repetitions", path.parent), 1, _MOST_REPETITIONS)
    if repetitions > 1 and "seed" in axes:
        raise SpecError(f"{where}repetitions: vary the seed, which is an axis too; take one of them out")
    cells = []
    for point in chosen:
        overrides = {key: Given(value, f"{where}axes: {key}", path.parent) for key, value in point.items()}
        try:
            first = resolve(base, base_where, folder, overrides, registries)
        except SpecError as error:
            shown = " ".join(f"{key}={value}" for key, value in point.items())
            raise SpecError(f"{error} (the cell {shown}; `where` can leave it out)") from None
        if first.seed + repetitions - 1 > MAX_SEED:
            raise SpecError(f"{where}repetitions: seeds count up from {first.seed}, and beyond {MAX_SEED}; start lower")
        cells += [Point(point, replace(first, seed=first.seed + number), number) for number in range(repetitions)]
    name = data.get("name", path.stem)
    if not isinstance(name, str) or not name or "/" in name or name in (".", ".."):
        raise SpecError(f"{where}name: must be usable as the name of a directory, not {name!r}")
    return Sweep(name, axes, cells, path.read_text("utf-8"))


def _base(given: object, path: Path) -> tuple[Mapping[str, Any], str, Path]:
    """The run that all cells start from, what errors call it, and where its file names start."""
    if isinstance(given, str):
        file = path.parent / given
        return read_toml(file), file.name, file.parent
    if not isinstance(given, dict):
        raise SpecError(f"{path.name}: base: must be a table with the keys of a run, or the path of a run's spec")
    return given, f"{path.name}: base", path.parent


def _axes(given: object, where: str, registries: Registries) -> Axes:
    if not isinstance(given, dict) or not given:
        raise SpecError(f'{where}axes: must be a table such as vms = "1..9"')
    axes: Axes = {}
    for key, value in given.items():
        entries = flatten(value) if key == "set" and isinstance(value, dict) else flatten({key: value})
        for full, raw in entries:
            check_key(full, f"{where}axes: ")
            if full == "name":
                raise SpecError(f"{where}axes: name: says nothing about a run; take it out")
            axes[full] = values_of(full, raw, f"{where}axes: {full}", registries)
    if "seconds" in axes and "transactions" in axes:
        raise SpecError(f"{where}axes: a run ends after seconds or after transactions; give one of them")
    return axes


def _lists(given: object, where: str) -> list[list[str]]:
    if not isinstance(given, list) or not all(
        isinstance(group, list) and group and all(isinstance(key, str) for key in group) for group in given
    ):
        raise SpecError(f'{where}: must be a list of lists of axes, such as [["vms", "memory"]]')
    return given


def _texts(given: object, where: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{where}: must be an expression or a list of them, such as [\"policy != 'none' or vms == 1\"]")
    return texts
