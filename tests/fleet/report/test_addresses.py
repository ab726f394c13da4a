"""Address axes without holes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.report.addresses import CHUNK, HOLE_CHUNKS, AddressMap

ADDRESSES = st.lists(st.integers(0, 1 << 47), min_size=1, max_size=60).map(lambda found: np.array(found, np.int64))


@given(ADDRESSES)
def test_places_name_their_addresses(addresses: np.ndarray) -> None:
    regions = AddressMap.of(addresses)
    places = regions.place(addresses)
    assert (places >= 0).all()
    assert (places < regions.size).all()
    assert (regions.address(places) == addresses).all()
    order = np.argsort(addresses, kind="stable")
    assert (np.diff(places[order]) >= 0).all()


@given(ADDRESSES)
def test_no_hole_is_long(addresses: np.ndarray) -> None:
    regions = AddressMap.of(addresses)
    assert regions.size <= len(np.unique(addresses // CHUNK)) * CHUNK * (HOLE_CHUNKS + 1)
    gaps = regions.starts[1:] - (regions.starts + np.diff(regions.offsets))[:-1]
    assert (gaps >= HOLE_CHUNKS * CHUNK).all()


@given(ADDRESSES)
def test_ticks_rise_and_say_the_truth(addresses: np.ndarray) -> None:
    regions = AddressMap.of(addresses)
    ticks = regions.ticks()
    assert 0 < len(ticks) <= 21
    places = np.array([place for place, _ in ticks])
    assert (np.diff(places) > 0).all()
    assert [int(label, 16) for _, label in ticks] == regions.address(places).tolist()


def test_what_lies_outside_has_no_place() -> None:
    regions = AddressMap.of(np.array([10 * CHUNK, 100 * CHUNK], np.int64))
    assert np.isnan(regions.place(np.array([0, 11 * CHUNK, 200 * CHUNK], np.int64))).all()
    assert regions.place(np.array([100 * CHUNK + 5], np.int64)).tolist() == [CHUNK + 5.0]
