"""fleet.sweep.progress: what is said, by a clock that the test sets."""

import io

import pytest
from rich.console import Console

from fleet import spec
from fleet.sweep.progress import Display, duration
from fleet.sweep.spec import Point


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def points() -> list[Point]:
    return [Point({"vms": vms}, spec.load(None, {"vms": vms})) for vms in (1, 2, 3)]


def test_a_line_per_cell_with_an_eta_by_weight() -> None:
    out, clock, cells = io.StringIO(), Clock(), points()
    with Display(Console(file=out, width=200), clock) as display:
        display.begin(cells, [1.0, 2.0, 3.0], 4)
        assert display.eta_s is None
        display.started(cells[0])
        clock.now = 10.0
        display.finished(cells[0], "")
        assert display.eta_s == pytest.approx(50.0)
        display.started(cells[1])
        clock.now = 30.0
        display.finished(cells[1], "vm0: killed: [signal] 9")
        display.started(cells[2])
        clock.now = 63.0
        display.finished(cells[2], "")
    assert out.getvalue().splitlines() == [
        "3 cells to run, 4 are there already",
        "1/3 vms=1 (10.0 s), ETA 50 s",
        "FAILED vms=2: vm0: killed: [signal] 9",
        "3/3 vms=3 (33.0 s), 1 failed, ETA 0 s",
    ]


def test_a_cell_that_is_meant_to_fail_is_no_failure() -> None:
    out, cells = io.StringIO(), points()
    with Display(Console(file=out, width=200), Clock(), meant_to_fail={"vms=1"}) as display:
        display.begin(cells, [1.0, 1.0, 1.0], 0)
        display.finished(cells[0], "vm0: pebs_ept_violation: it died")
        display.finished(cells[1], "")
    assert out.getvalue().splitlines()[1:] == [
        "vms=1 failed, as it is meant to: vm0: pebs_ept_violation: it died",
        "2/3 vms=2 (0.0 s), ETA 0 s",
    ]


def test_a_terminal_has_a_bar_with_the_current_cell_and_the_failures() -> None:
    out, clock, cells = io.StringIO(), Clock(), points()
    console = Console(file=out, width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with Display(console, clock) as display:
        display.begin(cells, [1.0, 1.0, 1.0], 0)
        display.started(cells[0])
        clock.now = 7.0
        display.finished(cells[0], "vm0: killed: by 9")
        display.started(cells[1])
        clock.now = 9.0
        with console.capture() as shown:
            console.print(display._render())
    text = shown.get()
    for part in ("1/3", "ETA 18 s", "1 failed", "vms=2", "2 s"):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (0, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3900, "1 h 05 min")]
)
def test_durations_are_readable(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown
