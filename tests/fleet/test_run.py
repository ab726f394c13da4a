"""fleet.run: one command from flags to results, with what is printed where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet import run

ROOT = Path(run.__file__).parent.parent
SMALL = ("--vms", "2", "--policy", "g-tpp", "--memory", "16MiB", "--transactions", "20000", "--seed", "5")


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)  # the first run of a machine compiles
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


@pytest.mark.timeout(300)
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
