"""examples/third_party_policy: installed like any package, its policy is listed and run, and conforms."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "examples" / "third_party_policy"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed, without touching ours."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SOURCE, folder / "source")  # a build writes next to its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--no-index", "--target", folder / "site", folder / "source"]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return os.environ | {"PYTHONPATH": str(folder / "site")}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_it_is_listed_beside_the_built_in_ones(environment: dict[str, str]) -> None:
    done = run(environment, "-m", "fleet", "policies", "--json")
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["lru-sample"]["view"] == "guest"
    assert {param["name"] for param in known["lru-sample"]["params"]} == {"period_ms", "sample"}
    assert {"none", "g-tpp"} <= set(known)


def test_it_runs_and_gains(environment: dict[str, str], tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'memory = "8GiB"\nscale = "1/256"\nvcpus = 2\nseconds = 0.5\n[[group]]\npolicy = "none"\n'
        '[[group]]\npolicy = "lru-sample"\nset.policy.period_ms = 2\n'
    )
    done = run(environment, "-m", "fleet", "run", str(spec), "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    none, ours = json.loads(done.stdout)["vms"]
    assert ours["policy"] == "lru-sample"
    assert ours["integrity"]["mismatches"] == 0
    assert ours["migration"]["swapped_pairs"] > 0
    assert ours["access"]["fast_ratio"] > 2 * none["access"]["fast_ratio"]
    assert ours["agent_cpu"]["measured_s"]["track"] > 0


def test_its_parameters_are_checked_like_any_other(environment: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run(
        environment, "-m", "fleet", "run", "--policy", "lru-sample", "--set", "policy.periodms=5", "--out", out
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'policy.period_ms'" in done.stderr or "period_ms" in done.stderr


def test_it_passes_the_conformance_suite(environment: dict[str, str]) -> None:
    suite = ROOT / "tests" / "guestd" / "tiering" / "test_policy.py"
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite), "-k", "lru-sample")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
