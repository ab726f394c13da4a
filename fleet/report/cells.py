"""The cells of a sweep as they lie on disk, read only; a run of its own is one cell without axes."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fleet.errors import OutputError

Status = Literal["done", "failed", "missing"]


class Cell(NamedTuple):
    """A run with its place in a sweep."""

    hash: str
    axes: dict[str, object]
    """Values by full key, in the order of the axes."""
    repetition: int
    path: Path
    summary: dict[str, Any] | None
    status: Status

    @property
    def reason(self) -> str:
        """Why it failed; empty if it did not."""
        file = self.path / "FAILED"
        return file.read_text("utf-8").strip() if file.is_file() else ""


def load(directory: Path) -> list[Cell]:
    """The cells of a sweep's directory, or the run in ``directory`` itself. Raises OutputError."""
    if (directory / "cells").is_dir():
        found = [(path, _read(path / "cell.json")) for path in sorted((directory / "cells").iterdir())]
        return [_cell(path, entry) for path, entry in found if entry is not None]
    if (directory / "spec.toml").is_file():
        summary = _read(directory / "summary.json")
        status: Status = "missing" if summary is None else "done" if summary["outcome"] == "ok" else "failed"
        return [Cell(directory.name, {}, 0, directory, summary, status)]
    raise OutputError(f"{directory} holds neither a sweep nor a run (no cells/, no spec.toml)")


def _cell(path: Path, entry: dict[str, Any]) -> Cell:
    status: Status = "done" if (path / "DONE").is_file() else "failed" if (path / "FAILED").is_file() else "missing"
    summary = None if status == "missing" else _read(path / "summary.json")
    return Cell(path.name, entry["axes"], entry["repetition"], path, summary, status)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None
