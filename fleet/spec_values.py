"""Reading single values of an experiment: text from the command line or TOML values, into integers with known units.

Every function takes the value and the place it came from, and refuses with a SpecError that names both and says what
would be right. Exact fractions throughout, so that no value depends on the machine's rounding.
"""

import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from fleet.errors import SpecError
from fleet.names import unknown
from guestd.params import Param
from proto.config import Scalar
from proto.errors import UnitError
from proto.units import PAGE_SIZE, PS_PER_MS, PS_PER_NS, PS_PER_S, PS_PER_US, parse_bytes, parse_time_ps

_TIME_UNITS = {"ps": 1, "ns": PS_PER_NS, "us": PS_PER_US, "ms": PS_PER_MS, "s": PS_PER_S}
_BYTE_UNITS = {"B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "pages": PAGE_SIZE}
_LONGEST = 60
"""Characters of a number that are looked at; none that means anything is longer."""
_NUMBER = re.compile(
    r"(?P<number>[+-]?(?=.{1,900}$)([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?)"
    r"(/(?P<denominator>[0-9]{1,400}))?\s*(?P<percent>%)?",
    re.IGNORECASE | re.ASCII,
)
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Given(NamedTuple):
    """A value as somebody wrote it, and where."""

    raw: object
    where: str
    """``--memory`` or ``mixed.toml: group 2: memory``."""
    base: Path
    """Directory that relative file names start from."""

    def refuse(self, reason: str) -> SpecError:
        """The error to raise about it."""
        return SpecError(f"{self.where}: {reason}")


def text(given: Given) -> str:
    """A non-empty string."""
    if not isinstance(given.raw, str) or not given.raw:
        raise given.refuse(f"must be text, not {given.raw!r}")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in given.raw):
        raise given.refuse("holds control characters or is not valid UTF-8")
    return given.raw


def integer(given: Given, low: int, high: int) -> int:
    """A whole number within bounds."""
    number = fraction(given)
    if number.denominator != 1:
        raise given.refuse(f"must be a whole number, not {given.raw}")
    if not low <= number <= high:
        raise given.refuse(f"must be between {low} and {high}, not {given.raw}")
    return int(number)


def fraction(given: Given) -> Fraction:
    """An exact number: ``0.2``, ``1/16``, ``20%``, ``1e6``."""
    raw = given.raw
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise given.refuse(f"must be a number, not {raw!r}")
    # repr gives the shortest decimal of a TOML float, which is what its author wrote.
    match = _NUMBER.fullmatch(raw.strip() if isinstance(raw, str) else repr(raw))
    denominator = int(match["denominator"] or 1) if match else 0
    if match is None or not denominator:
        raise given.refuse(f"must be a number, not {_short(raw)}")
    return Fraction(match["number"]) / denominator / (100 if match["percent"] else 1)


def size(given: Given) -> int:
    """Bytes: ``16GiB``; a bare number is in bytes."""
    try:
        return parse_bytes(_quantity(given))
    except UnitError as error:
        raise given.refuse(str(error)) from None


def time_ps(given: Given) -> int:
    """Picoseconds: ``500ms``; a bare number is in seconds."""
    try:
        return parse_time_ps(_quantity(given))
    except UnitError as error:
        raise given.refuse(str(error)) from None


def _quantity(given: Given) -> str:
    """Number and unit as text."""
    if isinstance(given.raw, bool) or not isinstance(given.raw, int | float | str) or len(str(given.raw)) > _LONGEST:
        raise given.refuse(f"must be a number with a unit, not {_short(given.raw)}")
    return str(fraction(given)) if isinstance(given.raw, float) and "e" in repr(given.raw) else str(given.raw)


def _short(raw: object) -> str:
    """A value as an error shows it."""
    shown = repr(raw)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."


def parameter(param: Param, given: Given) -> Scalar:
    """The value of a declared parameter: its default's type, its unit, within its choices and bounds."""
    value = _typed(param, given)
    if param.choices and value not in param.choices:
        raise given.refuse(unknown("choice", str(value), param.choices))
    if not isinstance(value, bool | str):
        unit = f" {param.unit}" if param.unit else ""
        if param.minimum is not None and value < param.minimum:
            raise given.refuse(f"must be at least {param.minimum:g}{unit}, not {given.raw}")
        if param.maximum is not None and value > param.maximum:
            raise given.refuse(f"must be at most {param.maximum:g}{unit}, not {given.raw}")
    return value


def is_file(param: Param) -> bool:
    """Whether the parameter names a file."""
    return isinstance(param.default, str) and (param.name == "file" or param.unit == "path")


def exact_time(ps: int) -> str:
    """``"10ms"``: the time without any rounding, in the largest unit that divides it."""
    unit = next(name for name in ("s", "ms", "us", "ns", "ps") if ps % _TIME_UNITS[name] == 0)
    return f"{ps // _TIME_UNITS[unit]}{unit}"


def exact_size(count: int) -> str:
    """``"512MiB"``: the size without any rounding, in the largest unit that divides it."""
    unit = next(name for name in ("GiB", "MiB", "KiB", "B") if count % _BYTE_UNITS[name] == 0)
    return f"{count // _BYTE_UNITS[unit]}{unit}"


def _typed(param: Param, given: Given) -> Scalar:
    if isinstance(param.default, bool):
        return _boolean(given)
    if isinstance(param.default, str):
        return _file(given) if is_file(param) else text(given)
    number = _in_unit(param, given)
    if isinstance(param.default, int):
        if number.denominator != 1:
            raise given.refuse(f"must be a whole number{f' of {param.unit}' if param.unit else ''}, not {given.raw}")
        if abs(number) >= 1 << 63:
            raise given.refuse(f"{given.raw} is too large")
        return int(number)
    try:
        return float(number)
    except OverflowError:
        raise given.refuse(f"{given.raw} is too large") from None


def _boolean(given: Given) -> bool:
    if isinstance(given.raw, bool):
        return given.raw
    value = _TRUTH.get(str(given.raw).lower())
    if value is None:
        raise given.refuse(f"must be true or false, not {given.raw!r}")
    return value


def _in_unit(param: Param, given: Given) -> Fraction:
    """The number in the parameter's own unit; text may carry another unit of the same kind."""
    if not isinstance(given.raw, str) or not given.raw.strip()[-1:].isalpha():
        return fraction(given)
    try:
        if param.unit in _TIME_UNITS:
            return Fraction(parse_time_ps(given.raw), _TIME_UNITS[param.unit])
        if param.unit in _BYTE_UNITS:
            bare = given.raw.strip().removesuffix(param.unit)
            if param.unit in ("pages", "bytes") and bare != given.raw.strip():
                return fraction(given._replace(raw=bare.strip()))
            return Fraction(parse_bytes(given.raw), _BYTE_UNITS[param.unit])
    except UnitError as error:
        raise given.refuse(str(error)) from None
    return fraction(given._replace(raw=given.raw.strip().removesuffix(param.unit or "\0").strip()))


def _file(given: Given) -> str:
    """An existing file, as an absolute path, so that the resolved spec works from anywhere."""
    if given.raw == "":
        return ""
    path = Path(given.base, text(given)).expanduser()
    try:
        there = path.is_file()
    except OSError as error:
        raise given.refuse(f"no such file: {error.strerror}") from None
    if not there:
        folder = path.parent
        if not folder.is_dir():
            raise given.refuse(f"no such file: there is no directory {folder}")
        raise given.refuse(unknown("file", path.name, [entry.name for entry in folder.iterdir()]) + f" (in {folder})")
    return str(path.resolve())
