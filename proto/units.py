"""Units: memory in bytes and 4 KiB pages, virtual time in integer picoseconds; parsing and printing of both.

Virtual time is integer so that no rounding depends on the machine (architecture 3.2). 2**63 ps are 106 days.
"""

import re
from fractions import Fraction

from proto.errors import UnitError

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
TABLE_SHIFT = 9
"""A page-table page holds 512 entries, so one leaf table maps 2 MiB."""
TABLE_PAGES = 1 << TABLE_SHIFT
LINE_SIZE = 64

PS_PER_NS = 1_000
PS_PER_US = 1_000_000
PS_PER_MS = 1_000_000_000
PS_PER_S = 1_000_000_000_000

_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
          "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_TIMES = {"ps": 1, "ns": PS_PER_NS, "us": PS_PER_US, "ms": PS_PER_MS, "s": PS_PER_S, "min": 60 * PS_PER_S}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def _parse(text: str, units: dict[str, int], bare: str, what: str) -> int:
    match = _QUANTITY.fullmatch(text)
    factor = units.get((match[2] or bare) if match else "")
    if match is None or factor is None:
        raise UnitError(f"{text!r} is not a {what}; write a number and one of {', '.join(units)}, e.g. 16{bare}")
    return round(Fraction(match[1]) * factor)


def parse_bytes(text: str) -> int:
    """Bytes in ``"16GiB"``, ``"512 MiB"``, ``"64"`` (bytes). Raises UnitError."""
    return _parse(text, _BYTES, "B", "size")


def parse_time_ps(text: str, bare: str = "s") -> int:
    """Picoseconds in ``"500ms"``, ``"0.3us"``; a number without a unit is in ``bare``. Raises UnitError."""
    return _parse(text, _TIMES, bare, "time")


def format_bytes(count: int) -> str:
    """``"1.5 GiB"``: the largest binary unit that leaves at least 1 in front of the point."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= _BYTES[name]:
            return f"{count / _BYTES[name]:.4g} {name}"
    return f"{count} B"


def format_time(ps: int) -> str:
    """``"1.5 ms"``: the largest unit up to seconds that leaves at least 1 in front of the point."""
    for name in ("s", "ms", "us", "ns"):
        if abs(ps) >= _TIMES[name]:
            return f"{ps / _TIMES[name]:.4g} {name}"
    return f"{ps} ps"
