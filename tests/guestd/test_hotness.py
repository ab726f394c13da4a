"""Ground truth against definitions written out in Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.hotness import placement_by_heat, score

HEATS = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(heats=HEATS, capacity=st.integers(-3, 70))
def test_placement_puts_the_hottest_in_fast_memory(heats: list[int], capacity: int) -> None:
    prefer = placement_by_heat(np.array(heats, np.int64), capacity)
    fast = [page for page in range(len(heats)) if prefer[page] == 0]
    ranked = sorted(range(len(heats)), key=lambda page: (-heats[page], page))
    assert fast == sorted(ranked[: max(0, capacity)])


@given(heats=HEATS, fast=st.data(), capacity=st.integers(1, 70))
def test_score_is_precision_and_recall_of_the_true_hot_set(
    heats: list[int], fast: st.DataObject, capacity: int
) -> None:
    held = set(fast.draw(st.sets(st.integers(0, len(heats) - 1))))
    mask = np.array([page in held for page in range(len(heats))])
    result = score(np.array(heats, np.int64), mask, capacity)
    total, touched = sum(heats), sum(heat > 0 for heat in heats)
    if total == 0:
        assert result == {}
        return
    ranked = sorted(range(len(heats)), key=lambda page: (-heats[page], page))[:capacity]
    hot = {page for page in ranked if heats[page] > total / touched}
    both = len(hot & held)
    assert result["precision"] == pytest.approx(both / len(held) if held else 0)
    assert result["recall"] == pytest.approx(both / len(hot) if hot else 0)
    assert result["f1"] == pytest.approx(2 * both / (len(held) + len(hot)) if both else 0)
    assert result["oracle_fast_ratio"] == pytest.approx(sum(heats[page] for page in ranked) / total)


def test_no_fast_memory_has_no_score() -> None:
    assert score(np.ones(4, np.int64), np.zeros(4, np.bool_), 0) == {}
