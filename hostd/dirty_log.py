"""The host thread that harvests a VM's dirty log (PML) each period, as a live migration or a working-set estimate does.

A harvest is an operation at its own time (`HostView.request_harvest`); what it took is read at the barrier that
follows. A host-side policy that harvests by itself (vTMM) runs without it: ``host.pml_harvest=0``.
"""

from guestd.meter import Meter
from hostd.host_view import HostView


class DirtyLog:
    """See the module. ``harvested_pages``: so far, each as often as it was harvested."""

    def __init__(self, period_ps: int, start_ps: int, view: HostView) -> None:
        self.harvested_pages = 0
        self._period_ps = period_ps
        self._next_ps = start_ps + period_ps
        self.view = view

    @property
    def meter(self) -> Meter:
        """The thread's own accounts."""
        return self.view.meter

    def settle(self, now_ps: int) -> None:
        """Read what harvests before ``now_ps`` took."""
        self.meter.now = now_ps
        self.harvested_pages += self.view.harvest_dirty().size

    def run(self, now_ps: int, until_ps: int) -> None:
        """Request the harvests that are due in the quantum to come."""
        while self._next_ps < until_ps:
            self.meter.now = max(now_ps, self._next_ps)
            self.view.request_harvest()
            self._next_ps += self._period_ps

    def report(self) -> dict[str, float]:
        """The thread's part of `pml` of a VM in summary.json."""
        return {"harvested_pages": self.harvested_pages, "modelled_s": sum(self.meter.modelled_s().values())}
