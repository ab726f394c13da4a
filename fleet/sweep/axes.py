"""The values of an axis, and the points that several axes make.

An axis is written as a list, a range (``"1..9"``, ``"1..9:2"``, ``"0.1..0.5:0.1"``), a comma list (``"1..3,6,9"``) or
a named set (``"all-policies"``, ``"guest"``, ``"host"``, ``"all-workloads"``, ``"all-hosts"``). Axes are crossed, the
last one fastest; those that `zip` ties together advance as one.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from fleet import hosts
from fleet.errors import SpecError
from fleet.names import unknown
from fleet.spec import Registries

Axes = dict[str, list[object]]
"""Values by full key, in the order in which the spec names them."""

MOST_VALUES = 100_000
"""Of an axis, and points of a sweep: more is a slip of the pen."""
_NUMBER = r"[+-]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::({_NUMBER}))?", re.ASCII)


def named_sets(key: str, registries: Registries) -> dict[str, list[str]]:
    """The named sets of an axis, by name."""
    if key == "policy":
        views = {view: [name for name, kind in registries.policies.items() if kind.view == view]
                 for view in ("guest", "host")}  # fmt: skip
        return {"all-policies": list(registries.policies), **views}
    if key == "workload":
        return {"all-workloads": list(registries.workloads)}
    return {"all-hosts": list(hosts.profile_names())} if key == "host" else {}


def values_of(key: str, given: object, where: str, registries: Registries) -> list[object]:
    """The values of one axis as given in TOML. Raises SpecError."""
    sets = named_sets(key, registries)
    items = given if isinstance(given, list) else given.split(",") if isinstance(given, str) else [given]
    values: list[object] = []
    for item in items:
        if isinstance(item, str):
            values += _expanded(item.strip(), sets, where, bare=isinstance(given, str))
        elif isinstance(item, bool | int | float):
            values.append(item)
        else:
            raise SpecError(f"{where}: a value must be text, a number or true/false, not {item!r}")
    if not values:
        raise SpecError(f"{where}: has no value; give a list, a range such as 1..9, or a comma list")
    if len(set(map(repr, values))) < len(values):
        written = list(map(repr, values))
        twice = next(value for number, value in enumerate(values) if written[number] in written[:number])
        raise SpecError(f"{where}: names {twice} twice")
    return values


def _expanded(text: str, sets: Mapping[str, list[str]], where: str, *, bare: bool) -> list[object]:
    """One item: a set, a range, or itself; ``bare``: it stood in a comma list, where numbers have no quotes."""
    if text in sets:
        return list(sets[text])
    if match := _RANGE.fullmatch(text):
        return _range(match, where)
    if not text:
        raise SpecError(f"{where}: an empty item between two commas")
    return [int(text) if bare and re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) else text]


def _range(match: re.Match[str], where: str) -> list[object]:
    low, high, step = Fraction(match[1]), Fraction(match[2]), Fraction(match[3] or 1)
    if step <= 0 or high < low:
        raise SpecError(f"{where}: {match[0]}: write LOW..HIGH or LOW..HIGH:STEP, upwards")
    count = int((high - low) / step) + 1
    if count > MOST_VALUES:
        raise SpecError(f"{where}: {match[0]} are {count} values; at most {MOST_VALUES}")
    numbers = [low + step * number for number in range(count)]
    return [int(number) if number.denominator == 1 else float(number) for number in numbers]


def points(axes: Axes, zipped: Sequence[Sequence[str]], where: str) -> list[dict[str, object]]:
    """Every combination, each as values by key in the order of the axes. Raises SpecError."""
    group_of: dict[str, tuple[str, ...]] = {key: (key,) for key in axes}
    tied: set[str] = set()
    for group in zipped:
        for key in group:
            if key not in axes:
                raise SpecError(f"{where}zip: " + unknown("axis", key, axes))
            if key in tied:
                raise SpecError(f"{where}zip: {key} is named twice")
            tied.add(key)
            group_of[key] = tuple(group)
        lengths = {key: len(axes[key]) for key in group}
        if len(set(lengths.values())) > 1:
            counted = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise SpecError(f"{where}zip: axes that advance together need equally many values; {counted}")
    groups = list(dict.fromkeys(group_of.values()))
    steps = [list(zip(*(axes[key] for key in group), strict=True)) for group in groups]
    total = 1
    for choices in steps:
        total *= len(choices)
    if total > MOST_VALUES:
        raise SpecError(f"{where}axes: make {total} cells; at most {MOST_VALUES}")
    made = []
    for chosen in itertools.product(*steps):
        point = {key: value for group, values in zip(groups, chosen, strict=True)
                 for key, value in zip(group, values, strict=True)}  # fmt: skip
        made.append({key: point[key] for key in axes})
    return made
