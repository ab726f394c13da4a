"""Shadow pages against a dictionary: what is linked, dropped and reclaimed in which order, and who owns the frames."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.meter import Meter
from guestd.mm.nodes import F_SHADOW, FAST, NO_PAGE, SLOW, new_nodes, take_free
from guestd.mm.shadows import (
    COUNT,
    LOWEST,
    NO_SHADOW,
    drop_shadows,
    link_shadow,
    new_shadows,
    reclaim_shadows,
    take_shadows,
)

SPAN = 64

steps = st.lists(st.tuples(st.sampled_from(["link", "take", "drop", "reclaim"]), st.integers(0, SPAN - 1)), max_size=60)


@given(steps)
def test_each_frame_has_the_shadow_that_it_was_given_until_it_is_taken(program: list[tuple[str, int]]) -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    nodes.watermark[:] = 0
    shadows, book = new_shadows(nodes), Meter().book
    kept: dict[int, int] = {}
    loose: list[int] = []
    for what, which in program:
        frames = np.array([which, which, NO_PAGE, SPAN + 3], np.int32)
        if what == "link" and which not in kept:
            shadow = int(take_free(nodes, SLOW, 0))
            if shadow == NO_PAGE:
                continue
            link_shadow(shadows, nodes, which, shadow)
            kept[which] = shadow
        elif what == "take":
            out = np.empty(4, np.int32)
            had = which in kept
            assert take_shadows(book, shadows, frames, out) == had
            assert out.tolist() == [kept.get(which, NO_SHADOW), NO_SHADOW, NO_SHADOW, NO_SHADOW], (
                "named twice, had once"
            )
            if had:
                loose.append(kept.pop(which))
        elif what == "drop":
            assert drop_shadows(book, shadows, nodes, frames) == (which in kept)
            kept.pop(which, None)
        elif what == "reclaim":
            first = sorted(kept)[: which % 7]
            assert reclaim_shadows(book, shadows, nodes, which % 7) == len(first)
            for frame in first:
                del kept[frame]
        assert shadows.state[COUNT] == len(kept)
        assert all(frame >= shadows.state[LOWEST] for frame in kept)
        assert {int(f): int(shadows.of[f]) for f in np.flatnonzero(shadows.of)} == kept
        assert (nodes.flags[list(kept.values())] == F_SHADOW).all()
        assert nodes.free_count.tolist() == [SPAN, SPAN - len(kept) - len(loose)]
    assert nodes.free_count[FAST] == SPAN
