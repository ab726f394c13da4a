"""`fleet results` and `fleet compare` on a real sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from fleet.cli import main
from fleet.sweep.store import load


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return call


@pytest.mark.timeout(600)
def test_results_are_listed_shown_and_asked(undisturbed: Path, say: Any) -> None:
    code, out, _ = say("results", "ls", undisturbed.parent)
    assert code == 0
    assert any(line.split()[:3] == ["undisturbed", "sweep", "3"] for line in out.splitlines())
    code, out, _ = say("results", "show", undisturbed)
    assert (code, "3 done" in out) == (0, True)
    cells = load(undisturbed)
    for cell in cells:
        assert cell.hash[:8] in out
    code, out, _ = say("results", "show", undisturbed, "--cell", cells[2].hash[:6], "--json")
    assert json.loads(out) == cells[2].summary
    code, out, _ = say("results", "show", cells[0].path)
    assert (code, "g-tpp" in out) == (0, True)
    sql = 'select vms, policy, sum("access.total")::bigint as n from results group by all order by all'
    code, out, _ = say("results", "query", undisturbed, sql, "--json")
    summaries = {(cell.axes["vms"], cell.axes["policy"]): cell.summary or {} for cell in cells}
    assert json.loads(out) == [
        {"vms": vms, "policy": policy, "n": sum(vm["access"]["total"] for vm in summary["vms"])}
        for (vms, policy), summary in sorted(summaries.items())
    ]
    sql = "select count(distinct cell) as cells, count(distinct vm) as vms from intervals"
    assert json.loads(say("results", "query", undisturbed, sql, "--json")[1]) == [{"cells": 3, "vms": 2}]
    assert json.loads(say("results", "query", cells[0].path, "select count(*) n from results", "--json")[1]) == [
        {"n": 1}
    ]


@pytest.mark.timeout(600)
def test_policies_of_a_sweep_are_compared(undisturbed: Path, say: Any) -> None:
    sides = [f"{undisturbed}:policy={policy}" for policy in ("none", "g-tpp")]
    code, out, _ = say("compare", *sides, "--json")
    assert code == 0
    found = {line["metric"]: line for line in json.loads(out)["metrics"]}
    assert found["sum:agent_cpu.modelled_cores"]["verdict"] == "differs"
    assert found["sum:agent_cpu.modelled_cores"]["exact"]
    assert found["sum:agent_cpu.measured_cores"]["verdict"].startswith("cannot tell")
    code, out, _ = say("compare", undisturbed, undisturbed)
    assert (code, out.count("no difference"), "3 points compared" in out) == (0, 9, True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("results", "ls", "nowhere"), "no such directory"),
        (("results", "show", "nowhere"), "neither a sweep nor a run"),
        (("results", "query", "{}", "selec"), "SQL: Parser Error"),
        (("results", "query", "{}", ""), "it asks for nothing"),
        (("results", "query", "{}", "select 1 as a, 2 as a"), "several columns are called a"),
        (("results", "show", "{}", "--cell", "zz"), "no cell"),
        (("compare", "{}", "{}", "--metric", "flushes.totl"), "neither side has it"),
        (("compare", "{}:policy=nun", "{}"), "no cell has policy=nun"),
        (("compare", "{}:vms=1e99999999", "{}"), "no cell has vms=1e99999999"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], says: str, undisturbed: Path, say: Any) -> None:
    code, out, err = say(*(argument.replace("{}", str(undisturbed)) for argument in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
