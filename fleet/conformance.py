"""`fleet conformance`: what every policy owes, checked on real fleets of any size, for yours as for the built-in ones.

The laws themselves are in tests/guestd/tiering/test_policy.py, where they are checked at every barrier of small guests.
Here each policy runs in a fleet of its own, and then each with every workload, all in one fleet; with their published
parameters, for as long as they need to act, and through the command line.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fleet.errors import FleetError
from fleet.experiment import toml_value
from fleet.warmup import tiny_trace
from guestd.params import resolve
from guestd.tiering.policy import Policy
from guestd.tiering.registry import policies
from guestd.workloads.registry import workloads
from proto.units import PS_PER_S

Progress = Callable[[int, int, str], None]
"""``progress(done, total, label)``"""
STAGES = ("track", "classify", "migrate")
PAIR_S = 0.2
"""Virtual time that a pair runs beyond what its policy needs to act."""


class ConformanceError(FleetError):
    """A fleet could not be run at all."""


class Verdict(NamedTuple):
    """One policy on its own: the VM's part of summary.json, and the laws that it broke, in words."""

    policy: str
    vm: dict[str, Any]
    broken: list[str]


def alone(names: Sequence[str], base: dict[str, object], seconds: int, progress: Progress) -> list[Verdict]:
    """Each policy in a fleet of its own, under GUPS with a static hot set, with published parameters.

    ``base``: keys of a spec (memory, vcpus, ...). It runs for ``seconds``, or twice as long as the policy needs to act.
    """
    verdicts = []
    for done, name in enumerate(names):
        progress(done, len(names), name)
        policy = policies()[name]
        acts_ps = _acts_ps(policy)
        run_s = max(seconds, -(-2 * acts_ps // PS_PER_S))
        summary = _run([_fitting(base, policy) | {"policy": name, "workload": "gups", "seconds": run_s}])
        verdicts.append(_judge(policy, summary, run_s * PS_PER_S >= 2 * acts_ps))
    progress(len(names), len(names), "")
    return verdicts


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
        summary = _run(groups, lambda line: progress(0, len(groups), line))
        progress(len(groups), len(groups), "")
    return {(vm["policy"], vm["workload"]): vm for vm in summary["vms"]}


def _acts_ps(policy: Policy) -> int:
    """Virtual time after which it has acted, with its published parameters."""
    return policy.min_run_ps(resolve(policy.params, {}))


def _fitting(base: dict[str, object], policy: Policy) -> dict[str, object]:
    """``base`` with as much fast memory as the policy needs."""
    return base | {"fast_ratio": str(policy.min_fast_ratio)} if policy.min_fast_ratio else base


def _judge(policy: Policy, summary: dict[str, Any], acted: bool) -> Verdict:
    (vm,) = summary["vms"]
    broken = [f"{error['kind']}: {error['message']}" for error in summary["errors"]]
    if vm["outcome"] != "ok":
        return Verdict(policy.name, vm, broken or [vm["outcome"]])
    if vm["integrity"]["mismatches"]:
        broken.append(f"{vm['integrity']['mismatches']} accesses found another page's content")
    broken += [f"{tier['name']}: {tier['peak']} of {tier['frames']} frames used"
               for tier in summary["host"]["tiers"] if tier["peak"] > tier["frames"]]  # fmt: skip
    modelled, measured = vm["agent_cpu"]["modelled_s"], vm["agent_cpu"]["measured_s"]
    broken += [f"{stage}: {measured[stage]:.2g} s measured, {modelled[stage]:.2g} s modelled: one of them is nothing"
               for stage in STAGES if (modelled[stage] > 0) != (measured[stage] > 0)]  # fmt: skip
    if policy.view == "-" and any(modelled[stage] for stage in STAGES):
        broken.append("a policy that manages nothing has used CPU")
    random = vm["memory"]["fast_bytes"] / vm["memory"]["total_bytes"]
    must_gain = acted and policy.name != "none" and policy.fast_share is None and not policy.no_gain
    if must_gain and vm["access"]["fast_ratio"] <= random:
        broken.append(f"fast share of accesses {vm['access']['fast_ratio']:.1%}; at random it would be {random:.1%}")
    return Verdict(policy.name, vm, broken)


def _run(groups: Sequence[dict[str, object]], tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The summary of one fleet, run by the command line; ``tell`` hears what it says meanwhile.

    Raises ConformanceError with the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-conformance-") as folder:
        spec, out = Path(folder) / "spec.toml", Path(folder) / "out"
        spec.write_text("".join(_group(group) for group in groups), "utf-8")
        command = [sys.executable, "-m", "fleet", "run", str(spec), "--json", "--out", str(out)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        said = ""
        with subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as run:
            assert run.stderr is not None
            for line in filter(None, map(str.strip, run.stderr)):
                said = line
                tell(line)
        if not (out / "summary.json").is_file():
            raise ConformanceError(said or f"fleet run ended with exit code {run.returncode}")
        return json.loads((out / "summary.json").read_text("utf-8"))


def _group(group: dict[str, object]) -> str:
    plain = {key: value for key, value in group.items() if key != "set"}
    settings = group.get("set", {})
    assert isinstance(settings, dict)
    lines = [f"{key} = {toml_value(value)}" for key, value in plain.items()]
    lines += [f'set."{key}" = {toml_value(value)}' for key, value in settings.items()]
    return "[[group]]\n" + "\n".join(lines) + "\n"
