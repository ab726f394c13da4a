"""Where the values of a spec come from: file, groups, flags and settings, each a layer, one over the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.errors import SpecError
from fleet.names import unknown
from fleet.spec_file import flatten
from fleet.spec_values import Given

RUN_KEYS = ("name", "seed", "clock", "host", "scale", "sample", "heat", "hang_timeout")
STAGE_KEYS = ("tracker", "classifier", "migrator")
GROUP_KEYS = (
    "vms",
    "policy",
    *STAGE_KEYS,
    "workload",
    "vcpus",
    "memory",
    "fast_ratio",
    "seconds",
    "transactions",
    "start",
)
_UNTIL = ("seconds", "transactions")
_GROUP_SPACES = ("policy", "workload", "guest")
_RUN_SPACES = ("engine", "host")
SPACES = (*_GROUP_SPACES, *_RUN_SPACES)
Layer = dict[str, Given]
"""Values of one origin by key; settings under their full name, such as ``policy.scan_period``."""


def layers(data: Mapping[str, Any], name: str, folder: Path) -> tuple[Layer, list[Layer], Given | None]:
    """Top level, groups and resolved costs of a spec's content."""
    shared = {key: value for key, value in data.items() if key not in ("costs", "group")}
    tables = data.get("group", [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SpecError(f"{name}: group: write each group of VMs as a [[group]] table")
    top = _layer(shared, f"{name}: ", folder, (*RUN_KEYS, *GROUP_KEYS), SPACES)
    groups = []
    for number, table in enumerate(tables, 1):
        where = f"{name}: group {number}: "
        for key in table:
            if key in RUN_KEYS:
                raise SpecError(f"{where}{key}: belongs to the whole run; put it above the first [[group]]")
        groups.append(_layer(table, where, folder, GROUP_KEYS, _GROUP_SPACES))
    return top, groups, Given(data["costs"], f"{name}: costs", folder) if "costs" in data else None


def _layer(table: dict[str, Any], where: str, base: Path, keys: Sequence[str], spaces: Sequence[str]) -> Layer:
    layer: Layer = {}
    for key, value in table.items():
        if key == "set":
            if not isinstance(value, dict):
                raise SpecError(f"{where}set: must be a table, e.g. set.workload.layout = ...")
            for name, raw in flatten(value):
                full = name if name in STAGE_KEYS else setting_name(name, where + "set: ", spaces)
                layer[full] = Given(raw, f"{where}set.{name}", base)
        elif key not in keys:
            raise SpecError(where + unknown("key", key, (*keys, "set", "group")))
        else:
            layer[key] = Given(value, where + key, base)
    return one_end(layer)


def flag_layer(flags: Mapping[str, object]) -> Layer:
    given = {key: value for key, value in flags.items() if value is not None}
    return one_end({key: Given(value, "--" + key.replace("_", "-"), Path()) for key, value in given.items()})


def setting_layer(settings: Sequence[str]) -> Layer:
    layer: Layer = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise SpecError(f"--set {setting}: write key=value, e.g. --set workload.layout=scattered")
        name = key.strip() if key.strip() in STAGE_KEYS else setting_name(key.strip(), "--set ", SPACES)
        layer[name] = Given(value.strip(), f"--set {key.strip()}", Path())
    return layer


def setting_name(name: str, where: str, spaces: Sequence[str]) -> str:
    space, dot, key = name.partition(".")
    if space not in spaces:
        if space in SPACES:
            raise SpecError(f"{where}{name}: belongs to the whole run; put it above the first [[group]]")
        raise SpecError(where + unknown("set of parameters", space, spaces) + f" (write {spaces[0]}.KEY)")
    if not dot or not key:
        raise SpecError(f"{where}{name}: name a parameter, {space}.KEY")
    return name


def one_end(layer: Layer) -> Layer:
    if all(key in layer for key in _UNTIL):
        raise layer["transactions"].refuse("a run ends after seconds or after transactions; give one of them")
    return layer


def overlay(*layers: Layer) -> Layer:
    """Later layers over earlier ones; seconds and transactions displace each other."""
    merged: Layer = {}
    for layer in layers:
        if any(key in layer for key in _UNTIL):
            for key in _UNTIL:
                merged.pop(key, None)
        merged |= layer
    return merged


def space_of(key: str) -> str:
    """``policy`` of ``policy.scan_period``; empty for a plain key."""
    return key.partition(".")[0] if "." in key else ""
