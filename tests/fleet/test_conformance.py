"""`fleet conformance` through the command line: what it checks, what it says, and that it can say no."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from fleet.conformance import _end_fast_ratio, _judge
from guestd.tiering.registry import policies
from guestd.workloads.registry import workloads

ROOT = Path(__file__).parent.parent.parent


def conformance(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "conformance", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_policy_is_run_alone_and_with_every_workload() -> None:
    words = "hyperplace --memory 16MiB --vcpus 1 --seconds 1 --longest 1 --pair-memory 16MiB --json"
    done = conformance(*words.split())
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    (one,) = found["alone"]
    assert one["policy"] == "hyperplace"
    assert one["vm"]["integrity"]["mismatches"] == 0
    assert one["excuse"] == "gains after 15 virtual s"
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
    broken = _judge(policies()["hyperplace"], summary, _series([50] * 4), "").broken
    for number, word in enumerate(("content", "DDR", "migrate", "at random")):
        assert word in broken[number]
    assert len(broken) == 4
    excused = _judge(policies()["hyperplace"], summary, _series([50] * 4), "gains after 90 virtual s")
    assert len(excused.broken) == 3
    assert excused.excuse == "gains after 90 virtual s"


def _series(fast: list[int]) -> pa.Table:
    """Rows of timeseries.parquet, a second each with 1000 accesses, after 2 s of populating."""
    return pa.table({
        "time_s": [2.0, *(3.0 + second for second in range(len(fast)))],
        "phase": ["populate"] + ["run"] * len(fast),
        "access.fast": [500, *fast],
        "access.total": [1000] * (1 + len(fast)),
    })  # fmt: skip


def test_the_gain_is_that_of_the_end() -> None:
    assert _end_fast_ratio(_series([0, 100, 0, 0, 0, 0, 400, 600])) == 0.5
    assert _end_fast_ratio(_series([300])) == 0.3
    assert _judge_gain([0] * 6 + [400, 600]) == []
    assert "50.0% at the end; at random it would be 60.0%" in _judge_gain([0] * 6 + [400, 600], random=0.6)[0]


def _judge_gain(fast: list[int], random: float = 0.2) -> list[str]:
    cpu = {"track": 1.0, "classify": 1.0, "migrate": 1.0}
    vm = {
        "outcome": "ok",
        "integrity": {"mismatches": 0},
        "agent_cpu": {"modelled_s": cpu, "measured_s": cpu},
        "memory": {"fast_bytes": 1000 * random, "total_bytes": 1000},
    }
    summary = {"errors": [], "vms": [vm], "host": {"tiers": []}}
    return _judge(policies()["hyperplace"], summary, _series(fast), "").broken


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--vcpus 0", "--vcpus"),
        ("--longest -1", "--longest"),
        ("--memory 1", "--memory: memory: 1 is not"),
        ("--pair-memory 1KiB", "--pair-memory: memory: 1KiB is not"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(words: str, says: str) -> None:
    done = conformance("none", *words.split())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert says in done.stderr


def test_an_unknown_policy_is_refused() -> None:
    done = conformance("hyperplane")
    assert done.returncode == 2
    assert "did you mean 'hyperplace'" in done.stderr
