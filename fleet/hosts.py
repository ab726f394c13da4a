"""Host profiles: what the hardware and kernels of one host cost, figure by figure, each with its evidence.

A profile is a TOML file (fleet/profiles, or the user's own) with one table per figure: value, unit, plausible range,
source and grade. It may extend another profile and then names only what differs; a tier that it names is replaced
whole. The set of figures must match `proto.costs.Costs` exactly, so that no cost has a hidden default. What a figure
means is said at its field there.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fleet.errors import ProfileError
from fleet.names import nearest, unknown
from proto.costs import MOST_WAYS, WALK_WAYS, Costs, TierCosts

GRADES = ("read", "recalled", "measured", "estimated")
"""read: in the source's own text; recalled: from the literature, not re-read; measured: on some machine by us."""
DEFAULT_PROFILE = "xeon-8360y-optane"

_TIERS = ("fast", "slow")
_FIGURE_KEYS = frozenset(("value", "unit", "range", "source", "grade"))
_TIME = {"ps": 1, "ns": 10**3, "us": 10**6, "ms": 10**9}
_BANDWIDTH = {"B/s": 1, "MB/s": 10**6, "GB/s": 10**9, "MiB/s": 1 << 20, "GiB/s": 1 << 30}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_COUNT = {"entries": 1, "ways": 1, "loads": 1}
_DIGITS = 18
_MOST = 1 << 53
"""Bound of every resolved cost: sums of a great many of them still fit an int64."""
_GRANULES = (64, 128, 256, 512)
_CURVES = ("curve", "write_curve")
_TLBS = ("l1_dtlb_4k", "l1_dtlb_2m", "stlb")
_QUANTITY = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z/]{0,20})\s*")

Number = int | Decimal
Curve = tuple[tuple[Number, Number], ...]


class Figure(NamedTuple):
    """One figure of a profile, as its file gives it."""

    key: str
    """``invept`` or ``slow.latency_random``: a field of Costs, a tier's with the tier before it."""
    value: Number | Curve
    unit: str
    low: Number
    high: Number
    source: str
    grade: str


class Profile(NamedTuple):
    """A loaded and checked profile."""

    name: str
    summary: str
    clock_mhz: Fraction
    tier_names: dict[str, str]
    figures: dict[str, Figure]
    """By key, in the order of the fields of Costs."""


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str, base: Path | None = None) -> Profile:
    """The profile of that name, or of a TOML file (relative to ``base``). Raises ProfileError."""
    path = _locate(name, base)
    merged = _merge(path, ())
    return _check(merged, _label(path))


def figure_keys() -> tuple[str, ...]:
    """Every figure that a profile must give, in order."""
    return tuple(_fields())


def costs(profile: Profile) -> Costs:
    """The profile's figures in the contract's units. Raises ProfileError for a geometry that no TLB has."""
    plain: dict[str, Any] = {tier: {"name": profile.tier_names[tier]} for tier in _TIERS}
    for key, figure in profile.figures.items():
        tier, field = _fields()[key]
        (plain[tier] if tier else plain)[field] = _resolve(figure, profile.clock_mhz)
    return checked(msgspec.convert(plain, Costs), f"host profile {profile.name!r}")


def override(base: Costs, key: str, text: str, profile: Profile | None) -> Costs:
    """``base`` with one figure replaced: key ``invept`` or ``slow.latency_random``, text ``600ns``.

    Without a ``profile`` the text must carry its unit, and cycles mean nothing. Raises ProfileError.
    """
    where = f"host.{key}={text}"
    if key not in _fields():
        raise ProfileError(f"host.{key}: " + unknown("cost", key, _fields()))
    tier, field = _fields()[key]
    if field in _CURVES:
        raise ProfileError(where + ": a curve is not set by itself; put it into a profile file of your own")
    value = _parse(key, text, profile)
    if not tier:
        return checked(msgspec.structs.replace(base, **{field: value}), where)
    changed = msgspec.structs.replace(getattr(base, tier), **{field: value})
    return checked(msgspec.structs.replace(base, **{tier: changed}), where)


def exact(resolved: Costs, key: str) -> str:
    """One figure as text that `override` reads back without a profile: ``600000 ps``."""
    tier, field = _fields()[key]
    return f"{getattr(getattr(resolved, tier) if tier else resolved, field)} {next(iter(_units(key)))}"


def in_unit(resolved: Costs, figure: Figure, profile: Profile) -> float:
    """A figure as ``resolved`` has it, in the unit in which the profile gives it; of a curve, its last factor."""
    tier, field = _fields()[figure.key]
    value = getattr(getattr(resolved, tier) if tier else resolved, field)
    if field in _CURVES:
        return value[-1][1] / 1000
    factor = Fraction(10**6) / profile.clock_mhz if figure.unit == "cycles" else _units(figure.key)[figure.unit]
    return round(float(value / Fraction(factor)), 6)


def checked(resolved: Costs, where: str) -> Costs:
    """``resolved`` itself, if the engine can work with it. Raises ProfileError that begins with ``where``."""
    for key, (tier, field) in _fields().items():
        value = getattr(getattr(resolved, tier) if tier else resolved, field)
        if field in _CURVES:
            if field == "curve" and not _rises(value, 1000):
                raise ProfileError(f"{where}: {key} must start at (0, 1000) and rise")
            if field == "write_curve" and not _falls(value, 1000):
                raise ProfileError(f"{where}: {key} must start at a factor of 1000 and fall while threads rise")
            continue
        least = 0 if field.endswith("_ps") else 1
        if not least <= value <= _MOST:
            raise ProfileError(f"{where}: {key} must be between {least} and {_MOST} {next(iter(_units(key)))}")
    _check_caches(resolved, where)
    for tier in _TIERS:
        granule = getattr(resolved, tier).granule_bytes
        if granule not in _GRANULES:
            raise ProfileError(f"{where}: {tier}.granule_bytes {granule} must be one of {_GRANULES}")
    return resolved


def _check_caches(resolved: Costs, where: str) -> None:
    """Every set index is a mask, and a set's ways are bits of one word."""
    for name in _TLBS:
        entries, ways = getattr(resolved, f"{name}_entries"), getattr(resolved, f"{name}_ways")
        sets, rest = divmod(entries, ways)
        if rest or not _power_of_two(sets):
            raise ProfileError(
                f"{where}: {name}_entries {entries} over {name}_ways {ways} must give a power of two of sets"
            )
        if ways > MOST_WAYS:
            raise ProfileError(f"{where}: {name}_ways {ways} must be at most {MOST_WAYS}")
    if resolved.stlb_2m_ways > resolved.stlb_ways:
        raise ProfileError(
            f"{where}: stlb_2m_ways {resolved.stlb_2m_ways} must be at most stlb_ways, {resolved.stlb_ways}"
        )
    for key in _fields():
        if key.endswith("_cache_entries") or key == "nested_tlb_entries":
            sets, rest = divmod(getattr(resolved, key), WALK_WAYS)
            if rest or not _power_of_two(sets):
                raise ProfileError(f"{where}: {key} must be {WALK_WAYS} times a power of two")


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def digest(profile: Profile) -> str:
    """SHA-256 over the profile's figures with their evidence, as ``sha256:...``."""
    return "sha256:" + hashlib.sha256(json.dumps(describe(profile)).encode()).hexdigest()


def describe(profile: Profile) -> dict[str, Any]:
    """The profile as plain data for JSON: every figure with value, unit, range, source and grade."""
    return {
        "name": profile.name,
        "summary": profile.summary,
        "clock_mhz": float(profile.clock_mhz),
        "tiers": dict(profile.tier_names),
        "figures": {
            figure.key: {
                "value": _plain(figure.value),
                "unit": figure.unit,
                "range": [_plain(figure.low), _plain(figure.high)],
                "source": figure.source,
                "grade": figure.grade,
            }
            for figure in profile.figures.values()
        },
    }


def _folder() -> Traversable:
    return resources.files("fleet") / "profiles"


@cache
def _fields() -> dict[str, tuple[str, str]]:
    """Figure key -> (tier or "", field name), from the contract itself."""
    keys = {
        f"{tier}.{field.removesuffix('_ps')}": (tier, field)
        for tier in _TIERS
        for field in TierCosts.__struct_fields__
        if field != "name"
    }
    return keys | {field.removesuffix("_ps"): ("", field) for field in Costs.__struct_fields__ if field not in _TIERS}


def _units(key: str) -> dict[str, int]:
    """Units that a figure may have, by what it is."""
    field = _fields()[key][1]
    if field in _CURVES:
        return {"factor": 1000}
    if field.endswith("_ps"):
        return _TIME
    if field.endswith("_bandwidth"):
        return _BANDWIDTH
    return _BYTES if field.endswith("_bytes") else _COUNT


def _label(path: Traversable) -> str:
    return path.name.removesuffix(".toml")


def _locate(name: str, base: Path | None) -> Traversable:
    if name.endswith(".toml") or "/" in name:
        path = (base or Path()) / name
        if not path.is_file():
            raise ProfileError(f"host profile {name!r}: no such file {path}")
        return path
    if name not in profile_names():
        raise ProfileError(
            unknown("host profile", name, profile_names()) + "; your own profile is named by its file, ending in .toml"
        )
    return _folder() / f"{name}.toml"


def _merge(path: Traversable, chain: tuple[str, ...]) -> dict[str, Any]:
    """The file's tables over those of the profile that it extends."""
    where = _label(path)
    if where in chain:
        raise ProfileError(f"host profile {where!r}: extends itself through {' -> '.join((*chain, where))}")
    try:
        own = tomllib.loads(path.read_text("utf-8"), parse_float=Decimal)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"host profile {where!r}: not valid TOML: {error}") from error
    except OSError as error:
        raise ProfileError(f"host profile {where!r}: cannot be read: {error.strerror}") from error
    known = ("summary", "extends", "clock_ghz", "costs", *_TIERS)
    for key in own:
        if key not in known:
            raise ProfileError(f"host profile {where!r}: " + unknown("entry", key, known))
    for table in ("costs", *_TIERS):
        if not isinstance(own.get(table, {}), dict):
            raise ProfileError(f"host profile {where!r}: {table!r} must be a table")
    parent = own.pop("extends", None)
    if parent is None:
        return own
    base = _merge(_locate(str(parent), path.parent if isinstance(path, Path) else None), (*chain, where))
    for tier in _TIERS:
        if "name" not in own.get(tier, {}):
            own[tier] = base.get(tier, {}) | own.get(tier, {})
    own["costs"] = base.get("costs", {}) | own.get("costs", {})
    return base | own


def _check(data: dict[str, Any], name: str) -> Profile:
    where = f"host profile {name!r}: "
    clock: Any = data.get("clock_ghz", 0)
    if not _is_number(clock) or clock <= 0:
        raise ProfileError(where + "clock_ghz must be a positive number, e.g. clock_ghz = 3.0")
    tables: dict[str, Any] = dict(data.get("costs", {}))
    for tier in _TIERS:
        tables |= {f"{tier}.{key}": value for key, value in data.get(tier, {}).items() if key != "name"}
        if not isinstance(data.get(tier, {}).get("name"), str):
            raise ProfileError(where + f'[{tier}] needs a name, e.g. name = "DDR4-3200"')
    for key in tables:
        if key not in _fields():
            raise ProfileError(where + unknown("figure", key, _fields()))
    missing = [key for key in _fields() if key not in tables]
    if missing:
        raise ProfileError(where + f"figure {missing[0]!r} is missing ({len(missing)} missing in all)")
    figures = {key: _figure(key, tables[key], where) for key in _fields()}
    tier_names = {tier: str(data[tier]["name"]) for tier in _TIERS}
    profile = Profile(name, str(data.get("summary", "")), Fraction(clock) * 1000, tier_names, figures)
    costs(profile)
    return profile


def _figure(key: str, table: object, where: str) -> Figure:
    where += f"figure {key!r}: "
    if not isinstance(table, dict):
        raise ProfileError(where + "must be a table of value, unit, range, source and grade")
    for entry in table:
        if entry not in _FIGURE_KEYS:
            raise ProfileError(where + unknown("entry", entry, _FIGURE_KEYS))
    for entry in ("value", "unit", "range", "source", "grade"):
        if entry not in table:
            raise ProfileError(where + f"{entry!r} is missing")
    units = _unit_names(key)
    if table["unit"] not in units:
        raise ProfileError(where + unknown("unit", str(table["unit"]), units))
    if table["grade"] not in GRADES:
        raise ProfileError(where + unknown("grade", str(table["grade"]), GRADES))
    if not isinstance(table["source"], str) or not table["source"].strip():
        raise ProfileError(where + "source must say where the value is from")
    bounds = table["range"]
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(_is_number(bound) for bound in bounds):
        raise ProfileError(where + "range must be [lowest, highest], in the unit of the value")
    value = _curve(key, table["value"], where) if _fields()[key][1] in _CURVES else table["value"]
    judged = value[-1][1] if isinstance(value, tuple) else value
    if not _is_number(judged) or judged < 0:
        raise ProfileError(where + "value must be a number, not below 0")
    if not bounds[0] <= judged <= bounds[1]:
        raise ProfileError(where + f"value {judged} lies outside its own range {bounds[0]} to {bounds[1]}")
    return Figure(key, value, table["unit"], bounds[0], bounds[1], table["source"], table["grade"])


def _curve(key: str, value: object, where: str) -> Curve:
    """Checked pairs: (utilisation, factor), from 0, rising in both; or (writing threads, factor), falling from 1."""
    first = "utilisation" if key.endswith(".curve") else "threads"
    if not isinstance(value, list) or not value:
        raise ProfileError(where + f"value must be a list of [{first}, factor] pairs")
    for point in value:
        if not isinstance(point, list) or len(point) != 2 or not all(_is_number(part) for part in point):
            raise ProfileError(where + f"point {point} is not a pair [{first}, factor]")
    if key.endswith(".curve") and not _rises(value, 1):
        raise ProfileError(where + "the curve must start at [0, 1] and rise")
    if key.endswith(".write_curve") and not _falls(value, 1):
        raise ProfileError(where + "the curve must start at a factor of 1 and fall while whole threads rise")
    return tuple((point[0], point[1]) for point in value)


def _rises(points: Sequence[Sequence[Number]], one: int) -> bool:
    """A loaded-latency curve: two points or more, from (0, 1)."""
    steps = pairwise(points)
    return len(points) > 1 and tuple(points[0]) == (0, one) and all(a[0] < b[0] and a[1] <= b[1] for a, b in steps)


def _falls(points: Sequence[Sequence[Number]], one: int) -> bool:
    """A write curve: one point or more, whole threads, factors from 1 downwards but above 0."""
    threads = [point[0] for point in points]
    steps = all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(points))
    whole = all(isinstance(count, int) and count >= 1 for count in threads)
    return bool(points) and whole and steps and points[0][1] == one and points[-1][1] > 0


def _is_number(value: object) -> bool:
    """A finite number of a size that a cost can have (an exponent may be anything, and would be written out)."""
    if isinstance(value, Decimal):
        return value.is_finite() and -_DIGITS <= value.adjusted() <= _DIGITS and len(value.as_tuple().digits) <= _DIGITS
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**_DIGITS


def _unit_names(key: str) -> list[str]:
    units = _units(key)
    return [*units, "cycles"] if units is _TIME else list(units)


def _resolve(figure: Figure, clock_mhz: Fraction) -> Any:
    """A figure in the contract's unit: integer ps, bytes, bytes per second, count, thousandths, whole threads."""
    if isinstance(figure.value, tuple):
        across = 1 if figure.key.endswith(".write_curve") else 1000
        return tuple((round(Fraction(x) * across), round(Fraction(factor) * 1000)) for x, factor in figure.value)
    return _scaled(figure.key, Fraction(figure.value), figure.unit, clock_mhz)


def _scaled(key: str, value: Fraction, unit: str, clock_mhz: Fraction) -> int:
    factor = Fraction(10**6) / clock_mhz if unit == "cycles" else Fraction(_units(key)[unit])
    return round(value * factor)


def _parse(key: str, text: str, profile: Profile | None) -> int:
    where = f"host.{key}={text}: "
    match = _QUANTITY.fullmatch(text)
    units = _unit_names(key) if profile else list(_units(key))
    example = f"{profile.figures[key].value} {profile.figures[key].unit}" if profile else f"100 {units[0]}"
    if match is None:
        raise ProfileError(where + f"not a number with a unit; write e.g. {example!r}")
    unit = match[2] or (units[0] if _units(key) is _COUNT or not Fraction(match[1]) else "")
    if not unit:
        raise ProfileError(where + f"has no unit; write e.g. {example!r}")
    if unit not in units:
        close = nearest(unit, units)
        hint = f"; did you mean {close!r}?" if close else f"; write e.g. {example!r}"
        raise ProfileError(where + f"unit must be one of {', '.join(units)}{hint}")
    return _scaled(key, Fraction(match[1]), unit, profile.clock_mhz if profile else Fraction(1))


def _plain(value: Number | Curve) -> Any:
    if isinstance(value, tuple):
        return [[_plain(part) for part in point] for point in value]
    return value if isinstance(value, int) else float(value)
