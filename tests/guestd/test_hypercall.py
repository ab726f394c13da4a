"""The guest's end of the boundary: numbers its messages, checks the host's, counts and times what it says."""

import msgspec
import numpy as np
import pytest

from guestd.errors import RefusedByHost, UnexpectedMessage
from guestd.hypercall import Hypercalls
from proto import codec
from proto.messages import Bye, EptFault, Hello, Mapped, Refused, Stop, ToGuest, ToHost


class Wire:
    """What the host would say, in order; keeps what it hears."""

    def __init__(self, *answers: ToGuest, first: int = 0) -> None:
        numbered = (msgspec.structs.replace(a, seq=first + i) for i, a in enumerate(answers))
        self._answers = [codec.encode(answer) for answer in numbered]
        self.heard: list[ToHost] = []
        self.calls = Hypercalls(
            lambda data: self.heard.append(codec.decode_to_host(data)), lambda: self._answers.pop(0)
        )


GPFNS = np.array([5, 9, 5_000_000_000], np.int64)
COSTS = np.array([10, 20, 30], np.int64)


def test_messages_are_numbered_by_the_caller() -> None:
    wire = Wire()
    wire.calls.say(Hello(vm=1, secret=bytes(32), pid=7, seq=99))
    wire.calls.say(Bye(report=b"{}"))
    assert [message.seq for message in wire.heard] == [0, 1]


def test_a_fault_carries_its_arrays_there_and_back() -> None:
    wire = Wire(Mapped(cost_ps=COSTS.tobytes(), waits=True))
    costs, waits = wire.calls.ept_fault(77, GPFNS, True)
    assert costs.tolist() == COSTS.tolist()
    costs[0] += 1  # the engine's own, to be written to
    fault = wire.heard[0]
    assert isinstance(fault, EptFault)
    assert fault.time_ps == 77
    assert np.frombuffer(fault.gpfns, np.int64).tolist() == GPFNS.tolist()
    assert fault.last
    assert waits


def test_a_stop_that_crosses_a_fault_waits_for_the_barrier() -> None:
    wire = Wire(Stop(reason="enough"), Mapped(cost_ps=COSTS.tobytes()))
    assert wire.calls.stop is None
    assert wire.calls.ept_fault(1, GPFNS, False)[0].tolist() == COSTS.tolist()
    assert wire.calls.stop is not None
    assert wire.calls.stop.reason == "enough"


def test_a_refusal_is_an_error_with_its_reason() -> None:
    with pytest.raises(RefusedByHost, match="not today"):
        Wire(Refused(reason="not today")).calls.ept_fault(1, GPFNS, False)


@pytest.mark.parametrize("answer", [Mapped(cost_ps=COSTS[:2].tobytes()), Stop(reason="x")], ids=["short", "stop"])
def test_an_answer_that_does_not_fit_is_an_error(answer: ToGuest) -> None:
    with pytest.raises(UnexpectedMessage, match="3 EPT faults"):
        Wire(*(answer, answer)[: 1 + isinstance(answer, Stop)]).calls.ept_fault(1, GPFNS, False)


def test_a_gap_in_the_hosts_numbers_is_an_error() -> None:
    with pytest.raises(UnexpectedMessage, match="number 1"):
        Wire(Stop(reason="x"), first=1).calls.hear()


def test_hello_wants_a_welcome() -> None:
    with pytest.raises(UnexpectedMessage, match="stop"):
        Wire(Stop(reason="x")).calls.hello(1, bytes(32), 7)


def test_the_report_counts_by_name_and_times_the_round_trips() -> None:
    wire = Wire(*[Mapped(cost_ps=COSTS.tobytes())] * 50)
    for _ in range(50):
        wire.calls.ept_fault(1, GPFNS, False)
    report = wire.calls.report()
    assert report["count"] == {"ept_fault": 50}
    rtt = report["rtt_us"]
    assert isinstance(rtt, dict)
    assert 0 < rtt["p50"] <= rtt["p99"]


def test_without_a_round_trip_there_are_no_percentiles() -> None:
    assert Wire().calls.report() == {"count": {}}
