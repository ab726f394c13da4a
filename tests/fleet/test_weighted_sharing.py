"""Fast memory that VMs share by weight: laws of weighted max-min fairness, and what a spec makes of it."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fleet.spec import load
from fleet.weighted_sharing import weighted_shares

VMS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 1000)), min_size=1, max_size=20)


@given(vms=VMS, data=st.data())
def test_all_is_given_and_who_has_more_than_its_part_took_it_from_nobody_who_wants_it(
    vms: list[tuple[int, int]], data: st.DataObject
) -> None:
    wants, weights = [want for want, _ in vms], [weight for _, weight in vms]
    room = data.draw(st.integers(0, sum(wants)))
    shares = weighted_shares(wants, weights, room)
    assert sum(shares) == room
    assert all(0 <= share <= want for share, want in zip(shares, wants, strict=True))
    for share, want, weight in zip(shares, wants, weights, strict=True):
        if share < want:
            assert all((other - 1) * weight <= (share + 1) * by
                       for other, by in zip(shares, weights, strict=True))  # fmt: skip


SPEC = """
memory = "64MiB"
fast_ratio = "1/4"
seconds = 10
[[group]]
vms = 2
policy = "heteroos"
[[group]]
policy = "heteroos"
set.policy.weight = 2
[[group]]
policy = "g-tpp"
"""


def test_vms_of_heteroos_pool_their_fast_memory_and_others_keep_theirs(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    guests = load(tmp_path / "spec.toml", {}, []).guests()
    assert [guest.fast_pages for guest in guests] == [3072, 3072, 6144, 4096]
    assert all(guest.fast_pages + guest.slow_pages == guest.total_pages for guest in guests)
