"""The results of a whole sweep: ``results.parquet``, a row per cell and VM, and ``results.json`` with its digest.

Columns of a row: ``cell``, ``repetition``, ``seed``, the axes under their full keys, ``vm``, ``policy``, ``workload``,
then every number of the VM's entry in summary.json under its path there (``access.fast_ratio``), and those of the
whole run under their full path (``elapsed.virtual_s``, ``host.tiers.0.used``). A number whose name is an axis too is
``vm.NAME``. Lists other than the host's tiers stay in summary.json.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from fleet.atomic import replacing, write_atomic
from fleet.provenance import collect
from fleet.sweep.store import Cell

SCHEMA = 1
_RUN_PARTS = ("elapsed", "host")
_TEXTS = ("policy", "workload", "outcome")


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row per VM of every cell that is done."""
    axes = list(dict.fromkeys(key for cell in cells for key in cell.axes))
    found = []
    for cell in cells:
        if cell.status != "done" or cell.summary is None:
            continue
        own = {"cell": cell.hash, "repetition": cell.repetition, "seed": cell.summary["run"]["seed"]}
        own |= {key: cell.axes.get(key) for key in axes}
        run = dict(numbers({part: cell.summary.get(part, {}) for part in _RUN_PARTS}))
        shares = {entry["id"]: entry for entry in cell.summary.get("host", {}).get("cpu", {}).get("by_vm", [])}
        for vm in cell.summary["vms"]:
            figures: dict[str, Any] = {key: vm[key] for key in _TEXTS}
            figures |= {key: value for key, value in numbers(vm) if key != "id"}
            figures |= {
                f"host.cpu.by_vm.{key}": value for key, value in numbers(shares.get(vm["id"], {})) if key != "id"
            }
            named = {f"vm.{key}" if key in own or key == "vm" else key: value for key, value in figures.items()}
            found.append(own | {"vm": vm["id"]} | named | run)
    return found


def numbers(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number below, by its path; of lists only the host's tiers."""
    for key, below in value.items():
        path = f"{prefix}{key}"
        if isinstance(below, Mapping):
            yield from numbers(below, path + ".")
        elif isinstance(below, list) and path == "host.tiers":
            yield from numbers({str(number): tier for number, tier in enumerate(below)}, path + ".")
        elif isinstance(below, int | float) and not isinstance(below, bool):
            yield path, below


def table(cells: Sequence[Cell]) -> pa.Table:
    """The rows as a table; a column whose values differ in kind is text."""
    found = rows(cells)
    names = list(dict.fromkeys(name for row in found for name in row))
    return pa.table({name: _column([row.get(name) for row in found]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array(values, pa.float64())
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.array(values)


def sweep_digest(cells: Sequence[Cell]) -> str:
    """``sha256:...`` of the deterministic part of all cells: each one's spec, status and summary's digest."""
    parts = [[c.hash, c.status, c.summary["digest"] if c.status == "done" and c.summary else ""] for c in cells]
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def overview(name: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """The content of ``results.json``."""
    axes: dict[str, list[object]] = {}
    for cell in cells:
        for key, value in cell.axes.items():
            if value not in (known := axes.setdefault(key, [])):
                known.append(value)
    listed, versions = [], set()
    for cell in cells:
        line: dict[str, Any] = {"cell": cell.hash, "axes": cell.axes, "repetition": cell.repetition}
        line["status"] = cell.status
        if cell.summary is not None:
            run = cell.summary["run"]
            versions.add((run["version"], run.get("commit"), run.get("dirty")))
            line |= {"seed": run["seed"], "digest": cell.summary["digest"]}
            line |= {"wall_s": cell.summary["elapsed"]["wall_s"], "cpu_measured": cell.info.get("cpu_measured")}
        listed.append(line)
    return {
        "schema": SCHEMA,
        "name": name,
        "digest": sweep_digest(cells),
        "counts": {status: sum(c.status == status for c in cells) for status in ("done", "failed", "missing")},
        "axes": axes,
        "failures": [
            {"cell": c.hash, "axes": c.axes, "repetition": c.repetition, "reason": c.reason}
            for c in cells if c.status == "failed"
        ],
        "made_by": [
            {"version": version, "commit": commit, "dirty": dirty}
            for version, commit, dirty in sorted(versions, key=str)
        ],
        "cells": listed,
        "provenance": msgspec.structs.asdict(collect()),
    }  # fmt: skip


def write_results(directory: Path, name: str, cells: Sequence[Cell]) -> None:
    """Write both files."""
    with replacing(directory / "results.parquet") as temporary:
        pq.write_table(table(cells), temporary, compression="zstd")
    write_atomic(directory / "results.json", json.dumps(overview(name, cells), indent=2, ensure_ascii=False) + "\n")
