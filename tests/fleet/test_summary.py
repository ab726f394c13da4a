"""The digest covers what it names and nothing else; the assembled summary is of the form and knows what failed."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.experiment import Experiment
from fleet.outcome import FleetResult
from fleet.schema import check
from fleet.summary import DETERMINISTIC_KEYS, assemble, digest, elapsed, vm_entry
from proto.config import GuestConfig

RUN = {
    "argv": ["fleet", "run"], "name": "n", "spec_digest": "sha256:0", "seed": 1, "clock": "virtual", "scale": 1.0,
    "host_profile": "h", "started": "2026-01-01T00:00:00+00:00", "version": "0",
}  # fmt: skip

UNCERTAIN = ("measured", "wall", "rss", "private", "rtt", "refused", "argv", "process_cpu", "floor", "realtime",
             "hypercalls_per_s", "slip", "run.", "errors", "by_vm.0.id", "by_vm.1.id")  # fmt: skip
"""Parts of a path that this machine's clock, scheduler or command line can move."""


@pytest.fixture
def summary(experiment: Experiment, result: FleetResult) -> dict[str, Any]:
    vms = [vm_entry(guest, result.reports[guest.vm], "ok") for guest in experiment.guests()]
    return assemble(
        run=RUN, outcome="ok", errors=[], vms=vms, host=result.host, times=elapsed(vms, 2.0, {"compile_s": 0.5})
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, container, key) of every leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        here = f"{path}.{key}" if path else str(key)
        if isinstance(below, dict | list):
            yield from leaves(below, here)
        else:
            yield here, value, key


def test_is_of_the_form(summary: dict[str, Any]) -> None:
    checked = check(summary)
    assert checked.outcome == "ok"
    assert checked.elapsed.realtime_factor == pytest.approx(1.1 / 2.0)
    assert summary["digest"] == digest(summary)
    assert list(summary)[:6] == ["schema", "run", "outcome", "errors", "digest", "elapsed"]
    assert next(iter(summary["run"])) == "name"


def test_digest_moves_with_every_figure_that_is_deterministic_and_with_no_other(summary: dict[str, Any]) -> None:
    covered = 0
    for path, _, _ in list(leaves(summary)):
        changed = copy.deepcopy(summary)
        for here, container, key in leaves(changed):
            if here == path:
                container[key] = "changed" if isinstance(container[key], str) else container[key] + 1
        moved = digest(changed) != summary["digest"]
        uncertain = (
            path in ("digest", "schema") or path.endswith("compile_s") or any(word in path for word in UNCERTAIN)
        )
        assert moved is not uncertain, path
        covered += moved
    assert covered > 80


def test_digest_ignores_the_order_of_keys(summary: dict[str, Any]) -> None:
    reverse = {key: summary[key] for key in reversed(summary)}
    reverse["vms"] = [{key: vm[key] for key in reversed(vm)} for vm in summary["vms"]]
    assert digest(reverse) == summary["digest"]


def test_digest_tells_vms_apart(summary: dict[str, Any]) -> None:
    assert digest(summary | {"vms": summary["vms"][::-1]}) != summary["digest"]


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.lists(st.integers(), max_size=2), max_size=3))
def test_patterns(record: dict[str, Any]) -> None:
    whole = digest(record, ["a", "b", "c", "a.**", "b.**", "c.**"])
    assert whole == digest(record, ["*", "*.*"])
    assert (digest(record, ["a.**"]) == digest({}, ["a"])) is not bool(
        isinstance(record.get("a"), list) and record["a"]
    )


def test_no_pattern_names_a_measured_figure() -> None:
    assert not [key for key in DETERMINISTIC_KEYS if any(word in key for word in UNCERTAIN)]


def test_a_guest_without_a_report_is_what_it_was_meant_to_be(experiment: Experiment) -> None:
    guest = experiment.guests()[1]
    entry = vm_entry(guest, None, "failed")
    assert (entry["id"], entry["policy"], entry["outcome"]) == (1, "hyperplace", "failed")
    assert entry["memory"] == {"total_bytes": 64 << 20, "fast_bytes": 16 << 20, "slow_bytes": 48 << 20}
    assert "access" not in entry


def test_a_mismatch_fails_the_vm_and_the_run(
    experiment: Experiment, make_report: Callable[[GuestConfig], dict[str, Any]]
) -> None:
    guest = experiment.guests()[0]
    report = make_report(guest)
    report["integrity"]["mismatches"] = 3
    vms = [vm_entry(guest, report, "ok")]
    summary = assemble(run=RUN, outcome="ok", errors=[], vms=vms, host={}, times=elapsed(vms, 1.0, {}))
    assert summary["outcome"] == vms[0]["outcome"] == "failed"
    assert [(error["vm"], error["kind"]) for error in summary["errors"]] == [(0, "integrity")]
    assert "host" not in summary
    check(summary)


def test_an_interrupted_run_stays_interrupted() -> None:
    errors = [{"kind": "died", "message": "it did", "vm": 0}]
    summary = assemble(run=RUN, outcome="interrupted", errors=errors, vms=[], host={}, times=elapsed([], 0.0, {}))
    assert summary["outcome"] == "interrupted"
    assert summary["elapsed"] == {"virtual_s": 0.0, "populate_virtual_s": 0.0, "wall_s": 0.0, "realtime_factor": 0.0}


def test_the_keys_are_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "output.md").read_text()
    assert "\n".join(["```", *DETERMINISTIC_KEYS, "```"]) in documented
