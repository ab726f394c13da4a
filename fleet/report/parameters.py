"""Every parameter of a run or sweep and where it comes from: value, unit, default, range, grade, meaning, source.

Values are those of ``spec.toml``; meaning, unit, default and source are the declarations' of policies, workloads,
guest, host and engine, and for costs the host profile's. What a profile or policy no longer has is said to be so.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fleet import hosts
from fleet.errors import OutputError, ProfileError, SpecError
from fleet.report.table import Column, Table
from fleet.spec import DEFAULTS, Kind, Registries, installed
from fleet.spec_layers import GROUP_KEYS, RUN_KEYS, STAGE_KEYS
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS
from fleet.spec_values import Given, exact_size, exact_time, parameter
from fleet.sweep.store import Cell
from guestd.params import Param
from proto.costs import Costs

_CHOSEN = "chosen for this run"
_GONE = "not declared by this version"
_MOST_LISTED = 6

_MEANINGS = {
    "seed": "seed of all randomness",
    "clock": "what time is counted by",
    "host": "host profile that the costs come from",
    "scale": "factor on memory, caches and transactions",
    "sample": "interval of the time series",
    "heat": "record page heat by gVA, gPA and hPA",
    "hang_timeout": "wall time without progress after which a VM is lost",
    "vms": "number of VMs",
    "policy": "tiering policy",
    "tracker": "how the policy learns of accesses, instead of its own way",
    "classifier": "how it tells hot from cold, instead of its own way",
    "migrator": "how it moves pages, instead of its own way",
    "workload": "what runs in the VM",
    "vcpus": "vCPUs of each VM",
    "memory": "memory of each VM before scale",
    "fast_ratio": "share of it that is fast",
    "seconds": "virtual time of the run phase",
    "transactions": "length of the run phase in accesses, before scale",
    "start": "virtual time at which the VM starts",
}
_UNITS = {"vms": "VMs", "vcpus": "vCPUs", "transactions": "accesses"}


class Parameter(NamedTuple):
    """A row of the table."""

    parameter: str
    of: str
    value: str | None
    unit: str | None = None
    set: bool | str | None = None
    """Whether the value is another than the default."""
    default: str | None = None
    range: str | None = None
    grade: str | None = None
    meaning: str | None = None
    source: str | None = None


def parameters_table(cells: Sequence[Cell]) -> Table:
    """A row per parameter and kind of VM; where cells differ, the values of all. Raises OutputError."""
    registries = installed()
    profiles: dict[str, hosts.Profile | None] = {}
    merged: dict[tuple[str, str], list[Parameter]] = {}
    for cell in cells:
        path = cell.path / "spec.toml"
        if not path.is_file():
            continue
        try:
            spec = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be read: {error}") from None
        for row in _rows(spec, registries, profiles):
            seen = merged.setdefault((row.parameter, row.of), [])
            if row not in seen:
                seen.append(row)
    rows = tuple(tuple(_merge(rows)) for rows in merged.values())
    note = (
        "set: whether the value differs from the default, of the declaration or of the host profile. Grade of a cost: "
        "read in its source, recalled from the literature, measured, or estimated; unpublished costs are estimated."
    )
    columns = tuple(map(Column, Parameter._fields))
    return Table("parameters", "Parameters and where they come from", columns, rows, note)


def _merge(rows: list[Parameter]) -> Parameter:
    """One row of those of all cells: values that differ stand beside each other."""
    if len(rows) == 1:
        return rows[0]
    values = [f"{row.value}{f' {row.unit}' if row.unit != rows[0].unit else ''}" for row in rows]
    more = f", ... ({len(values)} values)" if len(values) > _MOST_LISTED else ""
    return rows[0]._replace(value=", ".join(values[:_MOST_LISTED]) + more, set="varies")


def _rows(
    spec: Mapping[str, Any], registries: Registries, profiles: dict[str, hosts.Profile | None]
) -> Iterator[Parameter]:
    settings = spec.get("set", {})
    for key in RUN_KEYS:
        if key in spec and key != "name":
            yield _own(key, "run", spec[key])
    groups = spec.get("group", [{}])
    for number, group in enumerate(groups, 1):
        # What a sweep varies is one row for all its cells, so a single group is not named after its policy.
        of = "VMs" if len(groups) == 1 else f"group {number}: {group.get('policy')} {group.get('workload')}"
        yield from (_own(key, of, group[key]) for key in GROUP_KEYS if key in group)
        own = group.get("set", {})
        policy, workload = str(group.get("policy")), str(group.get("workload"))
        suffix = "" if len(groups) == 1 else f" (group {number})"
        yield from _declared(own, "policy", f"policy {policy}{suffix}", _policy_params(registries, group))
        yield from _declared(own, "workload", f"workload {workload}{suffix}", _params(registries.workloads, workload))
        yield from _declared(own, "guest", f"guest kernel{suffix}", GUEST_PARAMS)
    # The space `host` holds costs too: they have rows of their own.
    host = {f"host.{param.name}" for param in HOST_PARAMS}
    yield from _declared({k: v for k, v in settings.items() if k in host}, "host", "host kernel", HOST_PARAMS)
    yield from _declared(settings, "engine", "engine", ENGINE_PARAMS)
    if "costs" in spec:
        name = str(spec.get("host"))
        if name not in profiles:
            profiles[name] = _profile(name)
        yield from _costs(spec["costs"], profiles[name], name)


def _policy_params(registries: Registries, group: Mapping[str, Any]) -> tuple[Param, ...]:
    """Those of the group's policy, with the stages that the group gives it."""
    from guestd.tiering.stage import StageError

    policy = str(group.get("policy"))
    stages = {key: str(group[key]) for key in STAGE_KEYS if group.get(key)}
    if not stages or policy not in registries.policies or registries.policy_of is None:
        return _params(registries.policies, policy)
    try:
        return registries.policy_of(policy, stages).params
    except StageError:
        return ()  # a stage that is not here any more


def _params(registry: Mapping[str, Kind], name: str) -> tuple[Param, ...]:
    return registry[name].params if name in registry else ()


def _own(key: str, of: str, value: object) -> Parameter:
    """A key of the run or of a group of VMs."""
    default = DEFAULTS.get(key)
    changed = default is None or _normal(value) != _normal(default)
    source = _CHOSEN if changed else "the default"
    shown = None if default is None else str(default)
    return Parameter(key, of, str(value), _UNITS.get(key), changed, shown, meaning=_MEANINGS.get(key), source=source)


def _normal(value: object) -> str:
    """``1/5`` and ``0.2`` are one value, and so are ``10s`` and ``10``."""
    try:
        return str(Fraction(str(value).removesuffix("s")))
    except (ValueError, ZeroDivisionError):
        return str(value)


def _declared(settings: Mapping[str, object], space: str, of: str, params: Sequence[Param]) -> Iterator[Parameter]:
    """Rows of one space, by the declarations."""
    known = {f"{space}.{param.name}": param for param in params}
    for key, raw in settings.items():
        if not key.startswith(f"{space}."):
            continue
        if key not in known:
            yield Parameter(key, of, str(raw), source=_GONE)
            continue
        param = known[key]
        try:
            value: object = parameter(param, Given(raw, key, Path()))
        except SpecError:
            value = raw  # a later version narrowed what is allowed, or a file has moved
        yield Parameter(
            key, of, _text(value), param.unit or None, value != param.default, _text(param.default), _limits(param),
            meaning=param.help, source=param.source,
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


def _profile(name: str) -> hosts.Profile | None:
    """The profile of that name; a run with a profile of the user's own has only its file's name."""
    try:
        return hosts.load_profile(name)
    except ProfileError:
        return None


def _costs(table: object, profile: hosts.Profile | None, name: str) -> Iterator[Parameter]:
    """A row per figure of the host profile."""
    of = f"host {name}"
    try:
        resolved = msgspec.convert(table, Costs)
    except msgspec.ValidationError:
        yield Parameter("costs", of, None, source=_GONE)
        return
    default = None if profile is None else hosts.costs(profile)
    for key in hosts.figure_keys():
        if profile is None or default is None:
            yield Parameter(f"host.{key}", of, _exact(resolved, key), source=f"a profile {name!r} that is not here")
            continue
        figure = profile.figures[key]
        same = hosts.exact(resolved, key) == hosts.exact(default, key)
        value, unit = (_plain(figure.value), figure.unit) if same else (_exact(resolved, key), None)
        yield Parameter(
            f"host.{key}", of, value, unit, not same, f"{_plain(figure.value)} {figure.unit}",
            f"{figure.low} to {figure.high} {figure.unit}", figure.grade if same else None,
            source=figure.source if same else f"{_CHOSEN}; the default is {figure.grade}: {figure.source}",
        )  # fmt: skip


def _plain(value: object) -> str:
    return ", ".join(f"{x}: {y}" for x, y in value) if isinstance(value, tuple) else str(value)


def _exact(costs: Costs, key: str) -> str:
    """A cost with its unit: ``900ns``."""
    text = hosts.exact(costs, key)
    number, _, unit = text.rpartition(" ")
    if unit == "ps":
        return exact_time(int(number))
    return exact_size(int(number)) if unit == "B" else text
