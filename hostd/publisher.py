"""What the launcher is told while a run goes on: progress a few times a second, and the time series in batches."""

import time
from collections.abc import Callable

from proto.control import Control, Progress, Sample, Samples, VmProgress
from proto.messages import Tick

_INTERVAL_S = 0.2
_PER_VM_S = 0.001
"""A fleet of a thousand is reported once a second, so that the host's CPU goes to its guests."""
_BATCH = 512


class Publisher:
    """Collects and sends. ``sample_ps``: interval of the time series; ``send``: to the launcher."""

    def __init__(self, vms: int, sample_ps: int, send: Callable[[Control], None]) -> None:
        self._sample_ps = sample_ps
        self._send = send
        self._interval_s = max(_INTERVAL_S, vms * _PER_VM_S)
        self._next_s = 0.0
        self._latest: dict[int, VmProgress] = {}
        self._moved: set[int] = set()
        self._samples: list[Sample] = []
        self._interval_of: dict[int, int] = {}

    def tick(self, vm: int, tick: Tick, agent_cpu_s: float) -> None:
        """A VM reached a barrier. ``agent_cpu_s``: measured CPU of its agent so far, in guest or host."""
        self._latest[vm] = VmProgress(
            vm=vm,
            time_ps=tick.time_ps,
            phase=tick.phase,
            progress=tick.progress,
            counters=tick.counters,
            agent_cpu_s=agent_cpu_s,
        )
        self._moved.add(vm)
        interval = tick.time_ps // self._sample_ps
        if interval > self._interval_of.get(vm, 0) or tick.phase == "done":
            self._interval_of[vm] = interval
            self._samples.append(
                Sample(
                    vm=vm,
                    time_ps=tick.time_ps,
                    phase=tick.phase,
                    counters=tick.counters,
                    agent_cpu_s=agent_cpu_s,
                )
            )

    def lost(self, vm: int) -> None:
        """A VM is no more."""
        last = self._latest.get(vm) or VmProgress(
            vm=vm, time_ps=0, phase="start", progress=0.0, counters=b"", agent_cpu_s=0.0
        )
        last.phase = "lost"
        self._latest[vm] = last
        self._moved.add(vm)

    def publish(self, final: bool = False) -> None:
        """Send what is due."""
        now_s = time.monotonic()
        due = final or now_s >= self._next_s
        if self._samples and (due or len(self._samples) >= _BATCH):
            self._send(Samples(samples=self._samples))
            self._samples = []
        if self._moved and due:
            self._send(Progress(vms=[self._latest[vm] for vm in sorted(self._moved)]))
            self._moved.clear()
            self._next_s = now_s + self._interval_s
