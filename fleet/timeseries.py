"""The two tables of a run: what each VM counted in each interval, and what happened to which page.

``timeseries.parquet`` has a row per VM and interval, ordered by VM and time: counters are differences over the interval
under the summary's names (``vmstat.pgpromote_success``), times are virtual. ``events.parquet`` has a row per event of
the guests' binary files (`proto.layout.EVENT`), ordered by VM and then as the guest wrote them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fleet.atomic import replacing
from proto.control import Sample
from proto.counters import COUNTERS, C
from proto.layout import EVENT, EVENT_KINDS
from proto.units import PS_PER_S, PS_PER_US

_GROUPS = {"instr": "instructions", "exit": "kvm.exits"}
"""Counter groups that the summary calls otherwise."""

_EVENTS_AT_A_TIME = 1 << 20


def column_name(counter: C) -> str:
    """Name of a counter's column: its place in a VM's entry of the summary."""
    group, name = counter.name.split("__")
    return f"{_GROUPS.get(group, group)}.{name}"


def interval_table(samples: Sequence[Sample], starts_ps: Mapping[int, int]) -> pa.Table:
    """The time series of all VMs, from cumulative samples in any order; ``starts_ps``: when each VM started (or 0).

    An interval that began before its VM had populated its memory is of phase ``populate``, so that the rows of phase
    ``run`` hold nothing else. ``agent_cpu_s`` is measured, ``throughput_mops`` in million accesses a virtual second;
    a ratio without a denominator is null.
    """
    samples = sorted(samples, key=lambda sample: (sample.vm, sample.time_ps))
    vm = np.array([sample.vm for sample in samples], np.int32)
    time_ps = np.array([sample.time_ps for sample in samples], np.int64)
    agent_s = np.array([sample.agent_cpu_s for sample in samples], np.float64)
    running = np.array([sample.phase != "populate" for sample in samples], bool)
    counters = np.frombuffer(b"".join(sample.counters for sample in samples), np.int64).reshape(-1, COUNTERS)
    start_ps = np.array([starts_ps.get(int(v), 0) for v in vm], np.int64)

    first = np.ones(len(vm), bool)
    first[1:] = vm[1:] != vm[:-1]
    length_ps = time_ps - _previous(time_ps, first, start_ps)
    delta = counters - _previous(counters, first, np.zeros_like(counters))
    total, fast = delta[:, C.access__total], delta[:, C.access__fast]
    columns = {
        "vm": pa.array(vm),
        "time_s": pa.array(time_ps / PS_PER_S),
        "interval_s": pa.array(length_ps / PS_PER_S),
        "phase": pa.array(np.where(_previous(running, first, np.zeros_like(running)), "run", "populate"), pa.string()),
        "fast_ratio": pa.array(fast / np.maximum(total, 1), mask=total == 0),
        "throughput_mops": pa.array(total * (PS_PER_US / np.maximum(length_ps, 1)), mask=length_ps <= 0),
        "agent_cpu_s": pa.array(agent_s - _previous(agent_s, first, np.zeros_like(agent_s))),
    }
    columns |= _against_truth(delta)
    columns |= {column_name(counter): pa.array(np.ascontiguousarray(delta[:, counter])) for counter in C}
    return pa.table(columns)


def _against_truth(delta: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """`guestd.hotness.scores` of each interval, from the increases of the counters (int64[rows, COUNTERS])."""
    believed, right, asked, found, accesses, fast, oracle = (
        delta[:, index] for index in range(C.truth__believed, C.truth__oracle_fast + 1)
    )
    precision, recall = right / np.maximum(believed, 1), found / np.maximum(asked, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    columns = {
        "hotness.precision": precision,
        "hotness.recall": recall,
        "hotness.f1": f1,
        "hotness.oracle_fast_ratio": oracle / np.maximum(accesses, 1),
        "hotness.share_of_oracle": fast / np.maximum(oracle, 1),
    }
    return {name: pa.array(values, mask=accesses == 0) for name, values in columns.items()}


def _previous(values: npt.NDArray[Any], first: npt.NDArray[np.bool_], initial: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The value of the row before, and of ``initial`` in the first row of a VM."""
    shifted = np.roll(values, 1, axis=0)
    shifted[first] = initial[first]
    return shifted


def write_intervals(table: pa.Table, target: Path) -> None:
    """Write a table of `interval_table`."""
    with replacing(target) as temporary:
        pq.write_table(table, temporary, compression="zstd")


EVENT_SCHEMA = pa.schema(
    [
        ("vm", pa.int32()),
        ("time_s", pa.float64()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("gva", pa.int64()),
        ("source", pa.int32()),
        ("target", pa.int32()),
    ]
)


def merge_events(parts: Iterable[Path], target: Path) -> int:
    """Merge the guests' binary event files into ``target`` and remove them; the number of events.

    A file of a guest that was killed may end within a record: the rest is dropped. One of an unknown kind is kept
    under the kind ``unknown``. Memory stays bounded: a million events at a time.
    """
    present = [path for path in parts if path.exists()]
    rows = 0
    with replacing(target) as temporary, pq.ParquetWriter(temporary, EVENT_SCHEMA, compression="zstd") as writer:
        for path in present:
            count = path.stat().st_size // EVENT.itemsize
            for start in range(0, count, _EVENTS_AT_A_TIME):
                length = min(_EVENTS_AT_A_TIME, count - start)
                records = np.fromfile(path, EVENT, length, offset=start * EVENT.itemsize)
                writer.write_table(_event_rows(records))
            rows += count
    for path in present:
        path.unlink()
    return rows


def _event_rows(records: npt.NDArray[np.void]) -> pa.Table:
    unknown = len(EVENT_KINDS)
    kind = records["kind"]
    index = np.where((kind >= 0) & (kind < unknown), kind, unknown).astype(np.int8)
    columns = {name: np.ascontiguousarray(records[name]) for name in ("vm", "gva", "source", "target")}
    columns["time_s"] = records["time_ps"] / PS_PER_S
    columns["kind"] = pa.DictionaryArray.from_arrays(index, pa.array([*EVENT_KINDS, "unknown"]))
    return pa.table([columns[name] for name in EVENT_SCHEMA.names], schema=EVENT_SCHEMA)
