"""What the launcher is told: each interval of the time series once, the latest of each VM that moved."""

from hostd.publisher import Publisher
from proto.control import Control, Progress, Sample, Samples
from proto.counters import COUNTERS
from proto.messages import Tick


def _tick(time_ps: int, phase: str = "run", progress: float = 0.0) -> Tick:
    return Tick(
        time_ps=time_ps,
        phase=phase,
        progress=progress,
        counters=bytes(8 * COUNTERS),
        agent_cpu_s=0.0,
        bandwidth_demand=bytes(32),
    )


def _samples(sent: list[Control]) -> list[Sample]:
    return [sample for message in sent if isinstance(message, Samples) for sample in message.samples]


def test_one_sample_for_each_interval_and_one_at_the_end() -> None:
    sent: list[Control] = []
    publisher = Publisher(1, 100, sent.append)
    for time_ps in (40, 80, 120, 160, 200, 240, 500, 540):
        publisher.tick(3, _tick(time_ps), 0.25)
    publisher.tick(3, _tick(550, "done"), 0.25)
    publisher.publish(final=True)
    assert [(s.vm, s.time_ps, s.phase) for s in _samples(sent)] == [
        (3, 120, "run"),
        (3, 200, "run"),
        (3, 500, "run"),
        (3, 550, "done"),
    ]


def test_progress_is_the_latest_of_each_vm_that_moved() -> None:
    sent: list[Control] = []
    publisher = Publisher(3, 100, sent.append)
    publisher.tick(2, _tick(10), 0.25)
    publisher.tick(1, _tick(10), 0.25)
    publisher.tick(2, _tick(20, progress=0.5), 0.25)
    publisher.lost(0)
    publisher.publish(final=True)
    publisher.publish(final=True)
    (progress,) = [message for message in sent if isinstance(message, Progress)]
    assert [(vm.vm, vm.time_ps, vm.phase) for vm in progress.vms] == [(0, 0, "lost"), (1, 10, "run"), (2, 20, "run")]
    assert progress.vms[2].progress == 0.5


def test_progress_is_not_sent_for_every_tick() -> None:
    sent: list[Control] = []
    publisher = Publisher(1, 1000, sent.append)
    for time_ps in range(1, 500):
        publisher.tick(0, _tick(time_ps), 0.25)
        publisher.publish()
    # The first at once; the others wait for their time, whatever the machine's speed.
    assert sum(isinstance(message, Progress) for message in sent) < 499


def test_a_long_batch_of_samples_does_not_wait() -> None:
    sent: list[Control] = []
    publisher = Publisher(1, 1, sent.append)
    publisher.publish()
    for time_ps in range(1, 600):
        publisher.tick(0, _tick(time_ps), 0.25)
        publisher.publish()
    publisher.publish(final=True)
    assert [s.time_ps for s in _samples(sent)] == list(range(1, 600))
