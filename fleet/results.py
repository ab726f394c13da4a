"""What a run leaves behind: one directory, written piece by piece, whole or not at all (docs/output.md).

``spec.toml`` and ``provenance.json`` are there from the start, so that a run that was killed can be told from one that
never began; ``summary.json`` comes last, so that where it is, everything else is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from fleet import page_heat, timeseries
from fleet.atomic import write_atomic
from fleet.errors import OutputError
from fleet.experiment import Experiment
from fleet.logs import merge, tail
from fleet.outcome import Failure, FleetResult
from fleet.provenance import Provenance
from fleet.summary import assemble, elapsed, vm_entry
from proto.config import GuestConfig

RUNS = Path("runs")


def default_name(started: datetime, policies: Sequence[str], workloads: Sequence[str]) -> str:
    """``20260131-142501-g-tpp-gups``; ``mixed`` where the VMs differ."""

    def one(names: Sequence[str]) -> str:
        return names[0] if len(set(names)) == 1 else "mixed"

    return f"{started:%Y%m%d-%H%M%S}-{one(policies)}-{one(workloads)}"


class RunDirectory:
    """The directory of one run and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: Path | None, name: str, root: Path = RUNS) -> "RunDirectory":
        """Make the directory: ``out`` itself, which must be new or empty, or else ``root/name``.

        Without ``out`` a taken name gets ``-2``, ``-3`` and so on, so that no run overwrites another.
        Raises OutputError.
        """
        path = out
        try:
            if path is None:
                path = _unique(root, name)
            else:
                path.mkdir(parents=True, exist_ok=True)
            empty = not any(path.iterdir())
        except (FileExistsError, NotADirectoryError):
            raise OutputError(f"{path} is in the way: it, or a part of it, is no directory; choose another") from None
        except OSError as error:
            raise OutputError(f"cannot create {path or root / name}: {error.strerror}; choose another --out") from None
        if not empty:
            raise OutputError(f"{path} is not empty; choose another --out, or remove it")
        return cls(path)

    @property
    def summary_path(self) -> Path:
        """Written last: it is there if and only if the run has been finished."""
        return self.path / "summary.json"

    @property
    def figure_path(self) -> Path:
        """The run's picture."""
        return self.path / "figure.png"

    @property
    def heat_table(self) -> Path:
        """Page heat of all VMs, if it was recorded."""
        return self.path / "heat.parquet"

    @property
    def heat_figure(self) -> Path:
        """The picture of it."""
        return self.path / "heat.png"

    def log_path(self, who: int | str) -> Path:
        """File to which one process appends its log lines: a VM by its number, others by name."""
        return self.path / f"log.{_part(who)}.jsonl"

    def events_path(self, vm: int) -> Path:
        """File to which a guest appends its binary events."""
        return self.path / f"events.{_part(vm)}.bin"

    def heat_path(self, vm: int) -> Path:
        """File to which a guest appends its page heat."""
        return self.path / f"heat.{_part(vm)}.bin"

    def begin(self, spec: Experiment, provenance: Provenance) -> None:
        """Write ``spec.toml`` and ``provenance.json``. Raises OutputError, having left neither."""
        costs = json.dumps(msgspec.to_builtins(spec.costs), sort_keys=True)
        record = msgspec.structs.asdict(provenance) | {
            "seed": spec.seed,
            "spec_digest": spec.digest,
            "host_profile": spec.host,
            "host_costs_digest": "sha256:" + hashlib.sha256(costs.encode()).hexdigest(),
        }
        files = {"spec.toml": spec.to_toml(), "provenance.json": json.dumps(record, indent=2) + "\n"}
        try:
            for name, text in files.items():
                write_atomic(self.path / name, text)
        except OSError as error:
            for name in files:
                (self.path / name).unlink(missing_ok=True)
            raise OutputError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from None

    def parts(self, pattern: str) -> list[Path]:
        """Files of the single processes: ``log.*.jsonl`` or ``events.*.bin``, VMs in the order of their numbers."""
        return sorted(self.path.glob(pattern), key=lambda path: (len(path.name), path.name))


def finish(
    directory: RunDirectory,
    spec: Experiment,
    guests: Sequence[GuestConfig],
    result: FleetResult,
    provenance: Provenance,
) -> dict[str, Any]:
    """Write everything that the run leaves (log, events, time series, summary last); the summary.

    A failure carries the last log lines of its VM. Raises OutputError if the disk does not take it.
    """
    errors = [_error(directory, failure) for failure in result.failures]
    failed = {failure.vm for failure in result.failures}
    vms = []
    for guest in guests:
        report = result.reports.get(guest.vm)
        ended = report is not None and report.get("outcome", "ok") == "ok"
        outcome = "failed" if guest.vm in failed else "ok" if ended else "interrupted"
        vms.append(vm_entry(guest, report, outcome))
    run = {
        "name": directory.path.name,
        "spec_digest": spec.digest,
        "seed": spec.seed,
        "clock": spec.clock,
        "scale": float(spec.scale),
        "host_profile": spec.host,
        "started": provenance.started,
        "argv": provenance.argv,
        "version": provenance.version,
    }
    if provenance.commit is not None:
        run |= {"commit": provenance.commit, "dirty": bool(provenance.dirty)}
    times = elapsed(vms, result.wall_s, {"compile_s": result.compile_s, "ready_s": result.ready_s})
    summary = assemble(run=run, outcome=str(result.outcome), errors=errors, vms=vms, host=result.host, times=times)
    try:
        merge(directory.parts("log.*.jsonl"), directory.path / "log.jsonl")
        timeseries.merge_events(directory.parts("events.*.bin"), directory.path / "events.parquet")
        if spec.heat:
            page_heat.merge(directory.parts("heat.*.bin"), directory.heat_table)
        intervals = timeseries.interval_table(result.samples, {guest.vm: guest.start_ps for guest in guests})
        timeseries.write_intervals(intervals, directory.path / "timeseries.parquet")
        write_atomic(directory.summary_path, to_json(summary))
    except OSError as error:
        raise OutputError(f"cannot write the results to {directory.path}: {error.strerror}") from error
    return summary


def to_json(summary: Mapping[str, Any]) -> str:
    """The text of ``summary.json`` and of ``--json``."""
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _error(directory: RunDirectory, failure: Failure) -> dict[str, Any]:
    error: dict[str, Any] = {"kind": failure.kind, "message": failure.message}
    if failure.vm is None:
        return error
    log = tail(directory.log_path(failure.vm))
    return {"vm": failure.vm} | error | ({"log": log} if log else {})


def _unique(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _part(who: int | str) -> str:
    return f"vm{who}" if isinstance(who, int) else who
