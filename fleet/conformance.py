"""`fleet conformance`: what every policy owes, checked on real fleets of any size, for yours as for the built-in ones.

The laws themselves are in tests/guestd/tiering/test_policy.py, where they are checked at every barrier of small guests.
Here each policy runs in a fleet of its own, and then each with every workload, all in one fleet; with their published
parameters, for as long as they need to act, and through the command line.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fleet.errors import FleetError
from fleet.experiment import toml_value
from fleet.spec_values import Given, size
from fleet.warmup import tiny_trace
from guestd.params import resolve
from guestd.tiering.policy import Policy
from guestd.tiering.registry import policies
from guestd.workloads.registry import workloads
from proto.units import PAGE_SIZE, PS_PER_S

Progress = Callable[[int, int, str], None]
"""``progress(done, total, label)``"""
STAGES = ("track", "classify", "migrate")
PAIR_S = 0.2
"""Virtual time that a pair runs beyond what its policy needs to act."""
END = 0.15
"""Share of a run at its end over which a policy must do better than random placement."""
CACHES_FIT = 16 << 30
"""Memory of a guest, in bytes, that has the host's caches as they are; a smaller one's would hold its hot set, so that
it is run as this one scaled down."""
NEGLIGIBLE = 1e-3
"""Share of an agent's measured CPU that a stage may use to find nothing to do, for which no cost stands."""


class ConformanceError(FleetError):
    """A fleet could not be run at all."""


class Verdict(NamedTuple):
    """One policy on its own: the VM's part of summary.json, and the laws that it broke, in words."""

    policy: str
    vm: dict[str, Any]
    broken: list[str]
    end_fast_ratio: float = 0.0
    """Fast share of the accesses of the run's last `END`."""
    excuse: str = ""
    """Why it was not asked to beat random placement, if it was not."""


def alone(
    names: Sequence[str], base: dict[str, object], least_s: int, most_s: int, jobs: int, progress: Progress
) -> list[Verdict]:
    """Each policy in a fleet of its own, under GUPS with a static hot set, with published parameters; ``jobs`` at once.

    ``base``: keys of a spec (memory, vcpus, ...). It runs for ``least_s``, or for as long as the policy says that it
    needs; if that is more than ``most_s``, no gain is asked of it.
    """
    memory = size(Given(base["memory"], "--memory", Path()))
    needs = {name: _needs_s(policies()[name], memory // PAGE_SIZE) for name in names}
    lasts = {
        name: max(least_s, need_s if need_s <= most_s else 0, _seconds(2 * _acts_ps(policies()[name])))
        for name, need_s in needs.items()
    }
    whole: dict[str, object] = {}
    if memory < CACHES_FIT:
        base, whole = base | {"memory": CACHES_FIT}, {"scale": str(Fraction(memory, CACHES_FIT))}

    def one(name: str) -> Verdict:
        policy = policies()[name]
        keys = _fitting(base, policy) | {"policy": name, "workload": "gups", "seconds": lasts[name]}
        excuse = policy.no_gain or (f"gains after {needs[name]} virtual s" if needs[name] > lasts[name] else "")
        return _judge(policy, *_run([keys], whole, runs), excuse)

    progress(0, len(names), f"{sum(lasts.values())} virtual s")
    verdicts = {}
    runs: set[subprocess.Popen[str]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        # The longest first, so that no core waits for it at the end.
        running = {pool.submit(one, name): name for name in sorted(names, key=lambda name: -lasts[name])}
        try:
            for done, future in enumerate(as_completed(running), 1):
                name = running[future]
                verdicts[name] = future.result()
                progress(done, len(names), f"{name}, {lasts[name]} virtual s")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for run in list(runs):  # none, unless this was interrupted
                run.terminate()
    return [verdicts[name] for name in names]


def pairs(names: Sequence[str], base: dict[str, object], progress: Progress) -> dict[tuple[str, str], dict[str, Any]]:
    """(policy, workload) -> its VM's part of summary.json; every pair a VM of one fleet."""
    with tempfile.TemporaryDirectory(prefix="fleet-conformance-") as folder:
        trace = tiny_trace(Path(folder) / "small.trace")
        groups = []
        for name in names:
            policy = policies()[name]
            keys = _fitting(base, policy) | {"policy": name, "seconds": PAIR_S + _acts_ps(policy) / PS_PER_S}
            for workload in workloads():
                file: dict[str, object] = {"set": {"workload.file": str(trace)}} if workload == "trace" else {}
                groups.append(keys | {"workload": workload} | file)
        summary, _ = _run(groups, {}, set(), lambda line: progress(0, len(groups), line))
        progress(len(groups), len(groups), "")
    return {(vm["policy"], vm["workload"]): vm for vm in summary["vms"]}


def _acts_ps(policy: Policy) -> int:
    """Virtual time after which it has acted, with its published parameters."""
    return policy.min_run_ps(resolve(policy.params, {}))


def _needs_s(policy: Policy, pages: int) -> int:
    """Virtual time in which it must have gained and held that for the end of the run, with its published parameters."""
    return _seconds(policy.gains_ps(resolve(policy.params, {}), pages) / (1 - END))


def _seconds(time_ps: float) -> int:
    return math.ceil(time_ps / PS_PER_S)


def _fitting(base: dict[str, object], policy: Policy) -> dict[str, object]:
    """``base`` with as much fast memory as the policy needs."""
    return base | {"fast_ratio": str(policy.min_fast_ratio)} if policy.min_fast_ratio else base


def _judge(policy: Policy, summary: dict[str, Any], series: pa.Table, excuse: str) -> Verdict:
    """``series``: of timeseries.parquet; ``excuse``: why no gain is asked of it ("" = one is)."""
    (vm,) = summary["vms"]
    broken = [f"{error['kind']}: {error['message']}" for error in summary["errors"]]
    if vm["outcome"] != "ok":
        return Verdict(policy.name, vm, broken or [vm["outcome"]])
    if vm["integrity"]["mismatches"]:
        broken.append(f"{vm['integrity']['mismatches']} accesses found another page's content")
    broken += [f"{tier['name']}: {tier['peak']} of {tier['frames']} frames used"
               for tier in summary["host"]["tiers"] if tier["peak"] > tier["frames"]]  # fmt: skip
    modelled, measured = vm["agent_cpu"]["modelled_s"], vm["agent_cpu"]["measured_s"]
    negligible_s = NEGLIGIBLE * sum(measured[stage] for stage in STAGES)
    broken += [f"{stage}: {measured[stage]:.2g} s measured, {modelled[stage]:.2g} s modelled: one of them is nothing"
               for stage in STAGES
               if (measured[stage] == 0 if modelled[stage] > 0 else measured[stage] > negligible_s)]  # fmt: skip
    if policy.view == "-" and any(modelled[stage] for stage in STAGES):
        broken.append("a policy that manages nothing has used CPU")
    random = vm["memory"]["fast_bytes"] / vm["memory"]["total_bytes"]
    end = _end_fast_ratio(series)
    if policy.name == "none" or policy.fast_share is not None:
        excuse = "it moves nothing"
    if not excuse and end <= random:
        broken.append(f"fast share of accesses {end:.1%} at the end; at random it would be {random:.1%}")
    return Verdict(policy.name, vm, broken, end, excuse)


def _end_fast_ratio(series: pa.Table) -> float:
    """Fast share of the accesses in the last `END` of a run, from its timeseries.parquet."""
    time_s, fast, total = (series[name].to_numpy() for name in ("time_s", "access.fast", "access.total"))
    running = series["phase"].to_numpy(zero_copy_only=False) == "run"
    begins_s = time_s[~running].max(initial=0.0)
    at_end = time_s > time_s[-1] - END * (time_s[-1] - begins_s)
    return float(fast[at_end].sum() / max(total[at_end].sum(), 1))


def _run(
    groups: Sequence[dict[str, object]], whole: dict[str, object], running: set["subprocess.Popen[str]"],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], pa.Table]:  # fmt: skip
    """Summary and time series of one fleet, a process that dies with this one; ``tell`` hears what it says meanwhile.

    ``groups``: keys of its groups of VMs; ``whole``: those of the whole run; ``running``: has the process meanwhile.

    Raises ConformanceError with the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-conformance-") as folder:
        spec, out = Path(folder) / "spec.toml", Path(folder) / "out"
        spec.write_text("[[group]]\n".join(map(_lines, [whole, *groups])), "utf-8")
        command = [sys.executable, "-P", "-m", "fleet.sweep.cell", str(spec), str(out), "--parent", str(os.getpid())]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        said = ""
        with subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as run:
            assert run.stderr is not None
            running.add(run)
            try:
                for line in filter(None, map(str.strip, run.stderr)):
                    said = line
                    tell(line)
            except BaseException:
                run.terminate()
                raise
            finally:
                running.discard(run)
        if not (out / "summary.json").is_file():
            raise ConformanceError(said or f"fleet run ended with exit code {run.returncode}")
        return json.loads((out / "summary.json").read_text("utf-8")), pq.read_table(out / "timeseries.parquet")


def _lines(keys: dict[str, object]) -> str:
    """TOML of a group's or the run's keys."""
    plain = {key: value for key, value in keys.items() if key != "set"}
    settings = keys.get("set", {})
    assert isinstance(settings, dict)
    lines = [f"{key} = {toml_value(value)}" for key, value in plain.items()]
    lines += [f'set."{key}" = {toml_value(value)}' for key, value in settings.items()]
    return "".join(f"{line}\n" for line in lines)
