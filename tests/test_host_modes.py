"""The host's modes through the command line: PEBS that kills, memory that is pinned, a buffer that leaks, PML, swap."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SPEC = """
memory = "16MiB"
seconds = 0.1
[[group]]
policy = "hyperplace"
vcpus = 2
set.policy = { load_period = 29, store_period = 101, load_latency_ns = 3, epoch_ms = 100 }
[[group]]
policy = "none"
"""
"""A VM that samples and one that does not."""


def fleet(folder: Path, *settings: str, spec: str = SPEC) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The command's result and the summary that it left."""
    (folder / "spec.toml").write_text(spec)
    flags = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "fleet", "run", str(folder / "spec.toml"), *flags, "--out", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    path = folder / "out" / "summary.json"
    return done, json.loads(path.read_text()) if path.exists() else None


LEGACY = ("host.pebs=legacy", "guest.ds_prefault=false")
SLOWLY = SPEC.replace("load_period = 29, store_period = 101", "load_period = 257, store_period = 1009")
"""A buffer page is idle for longer than the swap thread takes to come round (10 ms); nothing drains it before."""
DEATHS = {
    "lazy buffer": (SPEC, LEGACY),
    "swapped out": (SLOWLY, ("host.pebs=legacy", "host.swap_pages_per_s=400000", "guest.sched_slice=50ms")),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", DEATHS)
def test_legacy_pebs_kills_the_vm_whose_record_meets_an_ept_violation_and_no_other(how: str, tmp_path: Path) -> None:
    """Of a buffer that the guest's kernel never touched, and of a stock guest's that the host has swapped out."""
    spec, settings = DEATHS[how]
    done, summary = fleet(tmp_path, *settings, spec=spec)
    assert done.returncode == 1
    (error,) = summary["errors"]
    assert (error["vm"], error["kind"]) == (0, "pebs_ept_violation")
    assert "gPA 0x" in error["message"] and "host.populate=true" in error["message"]
    assert [(vm["outcome"], vm.get("virtual_s")) for vm in summary["vms"]] == [("failed", None), ("ok", 0.1)]
    assert "vm0 pebs_ept_violation" in done.stdout


@pytest.mark.timeout(400)
def test_populating_prevents_it_at_the_price_of_overcommit(tmp_path: Path) -> None:
    spec = SPEC + "set.workload.footprint = 0.25\n"
    done, summary = fleet(tmp_path, *LEGACY, "host.populate=true", "host.swap_pages_per_s=400000", spec=spec)
    assert done.returncode == 0
    memory, overcommit = [vm["memory"] for vm in summary["vms"]], summary["host"]["overcommit"]
    assert [one["backed_bytes"] for one in memory] == [one["pinned_bytes"] for one in memory] == [16 << 20] * 2
    assert memory[1]["touched_bytes"] < 5 << 20, "a quarter, and its page tables"
    assert overcommit["ratio"] == 1.0
    assert overcommit["backed_bytes"] == overcommit["pinned_bytes"] == 32 << 20 > overcommit["touched_bytes"]
    assert "32 MiB promised, 32 MiB backed, 32 MiB of it pinned" in done.stdout
    assert summary["vms"][0]["pebs"]["ept_violations"] == 0


@pytest.mark.timeout(400)
def test_the_default_loses_no_record_to_a_violation_and_shows_no_leak(tmp_path: Path) -> None:
    done, summary = fleet(tmp_path, "guest.ds_prefault=false", "host.swap_pages_per_s=400000")
    assert done.returncode == 0
    sampling, quiet = summary["vms"]
    assert sampling["pebs"]["ept_violations"] > 0
    assert sampling["swap"]["out_pages"] > 0 < sampling["swap"]["in_pages"]
    assert [vm["integrity"]["mismatches"] for vm in summary["vms"]] == [0, 0]
    assert "foreign_records_visible" not in sampling["pebs"] and "pebs" not in quiet
    assert "leak" not in done.stdout
    # The law of the summary, for each event and vCPU.
    assert len(sampling["pebs"]["vcpus"]) == 2
    for events in (sampling["pebs"]["events"], *sampling["pebs"]["vcpus"]):
        assert set(events) == {"load_latency", "stores"}
    for events in sampling["pebs"]["vcpus"]:
        for one in events.values():
            assert one["records"] == one["events"] // one["period"] - one["dropped"] > 0
    for name, total in sampling["pebs"]["events"].items():
        for key in ("events", "records", "dropped"):
            assert total[key] == sum(events[name][key] for events in sampling["pebs"]["vcpus"])


@pytest.mark.timeout(400)
def test_a_shared_buffer_shows_its_leak(tmp_path: Path) -> None:
    done, summary = fleet(tmp_path, "host.pebs=shared")
    assert done.returncode == 0
    sampling, quiet = summary["vms"]
    assert sampling["pebs"]["foreign_records_visible"] == 0, "the other one leaves no records"
    assert quiet["pebs"]["foreign_records_visible"] > 100
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("leak:")]
    assert f"vm1 could read {quiet['pebs']['foreign_records_visible']} PEBS records of other VMs" in line


@pytest.mark.timeout(400)
def test_logging_of_dirty_pages_is_told(tmp_path: Path) -> None:
    done, summary = fleet(tmp_path, "host.pml=true", "host.pml_harvest=20ms")
    assert done.returncode == 0
    for vm in summary["vms"]:
        assert vm["pml"]["entries"] >= vm["pml"]["harvested_pages"] > 4096 * 7 // 8
        assert 0 < vm["pml"]["useless_ratio"] < 0.1
        assert vm["pml"]["full_exits"] > 0
        assert vm["kvm"]["remote_tlb_flush_requests"] >= 4


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("host.pebs=legasy", "did you mean 'legacy'"),
        ("host.populat=true", "did you mean 'populate'"),
        ("host.pml_harvest=-1", "must be at least 0"),
    ],
)
def test_a_mode_that_is_none_is_refused(setting: str, answer: str, tmp_path: Path) -> None:
    done, summary = fleet(tmp_path, setting)
    assert (done.returncode, done.stdout, summary) == (2, "", None)
    assert answer in done.stderr and len(done.stderr.splitlines()) == 1
