"""fleet.sweep.compare on directories whose cells were made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import SpecError
from fleet.sweep.compare import METRICS, Metric, compare_cells, metric_of, select
from fleet.sweep.store import CELLS

Rows = list[tuple[dict[str, object], int, dict[str, Any]]]
"""Axes, repetition, figures of the only VM."""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    def sweep(name: str, rows: Rows, mark: str = "alone", seed: int = 1) -> str:
        for number, (axes, repetition, vm) in enumerate(rows):
            path = tmp_path / name / CELLS / f"{number:016x}"
            path.mkdir(parents=True)
            info = {"cell": path.name, "axes": axes, "repetition": repetition, "seed": 1, "cpu_measured": mark}
            (path / "cell.json").write_text(json.dumps(info))
            run = {"seed": int(str(axes.get("seed", seed))) + repetition}
            vms = [{"id": 0} | vm, {"id": 1} | vm]
            (path / "summary.json").write_text(json.dumps({"outcome": "ok", "run": run, "vms": vms}))
            (path / "DONE").write_text("")
        return str(tmp_path / name)

    return sweep


def figures(flushes: int, cores: float) -> dict[str, Any]:
    return {"flushes": {"total": flushes}, "agent_cpu": {"measured_cores": cores}}


FLUSHES, CORES = Metric("flushes.total", "sum"), Metric("agent_cpu.measured_cores", "sum")


def test_every_metric_knows_whether_runs_repeat_it() -> None:
    assert [metric.label for metric in METRICS if not metric.deterministic] == ["sum:agent_cpu.measured_cores"]
    assert Metric("elapsed.virtual_s").deterministic
    assert not Metric("elapsed.wall_s").deterministic


def test_equal_sweeps_have_no_difference(make: Callable[..., str]) -> None:
    rows: Rows = [({"vms": n}, r, figures(10 * n + r, n + r / 7)) for n in (1, 2) for r in range(4)]
    found = compare_cells(make("a", rows), make("b", rows), (FLUSHES, CORES))
    assert (found.points, found.unmatched, found.disturbed) == (2, 0, 0)
    assert [finding.verdict for finding in found.findings] == ["no difference", "no difference"]
    assert [finding.difference.difference for finding in found.findings] == [0, 0]
    assert found.findings[1].difference.low < 0 < found.findings[1].difference.high


def test_a_deterministic_difference_is_exact_and_a_measured_one_is_tested(make: Callable[..., str]) -> None:
    a: Rows = [({"vms": n}, r, figures(100, n + r / 100)) for n in (1, 2) for r in range(3)]
    b: Rows = [({"vms": n}, r, figures(100 + n - 1, n + r / 100 + 0.5)) for n in (1, 2) for r in range(3)]
    flushes, cores = compare_cells(make("a", a), make("b", b, "shared"), (FLUSHES, CORES)).findings
    assert (flushes.pairs, flushes.equal_pairs, flushes.verdict) == (6, 3, "differs in 3 of 6")
    assert flushes.difference.difference == 1
    assert cores.verdict == "differs"
    assert cores.difference.low < 1.0 < cores.difference.high
    assert cores.difference.low > 0.9


def test_without_repetitions_the_exact_stays_exact_and_the_measured_cannot_tell(make: Callable[..., str]) -> None:
    path = make("a", [({"policy": p, "vms": 1}, 0, figures(f, f)) for p, f in (("g-tpp", 3), ("h-tpp", 30))], "shared")
    found = compare_cells(f"{path}:policy=g-tpp", f"{path}:policy=h-tpp", (FLUSHES, CORES))
    assert found.disturbed == 2
    assert [finding.exact for finding in found.findings] == [True, False]
    assert [finding.verdict for finding in found.findings] == ["differs", "cannot tell: too few repetitions"]
    assert found.findings[0].difference.difference == 54, "the sum over two VMs"


def test_without_a_seed_in_common_nothing_is_said_of_what_depends_on_it(make: Callable[..., str]) -> None:
    a, b = make("a", [({}, 0, figures(1, 1))]), make("b", [({}, 0, figures(1, 1))], seed=2)
    (found,) = compare_cells(a, b, (FLUSHES,)).findings
    assert (found.pairs, found.exact, found.verdict) == (0, False, "cannot tell: no seed in common")
    # Who selects by it wants just that.
    seeds = make("seeds", [({"seed": seed}, 0, figures(seed, 1)) for seed in (1, 2)])
    (found,) = compare_cells(f"{seeds}:seed=1", f"{seeds}:seed=2", (FLUSHES,)).findings
    assert (found.pairs, found.exact, found.verdict) == (1, True, "differs")


def test_truth_values_are_selected_as_they_are_written(make: Callable[..., str]) -> None:
    path = make("a", [({"heat": heat}, 0, figures(int(heat), 1)) for heat in (True, False)])
    assert [cell.axes for cell in select(f"{path}:heat=true")[0]] == [{"heat": True}]
    with pytest.raises(SpecError, match="no cell has heat=maybe; there are true, false"):
        select(f"{path}:heat=maybe")


def test_cells_without_a_counterpart_are_counted(make: Callable[..., str]) -> None:
    a: Rows = [({"vms": n}, 0, figures(1, 1)) for n in (1, 2, 3)]
    found = compare_cells(make("a", a), make("b", a[1:]), (FLUSHES,))
    assert (found.points, found.unmatched) == (2, 1)


def test_values_select_by_what_they_mean(make: Callable[..., str]) -> None:
    path = make("a", [({"memory": size}, 0, figures(1, 1)) for size in ("1GiB", "2GiB")])
    cells, keys = select(f"{path}:memory=1024MiB")
    assert ([cell.axes for cell in cells], keys) == ([{"memory": "1GiB"}], {"memory"})


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (":vms=9", "", "no cell has vms=9; there are 1, 2"),
        (":vmz=1", "", "did you mean 'vms'"),
        (":vms=1,policy", "", "write KEY=VALUE, not policy"),
        (":vms=1", "", "several cells are equal but for vms"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(a: str, b: str, says: str, make: Callable[..., str]) -> None:
    path = make("a", [({"vms": n}, 0, figures(1, 1)) for n in (1, 2)])
    with pytest.raises(SpecError, match=says):
        compare_cells(path + a, path + b)


def test_sweeps_over_other_axes_are_refused(make: Callable[..., str]) -> None:
    one, other = make("a", [({"vms": 1}, 0, figures(1, 1))]), make("b", [({"seed": 1}, 0, figures(1, 1))])
    with pytest.raises(SpecError, match="no point in common: vms=1 / seed=1"):
        compare_cells(one, other)


def test_metrics_by_name() -> None:
    assert metric_of("flushes.total") == FLUSHES
    assert metric_of("mean:flushes.total") == Metric("flushes.total", "mean")
    assert metric_of("sum:pebs.records") == Metric("pebs.records", "sum")
    with pytest.raises(SpecError, match="did you mean 'mean'"):
        metric_of("meen:x")
