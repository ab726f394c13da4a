"""fleet.sensitivity: which costs are varied, where to, and what the command says of them."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from fleet import hosts
from fleet.errors import ProfileError, SpecError
from fleet.hosts import Profile
from fleet.sensitivity import Effect, choose, moved, variants
from fleet.spec import load

ROOT = Path(__file__).parent.parent.parent
SPEC = """
memory = "16MiB"
transactions = 20000
policy = "h-tpp"
set.policy = { scan_delay_ms = 0, scan_size_mb = 1 }
set.host.vmexit = "800ns"
"""


@pytest.fixture(scope="module")
def profile() -> Profile:
    return hosts.load_profile(hosts.DEFAULT_PROFILE)


def effect(at_low: float | None, at_default: float, at_high: float | None, failed: bool = False) -> Effect:
    return Effect("invept", "ns", 1, 2, 3, "m", at_low, at_default, at_high, "estimated", "s", failed)


def test_swing_is_the_distance_between_the_ends_as_a_share() -> None:
    assert effect(90, 100, 130).swing == pytest.approx(0.4)
    assert effect(None, 100, 130).swing == pytest.approx(0.3)
    assert (effect(0, 0, 0.01).swing, effect(0, 0, 0).swing) == (math.inf, 0)
    assert (effect(99, 100, 100.5).decides, effect(97, 100, 100).decides) == (False, True)
    assert effect(None, 100, 100, failed=True).decides
    assert not effect(None, 100, 100).decides, "an end that no engine can have"


def test_every_cost_with_a_range_is_varied(profile: Profile) -> None:
    figures = choose(profile, (), ())
    assert {figure.key for figure in figures} <= set(hosts.figure_keys())
    assert all(figure.low < figure.high for figure in figures)
    assert {"invept", "slow.curve", "slow.write_curve"} <= {figure.key for figure in figures}
    estimated = choose(profile, (), ("estimated",))
    assert {figure.grade for figure in estimated} == {"estimated"}
    (one,) = choose(profile, ("invept",), ())
    assert one.key == "invept"


@pytest.mark.parametrize(
    ("names", "grades", "told"),
    [
        (("invpt",), (), "did you mean 'invept'"),
        (("stlb_entries",), (), "is fixed at 2048 entries"),
        ((), ("guess",), "no grade 'guess'"),
    ],
)
def test_a_wrong_choice_is_refused(profile: Profile, names: list[str], grades: list[str], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        choose(profile, names, grades)


def test_each_variant_differs_in_one_cost(profile: Profile) -> None:
    experiment = load(None, {})
    cells = variants(experiment, choose(profile, (), ()), profile)
    assert cells.pop("default") is experiment
    for name, other in cells.items():
        key, end = name.split()
        figure = profile.figures[key]
        bound = figure.low if end == "low" else figure.high
        tolerance = 0.02 if figure.unit == "cycles" else 0.001
        assert hosts.in_unit(other.costs, figure, profile) == pytest.approx(float(bound), rel=tolerance), name
        changed = [
            field for field in profile.figures
            if hosts.in_unit(other.costs, profile.figures[field], profile)
            != hosts.in_unit(experiment.costs, profile.figures[field], profile)
        ]  # fmt: skip
        assert changed in ([key], [])  # [] where the default lies at the bound


def test_a_variant_read_back_is_itself_whatever_the_spec_says_of_its_cost(tmp_path: Path, profile: Profile) -> None:
    experiment = load(None, {}, ["host.invept=1us", "host.vmexit=700ns", "host.slow.latency_local=300ns"])
    cells = variants(experiment, choose(profile, (), ()), profile)
    for name, cell in cells.items():
        (tmp_path / "spec.toml").write_text(cell.to_toml())
        assert load(tmp_path / "spec.toml").digest == cell.digest, name


def test_a_curve_is_stretched_about_one(profile: Profile) -> None:
    experiment = load(None, {})
    figure = profile.figures["slow.write_curve"]
    curve = moved(experiment, figure, Fraction("0.4"), profile).costs.slow.write_curve
    assert curve == ((4, 1000), (8, 700), (16, 400))
    assert moved(experiment, figure, 1, profile).costs.slow.write_curve == ((4, 1000), (8, 1000), (16, 1000))
    with pytest.raises(ProfileError):
        moved(experiment, figure, Fraction("1.2"), profile)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "fleet", "sensitivity", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_leaves_effects_and_figures(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    flags = ("--metric", "elapsed.virtual_s", "--cost", "invept", "--cost", "ept_violation", "--cost", "pmi")
    done = command(tmp_path / "spec.toml", *flags, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    effects = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert [set(one) for one in effects] == [set(Effect.__struct_fields__)] * 3
    by_cost = {one["cost"]: one for one in effects}
    assert by_cost["ept_violation"]["at_low"] < by_cost["ept_violation"]["at_high"]
    assert by_cost["pmi"]["at_low"] == by_cost["pmi"]["at_high"] == by_cost["pmi"]["at_default"]
    assert (by_cost["invept"]["low"], by_cost["invept"]["high"], by_cost["invept"]["unit"]) == (150, 1000, "ns")
    assert "UNPUBLISHED" in done.stdout
    assert (tmp_path / "out" / "tornado.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "tornado.svg").read_text()
    again = command(tmp_path / "spec.toml", *flags, "--out", tmp_path / "out", "--json")
    assert json.loads(again.stdout) == effects
    wrong = command(tmp_path / "spec.toml", "--metric", "elapsed.virtal_s", "--cost", "pmi", "--out", tmp_path / "out")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'virtual_s'" in wrong.stderr
