"""Where the values of a spec come from: file, groups, flags and settings, each a layer, one over the other."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.errors import SpecError
from fleet.names import unknown
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


def read(path: Path) -> tuple[Layer, list[Layer], Given | None]:
    """Top level, groups and resolved costs of a spec file."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        near = [entry.name for entry in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise SpecError(f"{path}: " + unknown("spec file", path.name, near)) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None
    costs = data.pop("costs", None)
    tables = data.pop("group", [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SpecError(f"{path.name}: group: write each group of VMs as a [[group]] table")
    top = _layer(data, f"{path.name}: ", path.parent, (*RUN_KEYS, *GROUP_KEYS), SPACES)
    groups = []
    for number, table in enumerate(tables, 1):
        where = f"{path.name}: group {number}: "
        for key in table:
            if key in RUN_KEYS:
                raise SpecError(f"{where}{key}: belongs to the whole run; put it above the first [[group]]")
        groups.append(_layer(table, where, path.parent, GROUP_KEYS, _GROUP_SPACES))
    return top, groups, None if costs is None else Given(costs, f"{path.name}: costs", path.parent)


def _layer(table: dict[str, Any], where: str, base: Path, keys: Sequence[str], spaces: Sequence[str]) -> Layer:
    layer: Layer = {}
    for key, value in table.items():
        if key == "set":
            if not isinstance(value, dict):
                raise SpecError(f"{where}set: must be a table, e.g. set.workload.layout = ...")
            for name, raw in _flatten(value):
                full = name if name in STAGE_KEYS else _setting(name, where + "set: ", spaces)
                layer[full] = Given(raw, f"{where}set.{name}", base)
        elif key not in keys:
            raise SpecError(where + unknown("key", key, (*keys, "set", "group")))
        else:
            layer[key] = Given(value, where + key, base)
    return _one_end(layer)


def _flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """``{"policy": {"a": 1}}`` and ``{"policy.a": 1}`` alike."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flag_layer(flags: Mapping[str, object]) -> Layer:
    given = {key: value for key, value in flags.items() if value is not None}
    return _one_end({key: Given(value, "--" + key.replace("_", "-"), Path()) for key, value in given.items()})


def setting_layer(settings: Sequence[str]) -> Layer:
    layer: Layer = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise SpecError(f"--set {setting}: write key=value, e.g. --set workload.layout=scattered")
        name = key.strip() if key.strip() in STAGE_KEYS else _setting(key.strip(), "--set ", SPACES)
        layer[name] = Given(value.strip(), f"--set {key.strip()}", Path())
    return layer


def _setting(name: str, where: str, spaces: Sequence[str]) -> str:
    space, dot, key = name.partition(".")
    if space not in spaces:
        if space in SPACES:
            raise SpecError(f"{where}{name}: belongs to the whole run; put it above the first [[group]]")
        raise SpecError(where + unknown("set of parameters", space, spaces) + f" (write {spaces[0]}.KEY)")
    if not dot or not key:
        raise SpecError(f"{where}{name}: name a parameter, {space}.KEY")
    return name


def _one_end(layer: Layer) -> Layer:
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
