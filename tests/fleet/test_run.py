"""fleet.run: one command from flags to results, with what is printed where."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet import numba_cache, run
from proto.trace import read_trace, touched_pages

ROOT = Path(run.__file__).parent.parent
SMALL = ("--vms", "2", "--policy", "g-tpp", "--memory", "16MiB", "--transactions", "20000", "--seed", "5")


def fleet(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "run", *map(str, arguments)]
    environment = os.environ | (env or {})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_a_run_is_repeated_by_the_spec_that_it_leaves(tmp_path: Path) -> None:
    first = fleet(*SMALL, "--json", "--out", tmp_path / "first")
    assert (first.returncode, "Traceback" in first.stderr) == (0, False)
    summary = json.loads(first.stdout)
    assert summary == json.loads((tmp_path / "first" / "summary.json").read_text())
    assert summary["outcome"] == "ok"
    assert [vm["policy"] for vm in summary["vms"]] == ["g-tpp", "g-tpp"]
    again = fleet(tmp_path / "first" / "spec.toml", "--json", "--out", tmp_path / "again")
    repeated = json.loads(again.stdout)
    assert repeated["digest"] == summary["digest"]
    assert repeated["run"]["spec_digest"] == summary["run"]["spec_digest"]
    other = json.loads(fleet(*SMALL, "--json", "--out", tmp_path / "other", "--set", "host.invlpg=90ns").stdout)
    assert other["run"]["spec_digest"] != summary["run"]["spec_digest"]


def test_a_run_ends_with_table_and_figure_and_never_overwrites_another(tmp_path: Path) -> None:
    done = fleet(*SMALL, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "g-tpp" in done.stdout
    assert done.stdout.splitlines()[-1] == f"results: {tmp_path / 'out'}"
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out" / "summary.json").read_bytes()
    refused = fleet(*SMALL, "--out", tmp_path / "out")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    assert "not empty" in refused.stderr
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


@pytest.mark.parametrize("workload", ["btree", "silo", "pagerank", "bfs"])
def test_real_data_structures_run_without_a_mismatch(workload: str, tmp_path: Path) -> None:
    flags = ("--policy", "g-tpp", "--memory", "64MiB", "--vcpus", "2", "--seconds", "0.2", "--seed", "5", "--json",
             "--set", "policy.scan_delay_ms=0")  # fmt: skip
    done = fleet("--workload", workload, *flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (vm,) = json.loads(done.stdout)["vms"]
    assert vm["workload"] == workload
    assert vm["integrity"]["mismatches"] == 0
    assert vm["integrity"]["pages_checked"] == pytest.approx(16384 * 0.875, rel=0.02)
    assert 0 < vm["hotness"]["oracle_fast_ratio"] <= 1
    assert vm["access"]["stores"] > 0


# --- acceptance: whole runs of real processes, as a user starts them -------------------------------------------------

EVERY_DESIGN = """
memory = "8GiB"
scale = "1/256"
vcpus = 2
seconds = 0.6
seed = 1
[[group]]
policy = "none"
[[group]]
policy = "oracle"
[[group]]
policy = "all-fast"
[[group]]
policy = "all-slow"
[[group]]
policy = "g-tpp"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 20 }
[[group]]
vms = 2
policy = "h-tpp"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 20 }
[[group]]
policy = "hyperplace"
seconds = 0.4
set.policy = { load_period = 101, epoch_ms = 20, tau_split = 2, initial = "ram" }
"""
"""All built-in designs beside each other, each quick enough to act within a second; they end at different times."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "every_design.toml"
    path.write_text(EVERY_DESIGN)
    return path


def _copy(source: str, target: str) -> None:
    with suppress(FileNotFoundError):  # a file that another process is just writing, under a name for the time being
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def every_design(spec: Path) -> dict[str, Any]:
    """The summary of one such run, and what its cache of kernels holds then: one of its own, as other tests compile."""
    out, shared = spec.parent / "out", numba_cache.cache_directory()
    cache = spec.parent / "cache" / "tierfleet" / shared.name
    shutil.copytree(shared, cache, copy_function=_copy)
    done = fleet(spec, "--json", "--out", out, env={"XDG_CACHE_HOME": str(spec.parent / "cache")})
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (warm_ns,) = [line["time_ns"] for line in log if line["process"] == "zygote" and line["message"].startswith("warm")]
    files = [path for path in cache.rglob("*") if path.is_file()]
    summary["cache"] = {"files": len(files), "late": [path.name for path in files if path.stat().st_mtime_ns > warm_ns]}
    return summary


def by_policy(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {vm["policy"]: vm for vm in summary["vms"]}


def test_no_design_loses_content_and_every_page_is_checked(every_design: dict[str, Any]) -> None:
    assert every_design["outcome"] == "ok"
    assert every_design["errors"] == []
    for vm in every_design["vms"]:
        assert vm["integrity"]["mismatches"] == 0
        assert vm["integrity"]["pages_checked"] == (32 << 20) // 4096 * 7 // 8, "GUPS touches 7/8 of memory"
        assert vm["integrity"]["accesses_checked"] == vm["transactions"] + vm["integrity"]["pages_checked"]


def test_only_the_host_has_to_flush_whole_vms(every_design: dict[str, Any]) -> None:
    for vm in every_design["vms"]:
        assert (vm["flushes"]["remote_requests"] > 0) == (vm["policy"] == "h-tpp")
        assert vm["kvm"]["tlb_flush"] <= vm["kvm"]["remote_tlb_flush_requests"] * vm["vcpus"]
        assert vm["flushes"]["total"] == vm["flushes"]["single"] + vm["flushes"]["remote_requests"]
    found = by_policy(every_design)
    assert found["g-tpp"]["flushes"]["total"] > 0
    assert not any(found[policy]["flushes"]["total"] for policy in ("none", "oracle", "all-fast", "all-slow"))


def test_placement_pays_and_the_oracle_gains_most(every_design: dict[str, Any]) -> None:
    fast = {policy: vm["access"]["fast_ratio"] for policy, vm in by_policy(every_design).items()}
    assert fast["none"] < fast["hyperplace"] < fast["oracle"]
    assert (fast["all-slow"], fast["all-fast"]) == (0, 1)
    assert sorted(fast, key=lambda policy: fast[policy])[-2:] == ["oracle", "all-fast"]
    assert fast["none"] < fast["g-tpp"]


def test_the_ledger_of_every_guest_closes(every_design: dict[str, Any]) -> None:
    for vm in every_design["vms"]:
        cpu = vm["process_cpu"]
        assert cpu["runtime_s"] > 0
        assert cpu["residue_ratio"] <= 0.02
        parts = cpu["vcpu_s"] + cpu["agent_s"] + cpu["control_s"] + cpu["runtime_s"]
        assert parts == pytest.approx(cpu["wait4_s"], rel=0.02)


def test_no_guest_compiles_anything(every_design: dict[str, Any]) -> None:
    assert every_design["cache"]["files"] > 0
    assert every_design["cache"]["late"] == [], "written once the zygote was warm"


BUSY = "import os\nwhile os.getppid() == {parent}: pass"


def test_the_digest_does_not_depend_on_the_machine(spec: Path, every_design: dict[str, Any], tmp_path: Path) -> None:
    # All processes of the second run on one core, where somebody else is busy all the time.
    neighbour = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", BUSY.format(parent=os.getpid())])
    try:
        command = ["taskset", "-c", "0", sys.executable, "-m", "fleet", "run", str(spec), "--json"]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=True
        )
    finally:
        neighbour.kill()
        neighbour.wait()
    summary = json.loads(done.stdout)
    for mine, first in zip(summary["vms"], every_design["vms"], strict=True):
        assert mine["access"] == first["access"]
        assert mine["vmstat"] == first["vmstat"]
        assert mine["kvm"] == first["kvm"]
    assert summary["host"]["tiers"] == every_design["host"]["tiers"]
    assert summary["digest"] == every_design["digest"]


BUSY_AGENTS = """
memory = "64MiB"
vcpus = 2
seconds = 1.5
seed = 1
[[group]]
policy = "g-tpp"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 1, active_filter = false }
[[group]]
policy = "hyperplace"
set.policy = { load_period = 1, load_latency_ns = 3, store_period = 1 }
set.guest.sched_slice = "100us"
"""


def agent_cpu_ns(guest: psutil.Process) -> int | None:
    """What the kernel says of the thread named ``agent``, from outside; None once it is gone."""
    for task in Path(f"/proc/{guest.pid}/task").glob("*"):
        try:
            if (task / "comm").read_text() == "agent\n":
                return int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def test_what_the_run_says_of_its_agents_is_what_is_seen_from_outside(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(BUSY_AGENTS)
    command = [sys.executable, "-m", "fleet", "run", str(tmp_path / "spec.toml"), "--json", "--out", tmp_path / "out"]
    seen: dict[str, tuple[int, float]] = {}
    with subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE) as launched:
        family = psutil.Process(launched.pid)
        while True:
            try:
                output, _ = launched.communicate(timeout=0.02)
                break
            except subprocess.TimeoutExpired:
                pass
            for process in family.children(recursive=True):
                try:
                    title, looked_s = "".join(process.cmdline()), time.monotonic()
                    if title.startswith("fleet: vm") and (cpu := agent_cpu_ns(process)) is not None:
                        seen[title] = cpu, looked_s
                except psutil.Error:
                    continue
    ended_s = time.monotonic()
    assert launched.returncode == 0
    for vm in json.loads(output)["vms"]:
        outside_ns, looked_s = seen[f"fleet: vm{vm['id']} {vm['policy']} gups"]
        outside_s, agent_s = outside_ns / 1e9, vm["process_cpu"]["agent_s"]
        total_s = vm["agent_cpu"]["measured_s"]["total"] + vm["populate"]["agent_cpu"]["measured_s"]["total"]
        # It was seen last a while before its end, in which it cannot have used more CPU than there was time.
        assert 0 < outside_s <= agent_s <= outside_s + ended_s - looked_s
        # Of g-tpp, what its hint faults took of the vCPUs is in the total, too; the last report is before the end.
        assert total_s >= 0.95 * agent_s
        assert vm["process_cpu"]["residue_ratio"] <= 0.02
        stages = sum(vm["agent_cpu"]["measured_s"][stage] for stage in ("track", "classify", "migrate", "other"))
        assert stages == pytest.approx(vm["agent_cpu"]["measured_s"]["total"])


def test_a_killed_guest_is_reported_and_costs_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fleet", "run", "--vms", "3", "--memory", "16MiB", "--seconds", "1.5",
               "--json", "--out", str(tmp_path / "out")]  # fmt: skip
    killed = False
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launched:
        family = psutil.Process(launched.pid)
        while True:
            try:
                output, errors = launched.communicate(timeout=0.02)
                break
            except subprocess.TimeoutExpired:
                pass
            for process in [] if killed else family.children(recursive=True):
                try:
                    if "".join(process.cmdline()).startswith("fleet: vm1 ") and agent_cpu_ns(process):
                        process.kill()
                        killed = True
                except psutil.Error:
                    continue
    assert (launched.returncode, b"Traceback" in errors) == (1, False)
    summary = json.loads(output)
    assert summary["outcome"] == "failed"
    assert [(error["vm"], error["kind"]) for error in summary["errors"]] == [(1, "killed")]
    assert "SIGKILL" in summary["errors"][0]["message"]
    assert [vm["outcome"] for vm in summary["vms"]] == ["ok", "failed", "ok"]
    assert all(summary["vms"][vm]["virtual_s"] == 1.5 for vm in (0, 2))


@pytest.mark.parametrize("policy", ["g-tpp", "hyperplace"])
def test_a_trace_touches_the_pages_that_it_names(policy: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / "hot_set.trace"
    done = fleet("--policy", policy, "--workload", "trace", "--set", f"workload.file={file}", "--memory", "16MiB",
                 "--seconds", "1", "--json", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (vm,) = json.loads(done.stdout)["vms"]
    assert vm["integrity"]["mismatches"] == 0
    assert vm["integrity"]["pages_checked"] == touched_pages(read_trace(file)).size
