"""fleet.warmup: after it, nothing is left to compile for a run of what it was told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.warmup import warm_up
from guestd.tiering.registry import policies
from proto.costs import Costs
from tests.small_fleet import run_fleet, small_guest

ROOT = Path(__file__).parent.parent.parent


def test_it_says_how_far_it_is(costs: Costs) -> None:
    said: list[tuple[int, int, str]] = []
    warm_up(["none", "g-tpp"], ["gups", "scan", "trace"], costs, lambda *what: said.append(what))
    done = [step for step, _, _ in said]
    assert done == list(range(len(said)))
    assert {total for _, total, _ in said} == {len(said) - 1}
    labels = [label for _, _, label in said]
    assert labels[-1] == ""
    assert {"g-tpp", "scan", "trace"} <= set(labels)


def test_it_leaves_nothing_behind(costs: Costs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    warm_up(["none"], ["trace"], costs, lambda done, total, label: None)
    assert list(tmp_path.iterdir()) == []


def test_each_mechanism_of_each_policy_acts_in_its_few_milliseconds(costs: Costs) -> None:
    # What does not act is not compiled, and would be in a guest.
    for name, policy in policies().items():
        if policy.view == "-":
            continue
        guests = [
            small_guest(costs, name, pages=4096, fast=1024, vm=vm) for vm in range(1 if policy.moves_alone else 2)
        ]
        reports = run_fleet(*guests).values()
        report = max(reports, key=lambda one: one["migration"]["promoted_pages"])
        stages = report["agent_cpu"]["modelled_s"]
        assert stages["track"] > 0
        assert stages["migrate"] > 0
        assert report["migration"]["promoted_pages"] > 0


SCRIPT = """
import gc
import tempfile
import msgspec
from numba.core.dispatcher import Dispatcher
from fleet import hosts
from fleet.warmup import warm_up
from guestd.tiering.registry import policies
from guestd.workloads.registry import workloads
from proto.config import HostKernel
from tests.small_fleet import run_fleet, small_guest

def compiled():
    kernels = [found for found in gc.get_objects() if isinstance(found, Dispatcher)]
    return {f"{kernel.py_func.__module__}.{kernel.py_func.__name__}{signature}"
            for kernel in kernels for signature in kernel.overloads}

costs = hosts.costs(hosts.load_profile(hosts.DEFAULT_PROFILE))
warm_up(list(policies()), list(workloads()), costs, lambda *what: None)
before = compiled()
assert len(before) > 20
for policy in policies():
    run_fleet(small_guest(costs, policy, params={}, run_ms=40))
    run_fleet(*(small_guest(costs, policy, run_ms=40, vm=vm, workload={"layout": "scattered"}) for vm in range(2)))
variants = {"btree": {"load": "sorted", "order": 32}, "silo": {"keys": "ordered", "period": 1000},
            "pagerank": {}, "bfs": {}}
for name, params in variants.items():
    guest = small_guest(costs, "oracle", run_ms=40, workload=params)
    run_fleet(msgspec.structs.replace(guest, workload=name))
late = compiled() - before
kernel = HostKernel(pml=True, pml_harvest_ps=10**10, swap_pages_per_s=200_000)
warm_up(list(policies()), ["gups"], costs, lambda *what: None, kernel)
before = compiled()
for policy in policies():
    run_fleet(small_guest(costs, policy, run_ms=40, host=kernel))
late |= compiled() - before
kernel = HostKernel(thp="always")
warm_up(list(policies()), ["gups"], costs, lambda *what: None, kernel, huge=True)
before = compiled()
for policy in policies():
    guest = small_guest(costs, policy, run_ms=40, host=kernel)
    for defrag in ("madvise", "always"):
        thp = msgspec.structs.replace(guest.kernel, thp="always", thp_defrag=defrag, khugepaged_scan_sleep_ps=10**9)
        run_fleet(msgspec.structs.replace(guest, kernel=thp))
late |= compiled() - before
with tempfile.TemporaryDirectory() as folder:
    for policy in ("none", "hyperplace"):
        warm_up([policy], ["gups"], costs, lambda *what: None, heat=True)
        before = compiled()
        guest = small_guest(costs, policy, run_ms=40)
        run_fleet(msgspec.structs.replace(guest, heat_path=folder + "/heat.bin"))
        late |= compiled() - before
print(sorted(late))
"""
"""A process of its own, in which no other test has compiled anything. What comes from the cache on disk counts too."""


def test_a_run_after_it_compiles_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
