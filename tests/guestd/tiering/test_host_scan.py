"""A list goes out once, with the tick after it was made, and is answered by the quantum that follows."""

import numpy as np
import pytest

from guestd.tiering.host_scan import HostScan
from proto.messages import Advance

LIST = np.array([[3, 2], [9, 1]], np.int64)


def advance(until_ps: int, scanned: bytes = b"", scanned_ps: int = 0) -> Advance:
    return Advance(until_ps=until_ps, latency_ps=(1, 1, 1, 1), bandwidth_budget=(0, 0, 0, 0), llc_bytes=0,
                   operations=b"", scanned=scanned, scanned_ps=scanned_ps)  # fmt: skip


def test_the_answer_is_due_when_the_host_is_through() -> None:
    scan = HostScan()
    scan.hear(advance(100))
    assert scan.take_list() == b""
    scan.hear(advance(200))
    scan.request(LIST)
    assert scan.due_ps() == 201, "after the barrier"
    assert scan.take_list() == LIST.tobytes()
    scan.hear(advance(300, b"\5", 230))
    assert scan.take_list() == b"", "it is sent once"
    assert scan.due_ps() == 230
    scan.hear(advance(400))
    assert scan.due_ps() == 230, "it waits until it is taken"
    answer = scan.take_answer()
    assert answer.ranges.tolist() == LIST.tolist() and answer.bits.tolist() == [5] and answer.done_ps == 230
    scan.request(LIST)
    assert scan.due_ps() == 401


def test_a_list_before_the_last_was_answered_is_a_mistake() -> None:
    scan = HostScan()
    scan.request(LIST)
    with pytest.raises(AssertionError):
        scan.request(LIST)
    scan.take_list()
    with pytest.raises(AssertionError):
        scan.request(LIST)
    with pytest.raises(AssertionError):
        scan.take_answer()
