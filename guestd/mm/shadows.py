"""Shadow pages: the slow frames of pages that were promoted by a copy and have not been written since.

Nomad (OSDI'24, 3.2) keeps the old frame of a promoted page, so that demoting the page while it is clean takes no copy.
A shadow is used memory of the slow node, on no list, and free for the taking when memory is short. Nomad finds it by
its page (an XArray whose index is the fast frame) and gives them up in that order; so does this.
"""

from typing import NamedTuple

import numpy as np

from guestd.jit import inline
from guestd.meter import metered
from guestd.mm.nodes import F_SHADOW, NO_PAGE, Nodes, give_free, span_of
from proto.arrays import Ints, Words

COUNT, LOWEST = 0, 1
NO_SHADOW = 0
"""In place of a shadow: that is a frame of the fast node."""


class Shadows(NamedTuple):
    """The shadows of the fast node's frames."""

    of: Ints
    """int32[span]: the slow frame that holds the same content, or NO_SHADOW."""
    state: Words
    """int64[2]: how many there are; a frame below which none has one."""


def new_shadows(nodes: Nodes) -> Shadows:
    """None yet."""
    span = span_of(nodes)
    return Shadows(np.zeros(span, np.int32), np.array([0, span], np.int64))


@inline
def link_shadow(shadows: Shadows, nodes: Nodes, frame: int, shadow: int) -> None:
    """``shadow``, which is on no list, keeps the content of ``frame``."""
    shadows.of[frame] = shadow
    nodes.page[shadow] = NO_PAGE
    nodes.flags[shadow] = F_SHADOW
    shadows.state[COUNT] += 1
    shadows.state[LOWEST] = min(shadows.state[LOWEST], frame)


@inline
def take_shadow(shadows: Shadows, frame: int) -> int:
    """The shadow of ``frame`` (of any node, or NO_PAGE), which has none any more; or NO_SHADOW."""
    shadow = NO_SHADOW
    if 0 <= frame < shadows.of.size and shadows.of[frame] != NO_SHADOW:
        shadow = shadows.of[frame]
        shadows.of[frame] = NO_SHADOW
        shadows.state[COUNT] -= 1
    return shadow


@metered
def take_shadows(shadows: Shadows, frames: Ints, out: Ints) -> int:
    """`take_shadow` of each frame; returns how many had one."""
    found = 0
    for i in range(frames.size):
        out[i] = take_shadow(shadows, frames[i])
        found += 1 if out[i] != NO_SHADOW else 0
    return found


@metered
def drop_shadows(shadows: Shadows, nodes: Nodes, frames: Ints) -> int:
    """Free the shadows of the frames; returns how many had one."""
    found = 0
    for frame in frames:
        shadow = take_shadow(shadows, frame)
        if shadow != NO_SHADOW:
            give_free(nodes, shadow)
            found += 1
    return found


@metered
def reclaim_shadows(shadows: Shadows, nodes: Nodes, limit: int) -> int:
    """Free up to ``limit`` shadows in order of their pages' frames; returns how many."""
    found = 0
    frame = shadows.state[LOWEST]
    while found < limit and shadows.state[COUNT] > 0:
        shadow = take_shadow(shadows, frame)
        if shadow != NO_SHADOW:
            give_free(nodes, shadow)
            found += 1
        frame += 1
    shadows.state[LOWEST] = frame if shadows.state[COUNT] > 0 else shadows.of.size
    return found
