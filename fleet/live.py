"""What a person sees while a run goes on: a live table on a terminal, a plain line now and then elsewhere.

All of it goes to the console that it is given, which is standard error, so that standard output stays the result's.
Figures are those of the last stretch between two reports, in virtual time; the agent's CPU is measured, in total.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from msgspec import Struct
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet.outcome import Sample, VmProgress
from proto.config import GuestConfig
from proto.counters import C
from proto.units import PS_PER_S, PS_PER_US

ROWS = 20
"""VMs with a line of their own; the rest share one."""
LINE_EVERY_S = 2.0
"""Where there is no terminal: wall time between two lines,"""
LINE_STEP = 0.1
"""or the share of the run after which there is one sooner."""


class VmState(Struct):
    """The last known of one VM."""

    phase: str = "start"
    progress: float = 0.0
    time_ps: int = 0
    total: int = 0
    fast: int = 0
    agent_cpu_s: float = 0.0
    throughput_mops: float | None = None
    """Million accesses per virtual second since the report before; None until there are two."""
    fast_ratio: float | None = None

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return self.phase in ("done", "lost")

    def update(self, report: VmProgress) -> None:
        """Take in a report; figures of the stretch since the one before, where it has any length."""
        counters = np.frombuffer(report.counters, np.int64)
        if len(counters):
            total, fast = int(counters[C.access__total]), int(counters[C.access__fast])
            if report.time_ps > self.time_ps and total > self.total:
                self.throughput_mops = (total - self.total) * PS_PER_US / (report.time_ps - self.time_ps)
                self.fast_ratio = (fast - self.fast) / (total - self.total)
            self.total, self.fast = total, fast
        self.phase, self.progress, self.time_ps = report.phase, report.progress, report.time_ps
        self.agent_cpu_s = report.agent_cpu_s


class FleetState:
    """The last known of every VM, and the totals."""

    def __init__(self, guests: Sequence[GuestConfig]) -> None:
        self.guests = {guest.vm: guest for guest in guests}
        self.vms = {guest.vm: VmState() for guest in guests}

    def update(self, reports: Sequence[VmProgress]) -> None:
        """Take in a batch."""
        for report in reports:
            self.vms.setdefault(report.vm, VmState()).update(report)

    @property
    def progress(self) -> float:
        """Share of the run that is done: the mean over the VMs, a lost one counting as done."""
        shares = [1.0 if vm.over else vm.progress for vm in self.vms.values()]
        return sum(shares) / len(shares) if shares else 1.0

    def line(self) -> str:
        """All VMs in one line."""
        phases = [vm.phase for vm in self.vms.values()]
        counts = ", ".join(f"{phases.count(phase)} {phase}" for phase in sorted(set(phases)))
        virtual_s = max((vm.time_ps for vm in self.vms.values()), default=0) / PS_PER_S
        vms = list(self.vms.values())
        going = [vm for vm in vms if not vm.over] or vms
        throughput = sum(vm.throughput_mops or 0.0 for vm in going)
        agent_s = sum(vm.agent_cpu_s for vm in self.vms.values())
        return (
            f"{100 * self.progress:3.0f} %  {virtual_s:8.2f} virtual s  {throughput:8.1f} M acc/s  "
            f"fast {_percent(_mean_ratio(going))} %  agents {agent_s:.2f} s  ({counts})"
        )


def _mean_ratio(vms: Sequence[VmState]) -> float | None:
    ratios = [vm.fast_ratio for vm in vms if vm.fast_ratio is not None]
    return sum(ratios) / len(ratios) if ratios else None


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f}"


class PlainDisplay:
    """A line every two seconds or tenth of the run: for logs, pipes and dumb terminals.

    ``clock``: wall time in seconds (for tests).
    """

    def __init__(
        self, guests: Sequence[GuestConfig], console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state = FleetState(guests)
        self._console = console
        self._clock = clock
        self._compiling = False
        self._last_s = -LINE_EVERY_S
        self._last_progress = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def on_compile(self, done: int, total: int, label: str) -> None:
        """One line at the first kernel, one after the last."""
        if done < total and not self._compiling:
            self._compiling = True
            self._print(f"loading kernels (first run: compiling them): {total}")
        elif done >= total and self._compiling:
            self._compiling = False
            self._print("loading kernels: done")

    def on_ready(self, vms: int, seconds: float) -> None:
        """How many guests are up."""
        self._print(f"{vms} guests ready in {seconds:.2f} s")

    def on_progress(self, vms: list[VmProgress]) -> None:
        """A line if it is time for one."""
        self._state.update(vms)
        now_s, progress = self._clock(), self._state.progress
        due = now_s - self._last_s >= LINE_EVERY_S or progress - self._last_progress >= LINE_STEP
        if due or (progress >= 1.0 > self._last_progress):
            self._last_s, self._last_progress = now_s, progress
            self._print(self._state.line())

    def on_samples(self, samples: list[Sample]) -> None:
        """The time series is not shown while it grows."""

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class LiveDisplay:
    """A table that is redrawn in place: the first `ROWS` VMs, the rest in one line, all of them in another."""

    def __init__(self, guests: Sequence[GuestConfig], console: Console) -> None:
        self._state = FleetState(guests)
        self._status = "starting"
        self._live = Live(self._render(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def on_compile(self, done: int, total: int, label: str) -> None:
        """Shown above the table."""
        self._status = (
            f"loading kernels (first run: compiling them): {done} of {total}  {label}" if done < total else "starting"
        )
        self._draw()

    def on_ready(self, vms: int, seconds: float) -> None:
        """Shown above the table."""
        self._status = f"{vms} guests ready in {seconds:.2f} s"
        self._draw()

    def on_progress(self, vms: list[VmProgress]) -> None:
        """Redraw."""
        self._state.update(vms)
        self._draw()

    def on_samples(self, samples: list[Sample]) -> None:
        """The time series is not shown while it grows."""

    def _draw(self) -> None:
        self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        return Group(Text(self._status, style="dim"), live_table(self._state), Text(self._state.line()))


def live_table(state: FleetState) -> Table:
    """A line for each of the first `ROWS` VMs, and one for the others together."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for heading in ("vm", "policy", "workload", "phase"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    table.add_column("progress", width=16)
    for heading in ("virtual s", "M acc/s", "fast %", "agent CPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = sorted(state.vms)
    for vm in names[:ROWS]:
        guest = state.guests.get(vm)
        labels = (guest.policy_label, guest.workload) if guest else ("", "")
        one = state.vms[vm]
        table.add_row(f"vm{vm}", *labels, one.phase, *_figures([one]), style="red" if one.phase == "lost" else None)
    if rest := [state.vms[vm] for vm in names[ROWS:]]:
        table.add_row(f"+{len(rest)}", "", "", "", *_figures(rest), style="dim")
    return table


def _figures(vms: Sequence[VmState]) -> tuple[RenderableType, ...]:
    shares = [1.0 if vm.over else vm.progress for vm in vms]
    throughputs = [vm.throughput_mops for vm in vms if vm.throughput_mops is not None]
    return (
        ProgressBar(total=1.0, completed=sum(shares) / len(shares), width=16),
        f"{max(vm.time_ps for vm in vms) / PS_PER_S:.2f}",
        f"{sum(throughputs):.2f}" if throughputs else "-",
        _percent(_mean_ratio(vms)),
        f"{sum(vm.agent_cpu_s for vm in vms):.2f}",
    )


def make_observer(
    guests: Sequence[GuestConfig] = (), *, json: bool = False, console: Console | None = None
) -> PlainDisplay | LiveDisplay:
    """The display for this console (default: standard error): live on a terminal, else lines; a context manager.

    ``json``: lines in any case, as whoever reads one JSON object from standard output does not watch a table.
    """
    console = console or Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal and not json:
        return LiveDisplay(guests, console)
    return PlainDisplay(guests, console)
