"""A policy from outside the tree: samples accessed bits on both nodes and swaps hot slow pages with cold fast ones.

Every period it looks at a few pages of each node, in order of address, and clears their accessed bits as it reads them.
A slow page that was accessed since the last look and a fast one that was not trade places. Written against `PageView`
alone, so costs, flushes, counters and CPU accounts come by themselves; with ``view="host"`` the same class would run in
the host, where each accessed bit that it clears costs a flush of the whole VM.
"""

import numpy as np

from guestd.meter import MIGRATE, TRACK
from guestd.mm.nodes import FAST, SLOW
from guestd.params import Param
from guestd.tiering.policy import Params, Policy, Tiering
from guestd.tiering.view import PageView
from proto.arrays import Words
from proto.counters import C
from proto.units import PS_PER_MS


class LruSample(Tiering):
    """See the module."""

    def __init__(self, view: PageView, params: Params) -> None:
        super().__init__(view, params)
        self._cursor = [0, 0]

    def start(self) -> None:
        self.view.schedule("sample", self.view.now + int(self.params["period_ms"]) * PS_PER_MS)

    def on_timer(self, name: str) -> None:
        view = self.view
        with view.meter.stage(TRACK):
            hot, cold = self._sample(SLOW, young=True), self._sample(FAST, young=False)
        with view.meter.stage(MIGRATE):
            # Pairs of one size, should the kernel use huge pages.
            hot, cold = view.match(hot, cold)
            view.counters[C.vmstat__pgpromote_success] += view.exchange(hot, cold, batched=True)
        self.start()

    def _sample(self, node: int, *, young: bool) -> Words:
        """Of the next pages of ``node`` after the last ones looked at, those that are ``young`` or not (int64[n])."""
        view, limit = self.view, int(self.params["sample"])
        start = self._cursor[node]
        pages = view.on_node(start, view.pages - start, node, limit)
        if pages.size < limit:
            pages = np.union1d(pages, view.on_node(0, start, node, limit - pages.size))
        self._cursor[node] = int(pages[-1] + 1) % view.pages if pages.size == limit else 0
        return pages[view.test_and_clear_young(pages) == young]


POLICY = Policy(
    name="lru-sample",
    summary="sampled accessed bits, hot slow pages swapped with cold fast ones",
    view="guest",
    stages={"tracker": "PTE.A sample", "classifier": "accessed or not", "migrator": "pairwise swap"},
    source="examples/third_party_policy",
    create=LruSample,
    params=(
        Param("period_ms", 100, "ms", "time between looks", "example", (), 1, 60_000),
        Param("sample", 512, "pages", "pages looked at per node", "example", (), 1, 1_000_000),
    ),
    warm_up={"period_ms": 2},
)
