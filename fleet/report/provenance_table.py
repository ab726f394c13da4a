"""Where a run came from, and what went wrong in it."""

import json
from collections.abc import Sequence

from fleet.report.table import Column, Table, Value, flat
from fleet.sweep.store import Cell


def provenance_table(cells: Sequence[Cell]) -> Table:
    """``provenance.json`` as key and value; over several cells the values that differ are counted."""
    values: dict[str, list[Value]] = {}
    for cell in cells:
        path = cell.path / "provenance.json"
        if not path.is_file():
            continue
        record = json.loads(path.read_text("utf-8"))
        record["command"] = " ".join(record.pop("argv", []))
        if cell.summary is not None:
            record["digest"] = cell.summary["digest"]
        for key, value in flat(record):
            seen = values.setdefault(key, [])
            if value not in seen:
                seen.append(value)
    rows = []
    for key, seen in values.items():
        rows.append((key, seen[0] if len(seen) == 1 else f"{len(seen)} values, one is {seen[0]}"))
    return Table("provenance", "Provenance", (Column("what"), Column("value")), tuple(rows))


def errors_table(cells: Sequence[Cell]) -> Table | None:
    """What went wrong, if anything did."""
    rows: list[tuple[Value, ...]] = []
    for cell in cells:
        if cell.reason:
            rows.append((cell.hash, None, "cell", cell.reason))
        for error in (cell.summary or {}).get("errors", []):
            rows.append((cell.hash, error.get("vm"), error["kind"], error["message"]))
    columns = (Column("run"), Column("VM"), Column("kind"), Column("message"))
    return Table("errors", "What went wrong", columns, tuple(rows)) if rows else None
