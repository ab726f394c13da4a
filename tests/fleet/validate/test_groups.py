"""fleet.validate.groups: what a scale keeps and breaks."""

from fractions import Fraction

from fleet.validate import experiments as e
from fleet.validate import groups as g


def test_at_full_size_with_the_assumed_updates_every_group_is_kept() -> None:
    found = g.groups(e.plan(Fraction(1), e.TABLE_UPDATES))
    assert all(group.kept and group.full == group.here for group in found.values())


def test_fewer_updates_break_the_length_and_nothing_else() -> None:
    found = g.groups(e.plan(Fraction(1)))
    assert {name for name, group in found.items() if not group.kept} == {g.LENGTH}


def test_a_small_scale_keeps_shares_and_rates_and_breaks_windows_and_bytes() -> None:
    found = g.groups(e.plan(Fraction(1, 512)))
    kept = {name for name, group in found.items() if group.kept}
    assert {g.FAST_SHARE, g.HOT_SHARE, g.CACHE, g.LENGTH, g.SCAN_RATE, g.EPOCHS, g.SAMPLES, g.REACH, g.QUOTA} <= kept
    assert {g.PASS, g.SAMPLING_RATE, g.FLOOR}.isdisjoint(kept)


def test_a_group_beyond_its_bound_is_kept_however_far_it_moves() -> None:
    reach = g.groups(e.plan(Fraction(1, 512)))[g.REACH]
    assert reach.kept
    assert reach.here < reach.full / 10
    assert g.groups(e.plan(Fraction(1, 256)))[g.FLOOR].kept
    tiny = g.groups(e.plan(Fraction(1, 4096)))[g.REACH]
    assert not tiny.kept
