"""What a person sees of a sweep: on a terminal a bar with ETA and what runs and failed, elsewhere a line per cell."""

import time
from collections.abc import Callable, Container, Sequence
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet.sweep.spec import Point


class Progress(Protocol):
    """Who watches a sweep. Called in the engine's loop: return soon."""

    def begin(self, points: Sequence[Point], weights: Sequence[float], done: int) -> None:
        """These cells are to run, with an estimate of each one's seconds; ``done`` others are there already."""

    def started(self, point: Point) -> None:
        """The cell runs."""

    def finished(self, point: Point, reason: str) -> None:
        """The cell ended; ``reason`` says why it failed, if it did."""


class Silent:
    """Watches nothing."""

    def begin(self, points: Sequence[Point], weights: Sequence[float], done: int) -> None: ...

    def started(self, point: Point) -> None: ...

    def finished(self, point: Point, reason: str) -> None: ...


class Display:
    """On a console; a context while the sweep runs.

    ``clock``: wall time in seconds (for tests). ``meant_to_fail``: labels of cells that show something by failing.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, meant_to_fail: Container[str] = ()
    ) -> None:
        self._console = console
        self._clock = clock
        self._meant_to_fail = meant_to_fail
        self._weights: dict[str, float] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._failed: list[str] = []
        self._total = self._already = self._ended = 0
        self._start_s = clock()
        self._ended_weight = 0.0
        self._live = Live(console=console, transient=True, get_renderable=self._render) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *ending: object) -> None:
        if self._live:
            self._live.stop()
        if kind is KeyboardInterrupt:
            done, total = self._already + self._ended, self._already + self._total
            self._console.print(f"interrupted: {done} of {total} cells are there; the same command runs the others")

    def begin(self, points: Sequence[Point], weights: Sequence[float], done: int) -> None:
        """See `Progress`."""
        self._weights = {point.hash: weight for point, weight in zip(points, weights, strict=True)}
        self._total, self._already = len(points), done
        self._start_s = self._clock()
        self._console.print(
            f"{len(points)} {'cell' if len(points) == 1 else 'cells'} to run"
            + (f", {done} are there already" if done else "")
        )

    def started(self, point: Point) -> None:
        """See `Progress`."""
        self._running[point.hash] = (point.label, self._clock())

    def finished(self, point: Point, reason: str) -> None:
        """See `Progress`."""
        _, since_s = self._running.pop(point.hash, (point.label, self._clock()))
        self._ended += 1
        self._ended_weight += self._weights.get(point.hash, 0.0)
        took_s = self._clock() - since_s
        if reason and point.label in self._meant_to_fail:
            self._console.print(escape(f"{point.label} failed, as it is meant to: {reason}"), soft_wrap=True)
        elif reason:
            self._failed.append(point.label)
            self._console.print(f"FAILED {escape(point.label)}: {escape(reason)}", style="red", soft_wrap=True)
        elif self._live is None:
            failed = f", {len(self._failed)} failed" if self._failed else ""
            line = f"{self._ended}/{self._total} {point.label} ({took_s:.1f} s){failed}, ETA {duration(self.eta_s)}"
            self._console.print(escape(line), soft_wrap=True)

    @property
    def eta_s(self) -> float | None:
        """Wall seconds to go, at the pace so far; None before the first cell has ended."""
        if not self._ended_weight:
            return None
        left = sum(self._weights.values()) - self._ended_weight
        return max(0.0, left * (self._clock() - self._start_s) / self._ended_weight)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self._total), completed=self._ended, width=40)
        failed = f"{len(self._failed)} failed" if self._failed else "none failed"
        table.add_row(bar, Text(f"{self._ended}/{self._total}  ETA {duration(self.eta_s)}  {failed}"))
        now = self._clock()
        for label, since_s in list(self._running.values()):
            table.add_row(Text(label), Text(f"{now - since_s:.0f} s"))
        return table


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``, ``-``."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
