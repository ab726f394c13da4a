"""What is shown while a run goes on: stretches between reports, lines when they are due, nothing on standard output."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from fleet.experiment import Experiment
from fleet.live import ROWS, FleetState, LiveDisplay, PlainDisplay, live_table, make_observer
from fleet.outcome import VmProgress
from proto.config import GuestConfig
from proto.counters import C, new_counters
from proto.units import PS_PER_S

Report = Callable[..., VmProgress]


@pytest.fixture
def guests(experiment: Experiment) -> list[GuestConfig]:
    return experiment.guests()


@pytest.fixture
def report() -> Report:
    def make(vm: int, progress: float, total: int = 0, fast: int = 0, phase: str = "run") -> VmProgress:
        counters = new_counters()
        counters[C.access__total], counters[C.access__fast] = total, fast
        time_ps = round(progress * 10 * PS_PER_S)
        return VmProgress(
            vm=vm, time_ps=time_ps, phase=phase, progress=progress, counters=counters.tobytes(), agent_cpu_s=progress
        )

    return make


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=120, highlight=False)


def test_figures_are_those_of_the_last_stretch(guests: list[GuestConfig], report: Report) -> None:
    state = FleetState(guests)
    state.update([report(0, 0.1, total=10_000_000, fast=1_000_000)])
    assert (state.vms[0].throughput_mops, state.vms[0].fast_ratio) == (10.0, 0.1)
    state.update([report(0, 0.2, total=30_000_000, fast=16_000_000)])
    assert (state.vms[0].throughput_mops, state.vms[0].fast_ratio) == (20.0, 0.75)
    state.update([report(0, 0.2, total=30_000_000, fast=16_000_000)])
    assert (state.vms[0].throughput_mops, state.vms[0].fast_ratio) == (20.0, 0.75)


def test_a_vm_that_has_not_ticked_has_no_figures(guests: list[GuestConfig]) -> None:
    state = FleetState(guests)
    state.update([VmProgress(vm=1, time_ps=0, phase="start", progress=0.0, counters=b"", agent_cpu_s=0.0)])
    assert state.vms[1].fast_ratio is None
    assert "2 start" in state.line()


def test_a_lost_vm_does_not_hold_up_the_progress(guests: list[GuestConfig], report: Report) -> None:
    state = FleetState(guests)
    state.update([report(0, 0.3, phase="lost"), report(1, 0.5)])
    assert state.progress == pytest.approx(0.75)


def test_lines_come_every_two_seconds_or_tenth(guests: list[GuestConfig], report: Report) -> None:
    now = [100.0]
    console = plain_console()
    display = PlainDisplay(guests, console, lambda: now[0])

    def lines_after(seconds: float, progress: float) -> int:
        now[0] += seconds
        display.on_progress([report(0, progress), report(1, progress)])
        return len(text_of(console).splitlines())

    assert lines_after(0.0, 0.01) == 1
    assert lines_after(0.2, 0.02) == 1
    assert lines_after(0.2, 0.12) == 2
    assert lines_after(1.9, 0.13) == 2
    assert lines_after(0.1, 0.14) == 3
    assert lines_after(0.1, 0.99) == 4
    assert lines_after(0.1, 1.0) == 5
    assert lines_after(0.1, 1.0) == 5


def test_compiling_is_said_once(guests: list[GuestConfig]) -> None:
    console = plain_console()
    display = PlainDisplay(guests, console)
    for done in range(4):
        display.on_compile(done, 3, "kernel")
    display.on_ready(2, 0.5)
    assert text_of(console).splitlines() == [
        "loading kernels (first run: compiling them): 3",
        "loading kernels: done",
        "2 guests ready in 0.50 s",
    ]


def test_a_warm_cache_says_nothing_of_compiling(guests: list[GuestConfig]) -> None:
    console = plain_console()
    PlainDisplay(guests, console).on_compile(3, 3, "")
    assert text_of(console) == ""


def test_terminal_gets_a_table_and_others_lines(guests: list[GuestConfig]) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    assert isinstance(make_observer(guests, console=terminal), LiveDisplay)
    assert isinstance(make_observer(guests, console=terminal, json=True), PlainDisplay)
    assert isinstance(make_observer(guests, console=plain_console()), PlainDisplay)


def test_nothing_on_standard_output(
    guests: list[GuestConfig], report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_observer(guests, json=True) as observer:
        observer.on_ready(2, 0.1)
        observer.on_progress([report(0, 1.0), report(1, 1.0)])
        observer.on_samples([])
    written = capsys.readouterr()
    assert written.out == ""
    assert "2 guests ready" in written.err


def test_live_display_shows_and_clears(guests: list[GuestConfig], report: Report) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with make_observer(guests, console=terminal) as observer:
        observer.on_compile(0, 3, "walk")
        observer.on_ready(2, 0.1)
        observer.on_progress([report(0, 0.5, 1_000_000, 400_000), report(1, 0.4, 100, 100, "populate")])
    shown = text_of(terminal)
    for part in ("loading kernels", "2 guests ready", "g-tpp", "hyperplace", "40.0", "populate"):
        assert part in shown
    assert shown.endswith("\x1b[2K")  # the table is erased, the final one follows


def test_many_vms_share_a_line(report: Report) -> None:
    state = FleetState([])
    state.update([report(vm, 0.5, 5_000_000, 1_000_000) for vm in range(ROWS + 30)])
    console = plain_console()
    console.print(live_table(state))
    lines = text_of(console).splitlines()
    assert len(lines) == 1 + ROWS + 1
    assert lines[-1].startswith("+30")
    assert lines[-1].split()[-3:] == ["30.00", "20.0", "15.00"]
