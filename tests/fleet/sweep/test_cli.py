"""`fleet sweep --dry-run`, and what is refused before anything starts. Real sweeps: test_run."""

import json
from pathlib import Path

import pytest

from fleet.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code, *capsys.readouterr()


def test_a_dry_run_lists_the_cells_and_says_what_its_estimate_rests_on(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "sweep", tiny, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert [line.split("  ")[-1] for line in out.splitlines()[:-1]] == [
        "vms=1 policy=g-tpp",
        "vms=1 policy=none",
        "vms=2 policy=g-tpp",
    ]
    assert out.splitlines()[-1].startswith("3 cells, 3 to run, about ")
    assert "assumed" in out
    assert not (tmp_path / "out").exists()
    plan = json.loads(call(capsys, "sweep", tiny, "--out", tmp_path / "out", "--dry-run", "--json")[1])
    assert [cell["axes"]["vms"] for cell in plan["cells"]] == [1, 1, 2]
    assert plan["estimate_s"] == pytest.approx(sum(cell["estimate_s"] for cell in plan["cells"]))
    assert (plan["rate_source"], {cell["status"] for cell in plan["cells"]}) == ("assumed", {"missing"})


@pytest.mark.timeout(600)
def test_a_dry_run_knows_what_is_done_and_how_fast_it_was(
    tiny: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads(call(capsys, "sweep", tiny, "--out", undisturbed, "--dry-run", "--json")[1])
    assert {cell["status"] for cell in plan["cells"]} == {"done"}
    assert (plan["estimate_s"], plan["rate_source"]) == (0, "measured on 3 cells")


def test_what_holds_no_sweep_is_not_written_to(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("")
    code, out, err = call(capsys, "sweep", tiny, "--out", tmp_path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "choose another --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
