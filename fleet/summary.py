"""Assembles ``summary.json`` from what the guests, the host and the launcher report, and digests it.

The form is `fleet.schema`, the meaning of each key docs/output.md. Nothing is computed here that a guest or the host
knows better; what is added is what only the whole run knows: which run it was, how it ended, how long it took, the
entries of guests that did not live to report, and the digest by which two runs are compared.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fleet.schema import SCHEMA, Elapsed, Run, Summary, Vm, ordered
from proto.config import GuestConfig
from proto.units import PAGE_SIZE

DETERMINISTIC_KEYS = (
    "outcome",
    "elapsed.virtual_s",
    "elapsed.populate_virtual_s",
    "vms.*.id",
    "vms.*.policy",
    "vms.*.workload",
    "vms.*.vcpus",
    "vms.*.memory.total_bytes",
    "vms.*.memory.fast_bytes",
    "vms.*.memory.slow_bytes",
    "vms.*.memory.backed_bytes",
    "vms.*.memory.touched_bytes",
    "vms.*.memory.pinned_bytes",
    "vms.*.memory.huge_bytes",
    "vms.*.outcome",
    "vms.*.transactions",
    "vms.*.virtual_s",
    "vms.*.populate_virtual_s",
    "vms.*.throughput_mops",
    "vms.*.access.**",
    "vms.*.vmstat.**",
    "vms.*.kvm.**",
    "vms.*.instructions.**",
    "vms.*.flushes.**",
    "vms.*.pebs.records",
    "vms.*.pebs.pmi",
    "vms.*.pebs.dropped",
    "vms.*.pebs.drains",
    "vms.*.pebs.drained_records",
    "vms.*.pebs.ept_violations",
    "vms.*.pebs.period",
    "vms.*.pebs.record_bytes",
    "vms.*.pebs.events.**",
    "vms.*.pebs.vcpus.**",
    "vms.*.pebs.foreign_records_visible",
    "vms.*.pebs.cpu_ns_per_sample.modelled",
    "vms.*.pml.**",
    "vms.*.swap.**",
    "vms.*.host_thp.**",
    "vms.*.flat_memory.**",
    "vms.*.migration.**",
    "vms.*.hotness.**",
    "vms.*.locality.**",
    "vms.*.time.**",
    "vms.*.vcpu_time.**",
    "vms.*.populate.vmstat.**",
    "vms.*.populate.kvm.**",
    "vms.*.populate.flushes.**",
    "vms.*.populate.agent_cpu.modelled_s.**",
    "vms.*.agent_cpu.activations",
    "vms.*.agent_cpu.modelled_s.**",
    "vms.*.agent_cpu.modelled_cores",
    "vms.*.agent_cpu.stolen_s",
    "vms.*.hypercalls.count.**",
    "vms.*.balloon.**",
    "vms.*.integrity.**",
    "host.cpu.modelled_s",
    "host.cpu.by_vm.*.modelled_s",
    "host.virtual_s",
    "host.overcommit.**",
    "host.tiers.**",
)
"""What the digest covers: counters and virtual times, nothing that this machine's clock or scheduler can move.
``*`` stands for one list index or key, ``**`` for everything below."""


def digest(summary: Mapping[str, Any], keys: Iterable[str] = DETERMINISTIC_KEYS) -> str:
    """``sha256:...`` over the canonical JSON of every value of ``summary`` that one of ``keys`` names."""
    patterns = [key.split(".") for key in keys]
    chosen = {".".join(path): value for path, value in _leaves(summary) if any(_matches(path, p) for p in patterns)}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def is_deterministic(path: str) -> bool:
    """Whether the digest covers the value at ``path``, such as ``vms.0.access.total``."""
    parts = path.split(".")
    return any(_matches(parts, key.split(".")) for key in DETERMINISTIC_KEYS)


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping):
        items: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, below in items:
        yield from _leaves(below, (*path, str(key)))


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if pattern[-1] == "**":
        return len(path) >= len(pattern) and _matches(path[: len(pattern) - 1], pattern[:-1])
    return len(path) == len(pattern) and all(want in ("*", have) for have, want in zip(path, pattern, strict=True))


def vm_entry(guest: GuestConfig, report: Mapping[str, Any] | None, outcome: str) -> dict[str, Any]:
    """A VM's part of the summary: its own report, or for a guest that left none, what it was meant to be.

    ``outcome``: how the guest ended; a mismatch in its report makes it ``failed`` whatever else it did.
    """
    entry: dict[str, Any] = {
        "id": guest.vm,
        "policy": guest.policy_label,
        "workload": guest.workload,
        "vcpus": guest.vcpus,
        "memory": {
            "total_bytes": guest.total_pages * PAGE_SIZE,
            "fast_bytes": guest.fast_pages * PAGE_SIZE,
            "slow_bytes": guest.slow_pages * PAGE_SIZE,
        },
    }
    report = dict(report or {})
    entry["memory"] |= report.pop("memory", {})
    if report.get("integrity", {}).get("mismatches", 0):
        outcome = "failed"
    return ordered(entry | report | {"outcome": outcome}, Vm)


def elapsed(vms: Iterable[Mapping[str, Any]], wall_s: float, extra: Mapping[str, float]) -> dict[str, Any]:
    """The summary's ``elapsed``: longest populate and run phase of any VM, and the wall clock.

    ``extra``: further wall times (compiling, start-up). The realtime factor is virtual seconds (both phases) a wall
    second; ``slip_s`` is absent, as the virtual clock has no wall clock to fall behind.
    """
    vms = list(vms)
    run_s = max((vm.get("virtual_s", 0.0) for vm in vms), default=0.0)
    populate_s = max((vm.get("populate_virtual_s", 0.0) for vm in vms), default=0.0)
    both_s = max((vm.get("virtual_s", 0.0) + vm.get("populate_virtual_s", 0.0) for vm in vms), default=0.0)
    factor = both_s / wall_s if wall_s > 0 else 0.0
    times = {"virtual_s": run_s, "populate_virtual_s": populate_s, "wall_s": wall_s, "realtime_factor": factor}
    return ordered(times | dict(extra), Elapsed)


def mismatch_errors(vms: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An error for every VM that reached a frame with another page's content: such a run has failed."""
    return [
        {"vm": vm["id"], "kind": "integrity", "message": f"{found} accesses reached a frame with the wrong content"}
        for vm in vms
        if (found := vm.get("integrity", {}).get("mismatches", 0))
    ]


def assemble(
    *,
    run: Mapping[str, Any],
    outcome: str,
    errors: Sequence[Mapping[str, Any]],
    vms: Sequence[Mapping[str, Any]],
    host: Mapping[str, Any],
    times: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary, in the order of `fleet.schema.Summary`, with its digest.

    ``outcome`` becomes ``failed`` where there are errors and the run was not interrupted.
    """
    every_error = [*errors, *mismatch_errors(vms)]
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "run": ordered(dict(run), Run),
        "outcome": "failed" if every_error and outcome == "ok" else outcome,
        "errors": every_error,
        "elapsed": dict(times),
        "vms": [dict(vm) for vm in vms],
    }
    if host:
        summary["host"] = dict(host)
    return ordered(summary | {"digest": digest(summary)}, Summary)
