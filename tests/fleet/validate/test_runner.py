"""fleet.validate.runner: whole checks, small: through the command, and at two scales."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fleet.validate import experiments
from fleet.validate.claims import CLAIMS
from fleet.validate.groups import groups
from fleet.validate.runner import Report, check, cost_variants

ROOT = Path(__file__).parent.parent.parent.parent
UPDATES = 16_000_000_000
"""Of the table's VM before scale: enough for the start not to decide (docs/validation.md, What a scale keeps)."""


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "validate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(400)  # the first run of a machine compiles
def test_the_command_puts_emulated_beside_published(tmp_path: Path) -> None:
    flags: list[str | Path] = ["--scale", "1/1024", "--updates", "400000000", "--out", tmp_path]
    keys = ("time_h_over_g", "pebs_isolated", "legacy_pebs_crashes", "pml_no_filter")
    done = fleet(*flags, *(word for key in keys for word in ("--claim", key)), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "validate.json").read_text())
    judged: dict[str, dict[str, Any]] = {one["claim"]: one for one in report["judgements"]}
    assert tuple(judged) == keys
    time = judged["time_h_over_g"]
    assert time["published"] == 2.5
    assert time["ratio"] == pytest.approx(time["emulated"] / 2.5)
    assert time["low"] <= time["emulated"] <= time["high"]
    assert list(time["varied"]) == ["kick_target", "invept"]
    assert time["verdict"] == "not comparable at this scale"
    assert "updates per page (length of the run)" in time["breaks"]
    for key in keys[1:]:
        assert judged[key]["verdict"] == "agrees", judged[key]["evidence"]
    rows = {row["policy"]: row for row in report["flushes"]}
    assert set(rows) == {"h-tpp", "g-tpp"}
    assert rows["h-tpp"]["invepts"] > 0 == rows["g-tpp"]["invepts"]
    assert rows["h-tpp"]["elapsed_s"] < rows["h-tpp"]["elapsed_with_populate_s"]

    again = fleet(*flags, "--claim", "time_h_over_g", "--claim", "pml_no_filter")
    assert again.returncode == 0
    for text in ("58,697,567", "confounded by", "BROKEN", "not comparable at this scale"):
        assert text in again.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--scale", "2"), "at most 1"),
        (("--scale", "a"), "not a fraction"),
        (("--costs", "some"), "one of none, quick, all"),
        (("--claim", "flushes"), "no claim 'flushes'"),
        (("--scale", "1/4096"), "must be between 16MiB"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(tmp_path: Path, flags: tuple[str, ...], told: str) -> None:
    done = fleet(*flags, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def two_scales(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    out = tmp_path_factory.mktemp("scales")
    only = ("flushes_h_over_g", "time_h_over_g", "executions_per_request")
    return [check(experiments.plan(Fraction(1, n), UPDATES), "none", 1.0, out, only, jobs=2) for n in (512, 1024)]


@pytest.mark.timeout(400)
def test_what_survives_scaling_is_the_same_at_two_scales(two_scales: list[Report]) -> None:
    """The claims on H-TPP against G-TPP need no group that either scale breaks, but for the shortened length."""
    larger, smaller = two_scales
    for one, other in zip(larger.judgements, smaller.judgements, strict=True):
        assert one.breaks == other.breaks == ("updates per page (length of the run)",)
        assert one.emulated is not None
        assert other.emulated == pytest.approx(one.emulated, rel=0.25), one.claim


@pytest.mark.timeout(400)
def test_counts_and_times_shrink_with_the_scale(two_scales: list[Report]) -> None:
    larger, smaller = two_scales
    for one, other in zip(larger.flushes, smaller.flushes, strict=True):
        assert other.raw["total"] == pytest.approx(one.raw["total"] / 2, rel=0.25), one.policy
        assert other.elapsed_s == pytest.approx(one.elapsed_s / 2, rel=0.1), one.policy


def test_a_cost_moves_only_the_cells_that_it_can() -> None:
    plan = experiments.plan(Fraction(1, 512))
    cells = experiments.cells(plan)
    quick, every = cost_variants(CLAIMS, cells, "quick"), cost_variants(CLAIMS, cells, "all")
    assert set(quick[("invept", "low")]) == {"table/h-tpp"}
    assert set(quick) < set(every)
    for (cost, _), moved in every.items():
        for name, cell in moved.items():
            assert cell.costs != cells[name].costs, (cost, name)
    assert set(groups(plan)) >= {need for claim in CLAIMS for need in claim.needs}
