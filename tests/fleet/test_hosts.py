"""fleet.hosts: profiles are complete, consistent and say where each figure is from; overrides do what they say."""

import json
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet import hosts
from fleet.errors import ProfileError
from proto.costs import Costs, copy_ps


@pytest.fixture
def base() -> hosts.Profile:
    return hosts.load_profile("xeon-8360y-optane")


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", hosts.profile_names())
def test_a_shipped_profile_gives_every_cost_with_evidence_within_its_range(name: str) -> None:
    profile = hosts.load_profile(name)
    assert profile.name == name
    assert tuple(profile.figures) == hosts.figure_keys()
    for figure in profile.figures.values():
        assert figure.source
        assert figure.grade in hosts.GRADES
        highest = figure.value[-1][1] if isinstance(figure.value, tuple) else figure.value
        assert figure.low <= highest <= figure.high
    costs = hosts.costs(profile)
    assert isinstance(costs, Costs)
    assert costs.fast.latency_random_ps < costs.slow.latency_random_ps
    assert costs.fast.read_bandwidth > costs.slow.read_bandwidth
    assert copy_ps(costs, False, False) <= copy_ps(costs, True, False)
    # What is closer to the core is smaller and faster, and what does more costs more.
    assert costs.l1_dtlb_4k_entries < costs.stlb_entries
    assert costs.l2_bytes < costs.llc_bytes
    assert costs.walk_cached_ref_ps < costs.llc_latency_ps < costs.fast.latency_random_ps
    assert costs.invlpg_ps < costs.invpcid_addr_ps
    assert costs.invvpid_context_ps <= costs.invept_ps
    assert costs.mmu_lock_hold_ps < costs.ept_violation_ps < costs.ept_violation_alloc_ps
    assert costs.populate_page_ps < costs.ept_violation_alloc_ps < costs.swap_out_ps < costs.swap_in_ps
    assert costs.clear_page_huge_ps < 512 * costs.populate_page_ps
    assert costs.fast.write_curve[-1][1] >= costs.slow.write_curve[-1][1]


def test_each_core_has_its_own_tlbs() -> None:
    def tlbs(name: str) -> tuple[int, ...]:
        costs = hosts.costs(hosts.load_profile(name))
        return (costs.l1_dtlb_4k_entries, costs.l1_dtlb_4k_ways, costs.stlb_entries, costs.stlb_ways,
                costs.stlb_2m_ways)  # fmt: skip

    assert tlbs("xeon-8360y-optane") == (64, 4, 2048, 16, 8)
    assert tlbs("sapphire-rapids-ddr5-cxl") == tlbs("sapphire-rapids-remote-dram") == (96, 6, 2048, 16, 16)
    assert tlbs("genoa-ddr5-cxl") == (72, 9, 3072, 24, 24)


def test_the_published_figures_of_the_demeter_host_arrive_in_the_contracts_units(base: hosts.Profile) -> None:
    costs = hosts.costs(base)
    assert costs.fast.latency_random_ps == 68_700
    assert costs.slow.latency_local_ps == 176_600
    assert costs.slow.latency_random_ps == 300_000
    assert costs.slow.read_bandwidth == 21_414_500_000
    assert costs.slow.granule_bytes == 256
    assert costs.invept_ps == 500_000
    # 7 cycles at 3.0 GHz.
    assert costs.stlb_hit_ps == round(Fraction(7_000_000, 3_000))
    assert costs.fast.curve[:2] == ((0, 1000), (250, 1130))
    assert costs.slow.write_curve == ((4, 1000), (8, 800), (16, 600))
    assert costs.fast.write_curve == ((1, 1000),)
    assert costs.llc_bytes == 54 << 20


def test_unpublished_costs_say_so(base: hosts.Profile) -> None:
    for key in ("invept", "drain_record", "classify_record", "pmi", "load_latency_tag_interval"):
        assert base.figures[key].grade == "estimated"
        assert "npublished" in base.figures[key].source


def test_an_override_replaces_one_cost_and_nothing_else(base: hosts.Profile) -> None:
    costs = hosts.costs(base)
    changed = hosts.override(costs, "invept", "600ns", base)
    assert changed.invept_ps == 600_000
    assert hosts.override(changed, "invept", "0.5us", base) == costs
    assert hosts.override(costs, "slow.latency_random", "250 ns", base).slow.latency_random_ps == 250_000
    assert hosts.override(costs, "stlb_hit", "3cycles", base).stlb_hit_ps == 1000
    assert hosts.override(costs, "shootdown_base", "0", base).shootdown_base_ps == 0


@given(key=st.sampled_from([key for key in hosts.figure_keys() if not key.endswith("curve")]))
def test_a_cost_written_exactly_is_read_back_without_a_profile(key: str) -> None:
    costs = hosts.costs(hosts.load_profile("sapphire-rapids-ddr5-cxl"))
    assert hosts.override(costs, key, hosts.exact(costs, key), None) == costs


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("invpet", "600ns", "did you mean 'invept'"),
        ("invept", "600 sec", "one of ps, ns, us, ms, cycles"),
        ("invept", "fast", "write e.g. '500 ns'"),
        ("invept", "-3ns", "write e.g."),
        ("slow.curve", "1", "profile file of your own"),
        ("slow.write_curve", "1", "profile file of your own"),
        ("stlb_ways", "3", "power of two"),
        ("l1_dtlb_4k_entries", "65", "l1_dtlb_4k_entries 65 over l1_dtlb_4k_ways 4 must give a power of two"),
        ("l1_dtlb_2m_ways", "64", "must give a power of two"),
        ("stlb_ways", "64", "stlb_ways 64 must be at most 32"),
        ("stlb_2m_ways", "17", "stlb_2m_ways 17 must be at most stlb_ways, 16"),
        ("pdpte_cache_entries", "6", "pdpte_cache_entries must be 4 times a power of two"),
        ("nested_tlb_entries", "2", "nested_tlb_entries must be 4 times a power of two"),
        ("stlb_entries", "0", "between 1 and"),
        ("invept", "1" * 5000, "write e.g."),
        ("invept", "9" * 25 + "ns", "between 0 and"),
        ("invept", "9", "has no unit; write e.g. '500 ns'"),
        ("slow.granule_bytes", "100B", "must be one of (64, 128, 256, 512)"),
    ],
)
def test_a_bad_override_is_refused_with_what_would_be_right(
    base: hosts.Profile, key: str, text: str, says: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        hosts.override(hosts.costs(base), key, text, base)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_of_ones_own_extends_a_shipped_one(tmp_path: Path, base: hosts.Profile) -> None:
    name = write(
        tmp_path,
        """
        extends = "xeon-8360y-optane"
        [costs.invept]
        value = 333
        unit = "ns"
        range = [300, 400]
        source = "our own lab"
        grade = "measured"
        """,
    )
    mine = hosts.load_profile(name)
    assert mine.name == "mine"
    expected = hosts.override(hosts.costs(base), "invept", "333ns", base)
    assert hosts.costs(mine) == expected
    assert hosts.digest(mine) != hosts.digest(base)


def test_a_renamed_tier_must_be_given_whole(tmp_path: Path) -> None:
    # Otherwise a new memory would silently inherit the granule and the curve of the old one.
    name = write(tmp_path, 'extends = "xeon-8360y-optane"\n[slow]\nname = "my memory"\n')
    with pytest.raises(ProfileError, match=r"'slow.latency_random' is missing \(7 missing"):
        hosts.load_profile(name)


FIGURE = '[costs.invept]\nvalue = 500\nunit = "ns"\nrange = [150, 1000]\nsource = "x"\ngrade = "estimated"\n'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("500", "5000"), "outside its own range"),
        (('"ns"', '"parsec"'), "no unit 'parsec'"),
        (('"estimated"', '"guessed"'), "no grade 'guessed'"),
        (('source = "x"\n', ""), "'source' is missing"),
        (('source = "x"', 'source = " "'), "source must say"),
        (("[150, 1000]", "150"), "range must be [lowest, highest]"),
        (("value", "valeu"), "did you mean 'value'"),
        (("costs.invept", "costs.invpet"), "did you mean 'invept'"),
        (("500", "-500"), "not below 0"),
        (("500", "true"), "must be a number"),
        (("500", "nan"), "must be a number"),
        (("500", "1e999999999"), "must be a number"),
        (("[150", "[1e-999999999"), "range must be"),
        (("[costs.invept]", "[cost.invept]"), "did you mean 'costs'"),
    ],
)
def test_a_broken_figure_is_refused_by_name(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    name = write(tmp_path, 'extends = "xeon-8360y-optane"\n' + FIGURE.replace(*change))
    with pytest.raises(ProfileError) as caught:
        hosts.load_profile(name)
    assert says in str(caught.value)
    assert "'mine'" in str(caught.value)


@pytest.mark.parametrize(
    "value", ["[[0, 1], [1, 0.5]]", "[[0.1, 1], [1, 3.5]]", "[[0, 1]]", "[[0, 1], [0, 3.5]]", "3.5"]
)
def test_a_curve_that_does_not_rise_from_idle_is_refused(tmp_path: Path, value: str) -> None:
    text = f'[slow.curve]\nvalue = {value}\nunit = "factor"\nrange = [0, 9]\nsource = "x"\ngrade = "estimated"\n'
    with pytest.raises(ProfileError, match=r"slow\.curve"):
        hosts.load_profile(write(tmp_path, 'extends = "xeon-8360y-optane"\n' + text))


@pytest.mark.parametrize(
    "value",
    ["[[4, 0.9]]", "[]", "[[1, 1], [2, 1.1]]", "[[4, 1], [4, 0.8]]", "[[4, 1], [8, 0]]", "[[0.5, 1]]", "[4, 1]", "1"],
)
def test_a_write_curve_that_does_not_fall_from_one_is_refused(tmp_path: Path, value: str) -> None:
    text = f'[slow.write_curve]\nvalue = {value}\nunit = "factor"\nrange = [0, 9]\nsource = "x"\ngrade = "estimated"\n'
    with pytest.raises(ProfileError, match=r"slow\.write_curve"):
        hosts.load_profile(write(tmp_path, 'extends = "xeon-8360y-optane"\n' + text))


@pytest.mark.parametrize(
    ("curve", "value"), [("curve", ((0, 1000),)), ("write_curve", ()), ("write_curve", ((4, 1000), (8, 1001)))]
)
def test_resolved_curves_are_checked_too(base: hosts.Profile, curve: str, value: tuple[tuple[int, int], ...]) -> None:
    costs = hosts.costs(base)
    broken = msgspec.structs.replace(costs, slow=msgspec.structs.replace(costs.slow, **{curve: value}))
    with pytest.raises(ProfileError, match=rf"mine: slow\.{curve} must start at"):
        hosts.checked(broken, "mine")


def test_a_profile_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('extends = "mine.toml"\n')
    with pytest.raises(ProfileError, match="extends itself through mine -> other -> mine"):
        hosts.load_profile(write(tmp_path, 'extends = "other.toml"\n'))


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(ProfileError, match="did you mean 'xeon-8360y-optane'"):
        hosts.load_profile("Xeon_8360Y_optan")
    with pytest.raises(ProfileError, match="no such file"):
        hosts.load_profile("nowhere/mine.toml")


def test_the_description_is_plain_data(base: hosts.Profile) -> None:
    described = json.loads(json.dumps(hosts.describe(base)))
    assert described["figures"]["invept"] == {
        "value": 500,
        "unit": "ns",
        "range": [150, 1000],
        "source": base.figures["invept"].source,
        "grade": "estimated",
    }
