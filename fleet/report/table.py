"""A table as data: columns with units, rows of plain values. Page, terminal and ``--json`` print the same one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Value = str | int | float | bool | None


class Column(NamedTuple):
    """A column; ``unit`` is empty for text and for numbers without one."""

    name: str
    unit: str = ""

    @property
    def title(self) -> str:
        """``throughput (M accesses/s)``."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; None is a figure that does not apply."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """The table for JSON."""
        columns = [{"name": column.name, "unit": column.unit} for column in self.columns]
        return {"title": self.title, "note": self.note, "columns": columns, "rows": [list(row) for row in self.rows]}


def shown(value: Value) -> str:
    """A value as people read it: four digits that mean something, never more than there are."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Value]]:
    """Dotted key and value of everything in a nested record; lists in one line."""
    found: list[tuple[str, Value]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, " ".join(map(str, value)) if isinstance(value, list) else value))
    return found
