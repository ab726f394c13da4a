"""SQL over the results of a sweep or a run, by DuckDB (extra ``tierfleet[sql]``).

Tables: ``results`` (a row per cell and VM, `fleet.sweep.results`), ``intervals`` and ``events`` (timeseries.parquet and
events.parquet of all cells, with the column ``cell``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.errors import OutputError, SpecError
from fleet.sweep.results import table
from fleet.sweep.store import Cell, load

_FILES = {"intervals": "timeseries.parquet", "events": "events.parquet"}


def query(directory: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of the columns, and rows. Raises SpecError for SQL that DuckDB refuses, OutputError without results."""
    try:
        import duckdb
    except ImportError:
        raise SpecError("fleet results query: needs the extra: pip install 'tierfleet[sql]'") from None
    cells = [cell for cell in load(directory) if cell.status == "done"]
    if not cells:
        raise OutputError(f"{directory}: has no cell that is done")
    with duckdb.connect(":memory:") as connection:
        connection.register("results", table(cells))
        for name, file in _FILES.items():
            _view(connection, name, file, cells)
        try:
            found = connection.execute(sql)
            if found is None or not found.description:
                raise SpecError("SQL: it asks for nothing; write a query such as: select vms, policy from results")
            columns = [column[0] for column in found.description]
            if twice := {name for name in columns if columns.count(name) > 1}:
                raise SpecError(f"SQL: several columns are called {min(twice)}; name them with: as NAME")
            return columns, found.fetchall()
        except duckdb.Error as error:
            raise SpecError(f"SQL: {str(error).splitlines()[0]}") from None


def _view(connection: Any, name: str, file: str, cells: Sequence[Cell]) -> None:
    """A view over one file of every cell."""
    there = [(str(path), cell.hash) for cell in cells if (path := cell.path / file).is_file()]
    if not there:
        return
    # Prepared statements cannot define views, and paths may hold quotes.
    paths = ", ".join("'" + path.replace("'", "''") + "'" for path, _ in there)
    hashes = ", ".join("'" + path.replace("'", "''") + f"': '{key}'" for path, key in there)
    connection.execute(
        f"create view {name} as select MAP {{{hashes}}}[filename] as cell, * exclude filename "
        f"from read_parquet([{paths}], filename = true, union_by_name = true)"
    )
