"""Every parameter of a run or sweep and where it comes from: value, unit, default, range, grade, meaning, source.

Values are those of ``spec.toml``; meaning, unit, default and source are the declarations' of policies, workloads,
guest, host and engine, and for costs the host profile's. What a profile or policy no longer has is said to be so.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleet import hosts
from fleet.errors import FleetError, OutputError, ProfileError, SpecError
from fleet.report.cells import Cell
from fleet.report.table import Column, Table, Value
from fleet.spec import DEFAULTS, Kind, Registries, installed
from fleet.spec_layers import GROUP_KEYS, RUN_KEYS
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS
from fleet.spec_values import Given, exact_size, exact_time, parameter
from guestd.params import Param
from proto.costs import Costs

_COLUMNS = (
    Column("parameter"), Column("of"), Column("value"), Column("unit"), Column("set"), Column("default"),
    Column("range"), Column("grade"), Column("meaning"), Column("source"),
)  # fmt: skip
_GONE = "not declared by this version"
_MOST_LISTED = 6

Row = tuple[Value, ...]
Key = tuple[str, str]


def parameters_table(cells: Sequence[Cell]) -> Table:
    """A row per parameter and kind of VM; where cells differ, the values of all. Raises OutputError."""
    registries = installed()
    profiles: dict[str, hosts.Profile | None] = {}
    merged: dict[Key, list[Row]] = {}
    for cell in cells:
        path = cell.path / "spec.toml"
        if not path.is_file():
            continue
        try:
            spec = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be read: {error}") from None
        for row in _rows(spec, registries, profiles):
            seen = merged.setdefault((str(row[0]), str(row[1])), [])
            if row not in seen:
                seen.append(row)
    rows = tuple(_merge(rows) for rows in merged.values())
    note = (
        "set: whether the value differs from the default, of the declaration or of the host profile. Grade of a cost: "
        "read in its source, recalled from the literature, measured, or estimated; unpublished costs are estimated."
    )
    return Table("parameters", "Parameters and where they come from", _COLUMNS, rows, note)


def _merge(rows: list[Row]) -> Row:
    """One row of those of all cells: values that differ stand beside each other."""
    if len(rows) == 1:
        return rows[0]
    texts = [str(row[2]) for row in rows]
    more = f", ... ({len(texts)} values)" if len(texts) > _MOST_LISTED else ""
    first = rows[0]
    return (*first[:2], ", ".join(texts[:_MOST_LISTED]) + more, first[3], "varies", *first[5:])


def _rows(spec: Mapping[str, Any], registries: Registries, profiles: dict[str, hosts.Profile | None]) -> Iterator[Row]:
    settings = spec.get("set", {})
    for key in RUN_KEYS:
        if key in spec and key != "name":
            yield _plain_row(key, "run", spec[key])
    groups = spec.get("group", [{}])
    for number, group in enumerate(groups):
        of = f"{group.get('policy')} {group.get('workload')}" + (f" (group {number + 1})" if len(groups) > 1 else "")
        for key in GROUP_KEYS:
            if key in group:
                # A sweep varies these: one row for all its cells.
                yield _plain_row(key, "VMs" if len(groups) == 1 else of, group[key])
        own = group.get("set", {})
        policy, workload = str(group.get("policy")), str(group.get("workload"))
        yield from _declared(own, "policy", f"policy {policy}", _params(registries.policies, policy))
        yield from _declared(own, "workload", f"workload {workload}", _params(registries.workloads, workload))
        yield from _declared(own, "guest", "guest kernel" if len(groups) == 1 else of, GUEST_PARAMS)
    yield from _declared(settings, "host", "host kernel", HOST_PARAMS, only=True)
    yield from _declared(settings, "engine", "engine", ENGINE_PARAMS)
    if "costs" in spec:
        name = str(spec.get("host"))
        if name not in profiles:
            try:
                profiles[name] = hosts.load_profile(name)
            except ProfileError:
                profiles[name] = None
        yield from _costs(spec["costs"], profiles[name], name)


def _params(registry: Mapping[str, Kind], name: str) -> tuple[Param, ...]:
    return registry[name].params if name in registry else ()


def _plain_row(key: str, of: str, value: object) -> Row:
    default = DEFAULTS.get(key)
    shown = str(value)
    changed = default is not None and _normal(value) != _normal(default)
    meaning = "see fleet run --help"
    return (key, of, shown, None, changed, None if default is None else str(default), None, None, meaning, "the spec")


def _normal(value: object) -> str:
    """``1/5`` and ``0.2`` are one value, and so are ``10s`` and ``10``."""
    from fractions import Fraction

    text = str(value).removesuffix("s")
    try:
        return str(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return str(value)


def _declared(
    settings: Mapping[str, object], space: str, of: str, params: Sequence[Param], only: bool = False
) -> Iterator[Row]:
    """Rows of one space; ``only``: others of its keys are costs and have rows of their own."""
    known = {param.name: param for param in params}
    for key, raw in settings.items():
        if not key.startswith(f"{space}."):
            continue
        param = known.get(key.removeprefix(f"{space}."))
        if param is None:
            if not only:
                yield (key, of, str(raw), None, None, None, None, None, _GONE, _GONE)
            continue
        try:
            value: object = parameter(param, Given(raw, key, Path()))
        except SpecError:
            value = raw
        yield (
            key, of, _text(value), param.unit or None, value != param.default, _text(param.default), _limits(param),
            None, param.help, param.source,
        )  # fmt: skip


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(param: Param) -> str | None:
    if param.choices:
        return ", ".join(param.choices)
    if param.minimum is None and param.maximum is None:
        return None
    low = "" if param.minimum is None else f"{param.minimum:g}"
    return f"{low} to {'' if param.maximum is None else f'{param.maximum:g}'}".strip()


def _costs(table: object, profile: hosts.Profile | None, name: str) -> Iterator[Row]:
    """A row per figure of the host profile."""
    of = f"host {name}"
    try:
        resolved = msgspec.convert(table, Costs)
    except msgspec.ValidationError:
        yield ("costs", of, None, None, None, None, None, None, _GONE, _GONE)
        return
    default = None if profile is None else hosts.costs(profile)
    for key in hosts.figure_keys():
        value = _cost(resolved, key)
        if profile is None or default is None:
            yield (
                f"host.{key}",
                of,
                _exact(key, value),
                None,
                None,
                None,
                None,
                None,
                None,
                f"profile {name} is not here",
            )
            continue
        figure = profile.figures[key]
        same = value == _cost(default, key)
        text = _curve(figure.value)
        yield (
            f"host.{key}", of, text if same else _exact(key, value), figure.unit if same else None, not same,
            f"{text} {figure.unit}", f"{figure.low} to {figure.high} {figure.unit}", figure.grade, None, figure.source,
        )  # fmt: skip


def _cost(costs: Costs, key: str) -> Any:
    tier, _, field = key.rpartition(".")
    owner = getattr(costs, tier) if tier else costs
    return getattr(owner, f"{field}_ps" if hasattr(owner, f"{field}_ps") else field)


def _curve(value: object) -> str:
    return ", ".join(f"{x}: {y}" for x, y in value) if isinstance(value, tuple) else str(value)


def _exact(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return _curve(value) + " (thousandths)"
    try:
        return (
            exact_time(value)
            if key.rpartition(".")[2] in _TIMES
            else exact_size(value)
            if key.endswith("_bytes")
            else str(value)
        )
    except FleetError:
        return str(value)


_TIMES = frozenset(key.rpartition(".")[2] for key in hosts.figure_keys()) & frozenset(
    field.removesuffix("_ps")
    for form in (Costs, *(type_ for type_ in (Costs.__annotations__["fast"],)))
    for field in form.__struct_fields__
    if field.endswith("_ps")
)
"""Figures that are times."""
