"""`fleet conformance` through the command line: what it checks, what it says, and that it can say no."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.conformance import _judge
from guestd.tiering.registry import policies
from guestd.workloads.registry import workloads

ROOT = Path(__file__).parent.parent.parent


def conformance(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "conformance", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_a_policy_is_run_alone_and_with_every_workload() -> None:
    done = conformance(
        "hyperplace", "--memory", "16MiB", "--vcpus", "1", "--seconds", "1", "--pair-memory", "16MiB", "--json"
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    (one,) = found["alone"]
    assert one["policy"] == "hyperplace"
    assert one["vm"]["integrity"]["mismatches"] == 0
    assert {pair["workload"] for pair in found["pairs"]} == set(workloads())
    assert all(pair["ok"] for pair in found["pairs"])


def test_what_breaks_a_law_is_named() -> None:
    cpu = {"track": 1.0, "classify": 0.0, "migrate": 1.0}
    vm = {
        "outcome": "ok",
        "integrity": {"mismatches": 3},
        "agent_cpu": {"modelled_s": cpu, "measured_s": cpu | {"migrate": 0.0}},
        "memory": {"fast_bytes": 1, "total_bytes": 5},
        "access": {"fast_ratio": 0.1},
    }
    tiers = [{"name": "DDR", "peak": 11, "frames": 10}]
    summary = {"errors": [], "vms": [vm], "host": {"tiers": tiers}}
    broken = _judge(policies()["hyperplace"], summary, True).broken
    for number, word in enumerate(("content", "DDR", "migrate", "at random")):
        assert word in broken[number]
    assert len(broken) == 4


def test_an_unknown_policy_is_refused() -> None:
    done = conformance("hyperplane")
    assert done.returncode == 2
    assert "did you mean 'hyperplace'" in done.stderr
