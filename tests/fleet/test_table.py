"""The readable end of a run: what it says, and that it fits."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fleet.experiment import Experiment
from fleet.outcome import FleetResult
from fleet.provenance import collect
from fleet.results import RunDirectory, finish
from fleet.table import MOST_ROWS, error_lines, figure, format_cores, format_count, print_summary


@pytest.fixture
def summary(tmp_path: Path, experiment: Experiment, result: FleetResult) -> dict[str, Any]:
    directory = RunDirectory.create(tmp_path / "run", "n")
    return finish(directory, experiment, experiment.guests(), result, collect([]))


def printed(summary: dict[str, Any], width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_summary(summary, console, Path("runs/n"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def row(lines: list[str], start: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(start)]
    return line.split()


def test_a_line_per_vm(summary: dict[str, Any]) -> None:
    lines = printed(summary)
    assert row(lines, "vm0 ") == [
        "vm0", "g-tpp", "gups", "10.00", "35.0", "4350", "0", "0.036", "0.086", "0.040", "1200", "1150", "0",
    ]  # fmt: skip
    assert row(lines, "vm1 ")[1:3] == ["hyperplace", "gups"]
    assert lines[-1] == "results: runs/n"


def test_the_price_of_memory_and_a_leak_are_said(summary: dict[str, Any]) -> None:
    lines = printed(summary)
    assert "  memory: 128 MiB promised, 96 MiB backed, 94 MiB touched" in lines
    assert not [line for line in lines if line.startswith("leak")]
    summary["host"]["overcommit"]["pinned_bytes"] = 64 << 20
    summary["vms"][1]["pebs"]["foreign_records_visible"] = 77
    lines = printed(summary)
    assert "  memory: 128 MiB promised, 96 MiB backed, 64 MiB of it pinned, 94 MiB touched" in lines
    assert "leak: vm1 could read 77 PEBS records of other VMs (host.pebs=shared)" in lines


def test_large_figures_fit_100_columns_without_a_cut(summary: dict[str, Any]) -> None:
    vm = summary["vms"][1]
    vm["flushes"] = {"total": 98_765_432_109, "remote_requests": 987_654_321, "single": 0}
    vm["migration"] |= {"promoted_pages": 99_999_999, "demoted_pages": 9_999}
    vm["agent_cpu"] |= {"measured_cores": 12.345678, "modelled_cores": 123.456}
    vm["throughput_mops"] = 1234.5
    lines = printed(summary)
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if "…" in line]
    assert row(lines, "vm1 ")[3:12] == [
        "1234.50", "55.0", "98.8G", "987.7M", "12.346", "123.456", "0.050", "100.0M", "9999",
    ]  # fmt: skip


def test_a_narrow_terminal_cuts_no_figure(summary: dict[str, Any]) -> None:
    lines = printed(summary, width=60)
    assert row(lines, "vm0 ") == row(printed(summary), "vm0 ")


def test_many_vms_share_lines(summary: dict[str, Any]) -> None:
    summary["vms"] = [summary["vms"][i % 2] | {"id": i} for i in range(MOST_ROWS + 2)]
    lines = printed(summary)
    assert row(lines, f"{MOST_ROWS // 2 + 1} x g-tpp")[4:6] == ["10.00", "35.0"]
    assert not [line for line in lines if line.startswith("vm0 ")]


def test_a_vm_that_failed_stands_out_and_shows_no_figures(summary: dict[str, Any]) -> None:
    kept = ("id", "policy", "workload", "vcpus", "memory")
    summary["vms"][0] = {key: summary["vms"][0][key] for key in kept} | {"outcome": "failed"}
    summary["errors"] = [{"vm": 0, "kind": "killed", "message": "by [signal] 9", "log": ["info: last"]}]
    lines = printed(summary)
    assert row(lines, "vm0!")[3:] == ["-"] * 10
    assert "vm0 killed: by [signal] 9" in lines
    assert "    info: last" in lines


def test_last_words_of_many_lines_are_cut_from_the_front() -> None:
    error = {"vm": 3, "kind": "k", "message": "m", "log": ["info: first", "error: " + "\n\n".join("abcdefgh")]}
    assert error_lines([error]) == ["vm3 k: m", "    error: a", *(f"    {letter}" for letter in "bcdefgh")]


def test_errors_of_the_run_as_a_whole() -> None:
    assert error_lines([{"kind": "host", "message": "gone"}]) == ["run host: gone"]


def test_what_the_host_refused_is_said(summary: dict[str, Any]) -> None:
    assert not [line for line in printed(summary) if "refused" in line]
    summary["host"]["refused"] = {"malformed": 3, "replay": 0}
    assert [line for line in printed(summary) if "refused messages: 3 malformed" in line]


def test_what_the_llc_served_is_said(summary: dict[str, Any]) -> None:
    total = sum(vm["access"]["total"] for vm in summary["vms"])
    for vm, hits in zip(summary["vms"], (total // 8, total // 8), strict=True):
        vm["access"]["llc_hits"] = hits
    assert "  last-level cache: served 25.0 % of accesses" in printed(summary)
    for vm in summary["vms"]:
        del vm["access"]
    assert not [line for line in printed(summary) if "last-level" in line]


def test_a_run_without_host_prints(summary: dict[str, Any]) -> None:
    del summary["host"]
    assert not [line for line in printed(summary) if line.startswith("host")]


def test_figures_that_do_not_apply_are_none() -> None:
    assert figure({}, "access.fast_ratio") is None
    assert figure({"agent_cpu": {"stolen_s": 1.0}, "virtual_s": 0.0}, "stolen_cores") is None
    assert figure({"agent_cpu": {"stolen_s": 1.0}, "virtual_s": 4.0}, "stolen_cores") == 0.25


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9_999, "9999"), (10_000, "10.0k"), (999_999, "1.00M"), (1_234_567, "1.23M"), (123.4e6, "123.4M"),
     (58.7e9, "58.7G")],
)  # fmt: skip
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(("cores", "text"), [(0.0, "0.000"), (0.5, "0.500"), (0.00042, "420e-6")])
def test_cores(cores: float, text: str) -> None:
    assert format_cores(cores) == text


def test_the_truth_about_heat_is_told_by_policy(summary: dict[str, Any]) -> None:
    hotness = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "share_of_oracle": 0.8}
    summary["vms"][0] |= {"hotness": {"hot_set": "policy", **hotness}}
    space = {"bins_fast_ratio": 0.9, "ranges": 12, "hot_ranges": 3, "ranges_fast_ratio": 0.7}
    summary["vms"][1]["pebs"]["cpu_ns_per_sample"] = {"measured": 21.4, "modelled": 150.0}
    summary["vms"][1] |= {
        "hotness": {"hot_set": "fast node", **hotness, "precision": 1.0},
        "locality": {"gva": space, "hpa": {"bins_fast_ratio": 0.4}},
    }
    text = " ".join(printed(summary, 200))
    assert "g-tpp: of its hot set 50 % are truly hot, which is 25 % of what is; fast ratio 80 % of the oracle's" in text
    assert "hyperplace: of its pages in fast memory 100 % are truly hot" in text
    assert "hyperplace: CPU per PEBS record 21 ns measured, 150 ns modelled" in text
    assert "fit fast memory: gva 90 %, 70 % in the tree's (12 ranges); hpa 40 %" in text
