"""fleet.names: the nearest valid name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.names import nearest, unknown

POLICIES = ("none", "oracle", "g-tpp", "h-tpp", "hyperplace")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("gtpp", "g-tpp"), ("G_TPP", "g-tpp"), ("hyperplaec", "hyperplace"), ("non", "none"), ("hyp", "hyperplace")],
)
def test_a_slip_finds_its_name(typed: str, meant: str) -> None:
    assert nearest(typed, POLICIES) == meant
    assert unknown("policy", typed, POLICIES) == f"no policy {typed!r}; did you mean {meant!r}?"


def test_without_a_near_name_all_are_listed() -> None:
    assert nearest("zzz", POLICIES) is None
    assert unknown("policy", "zzz", POLICIES).endswith("choose from g-tpp, h-tpp, hyperplace, none, oracle")
    assert unknown("policy", "zzz", ()) == "no policy 'zzz'; there is none to choose from"


@given(st.text(max_size=20), st.sets(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), max_size=30))
def test_only_a_valid_name_is_ever_suggested(typed: str, valid: set[str]) -> None:
    found = nearest(typed, valid)
    assert found is None or found in valid
    assert "\n" not in unknown("name", typed, valid)
