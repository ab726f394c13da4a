"""What a run hands back: reports, failures, samples and resource use, before they become files."""

from enum import StrEnum
from typing import Any, Protocol

from msgspec import Struct, field

from proto.control import HOST, Failure, Sample, VmProgress

__all__ = ["HOST", "Failure", "FleetResult", "Observer", "Outcome", "Sample", "Silent", "Usage", "VmProgress"]


class Outcome(StrEnum):
    """How the run as a whole ended."""

    OK = "ok"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Usage(Struct, frozen=True):
    """What wait4 says that a process used."""

    pid: int
    status: int
    """Exit code, or minus the number of the signal that killed it."""
    user_s: float
    system_s: float
    max_rss_bytes: int


class FleetResult(Struct):
    """One run, as the launcher saw it."""

    outcome: Outcome
    reports: dict[int, dict[str, Any]]
    """Each VM's part of summary.json (design/summary.md), `process_cpu` complete. A lost VM has none."""
    failures: list[Failure]
    """What went wrong; ``vm`` is None for what concerns the run as a whole."""
    host: dict[str, Any]
    """The `host` object of summary.json; empty if the host died."""
    samples: list[Sample]
    """The time series in order of arrival (per VM in order of time)."""
    usage: dict[int, Usage] = field(default_factory=dict)
    """wait4's figures per VM; `HOST` for the host."""
    cpu_s: dict[int, float] = field(default_factory=dict)
    """User and system CPU-seconds of each VM's process, by wait4."""
    compile_s: float = 0.0
    """Wall time until the zygote was warm."""
    ready_s: float = 0.0
    """Wall time from the first fork until every guest had said hello."""
    wall_s: float = 0.0
    """Wall time from ready to the host's result."""


class Observer(Protocol):
    """Who watches a run. Called in the launcher's loop: return soon."""

    def on_compile(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` kernels are there; ``label`` names the next."""

    def on_ready(self, vms: int, seconds: float) -> None:
        """``vms`` guests said hello, ``seconds`` of wall time after the first fork."""

    def on_progress(self, vms: list[VmProgress]) -> None:
        """The latest of each VM that moved; at most five times a second."""

    def on_samples(self, samples: list[Sample]) -> None:
        """A batch of the time series (the result holds them all)."""


class Silent:
    """An observer that does nothing."""

    def on_compile(self, done: int, total: int, label: str) -> None: ...

    def on_ready(self, vms: int, seconds: float) -> None: ...

    def on_progress(self, vms: list[VmProgress]) -> None: ...

    def on_samples(self, samples: list[Sample]) -> None: ...
