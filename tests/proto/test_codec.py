"""The wire: typed structs are plain msgpack, bounded and versioned, and garbage is told from another version."""

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.experiment import Experiment
from proto import codec
from proto.counters import COUNTERS
from proto.errors import DecodeError, SizeError, VersionError
from proto.layout import OPERATION
from proto.messages import (
    MAX_MESSAGE,
    MOST_RANGES,
    VERSION,
    Advance,
    Bye,
    EptFault,
    Failed,
    Hello,
    Mapped,
    Message,
    Refused,
    Stop,
    Tick,
    Welcome,
)

TICK = Tick(
    seq=3,
    time_ps=10,
    phase="run",
    progress=0.5,
    counters=bytes(8 * COUNTERS),
    agent_cpu_s=0.25,
    bandwidth_demand=bytes(32),
    scan_list=np.array([[3, 2], [9, 1]], "<i8").tobytes(),
)
TO_HOST: list[Message] = [
    Hello(vm=1, secret=bytes(range(32)), pid=4),
    EptFault(seq=1, time_ps=7, gpfns=np.arange(3, dtype="<i8").tobytes(), last=True),
    TICK,
    Bye(seq=4, report=b'{"id": 1}'),
    Failed(seq=5, kind="oom", message="out of memory"),
]
TO_GUEST: list[Message] = [
    Mapped(cost_ps=np.arange(3, dtype="<i8").tobytes(), waits=True),
    Advance(
        seq=2,
        until_ps=9,
        latency_ps=(1, 2, 3, 4),
        bandwidth_budget=(5, 6, 7, 8),
        llc_bytes=11,
        operations=np.zeros(2, OPERATION).tobytes(),
        scanned=b"\5",
        scanned_ps=8,
    ),
    Stop(reason="enough"),
    Refused(reason="no"),
]


@pytest.mark.parametrize("message", TO_HOST, ids=lambda m: type(m).__name__)
def test_a_message_to_the_host_survives_the_wire(message: Message) -> None:
    assert codec.decode_to_host(codec.encode(message)) == message


@pytest.mark.parametrize("message", TO_GUEST, ids=lambda m: type(m).__name__)
def test_a_message_to_a_guest_survives_the_wire(message: Message) -> None:
    assert codec.decode_to_guest(codec.encode(message)) == message


def test_a_welcome_carries_the_whole_configuration(experiment: Experiment) -> None:
    welcome = Welcome(config=experiment.guests()[1])
    assert codec.decode_to_guest(codec.encode(welcome)) == welcome


@pytest.mark.parametrize("message", TO_HOST + TO_GUEST, ids=lambda m: type(m).__name__)
def test_plain_msgpack_reads_and_writes_the_same_bytes(message: Message) -> None:
    data = codec.encode(message)
    plain = msgpack.unpackb(data)
    assert plain["v"] == VERSION
    assert plain["seq"] == message.seq
    assert plain["t"] == type(message).__struct_config__.tag
    assert msgpack.packb(plain) == data


def test_a_configuration_written_by_plain_msgpack_is_read(experiment: Experiment) -> None:
    welcome = Welcome(config=experiment.guests()[0])
    data = msgpack.packb(msgpack.unpackb(codec.encode(welcome)))
    assert codec.decode_to_guest(data) == welcome


def test_a_message_over_the_bound_is_not_written() -> None:
    with pytest.raises(SizeError, match="split the batch"):
        codec.encode(Failed(kind="x", message="y" * (MAX_MESSAGE + 1)))


def test_a_guest_takes_longer_messages_than_a_host() -> None:
    advance = TO_GUEST[1]
    assert isinstance(advance, Advance)
    longer = msgspec.structs.replace(advance, operations=np.zeros(MAX_MESSAGE // 32, OPERATION).tobytes())
    assert codec.decode_to_guest(codec.encode(longer)) == longer
    with pytest.raises(DecodeError, match=f"{MAX_MESSAGE} of a message"):
        codec.decode_to_host(codec.encode(longer))


@pytest.mark.parametrize("message", TO_GUEST, ids=lambda m: type(m).__name__)
def test_the_wrong_direction_is_refused(message: Message) -> None:
    with pytest.raises(DecodeError):
        codec.decode_to_host(codec.encode(message))


@pytest.mark.parametrize("version", [0, VERSION + 1, 2**63])
def test_another_version_is_told_apart_from_garbage(version: int) -> None:
    # Another version may well have fields that this one does not know.
    data = msgpack.packb({"t": "hello", "v": version, "seq": 0, "vm": "seven", "cookie": 1})
    with pytest.raises(VersionError, match=f"version {version}, this is {VERSION}"):
        codec.decode_to_host(data)


@pytest.mark.parametrize(
    "broken",
    [
        msgspec.structs.replace(TICK, progress=float("nan")),
        msgspec.structs.replace(TICK, progress=1.5),
        msgspec.structs.replace(TICK, agent_cpu_s=float("inf")),
        msgspec.structs.replace(TICK, time_ps=1 << 63),
        msgspec.structs.replace(TICK, time_ps=-1),
        msgspec.structs.replace(TICK, counters=bytes(8 * COUNTERS - 8)),
        msgspec.structs.replace(TICK, bandwidth_demand=bytes(40)),
        msgspec.structs.replace(TICK, scan_list=bytes(24)),
        msgspec.structs.replace(TICK, scan_list=bytes(16 * MOST_RANGES + 16)),
        EptFault(time_ps=0, gpfns=bytes(12)),
        Hello(vm=-1, secret=bytes(32), pid=1),
        Hello(vm=1, secret=bytes(31), pid=1),
        Failed(kind="k" * 65, message=""),
        Bye(report=b"{"),
        Bye(report=b"[1, 2]"),
        Bye(report=b"[" * 100_000),
    ],
    ids=str,
)
def test_a_field_out_of_its_bounds_is_refused(broken: Message) -> None:
    with pytest.raises(DecodeError):
        codec.decode_to_host(msgspec.msgpack.encode(broken))


@given(st.binary(max_size=200))
def test_garbage_is_never_more_than_refused(data: bytes) -> None:
    with pytest.raises((DecodeError, VersionError)):
        codec.decode_to_host(data)


@given(st.sampled_from(TO_HOST), st.data())
def test_a_damaged_message_is_read_as_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    raw = bytearray(codec.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    try:
        decoded = codec.decode_to_host(bytes(raw[:cut]))
    except (DecodeError, VersionError):
        return
    # What is accepted is within bounds: it can be written again and read back.
    assert codec.decode_to_host(codec.encode(decoded)) == decoded


@given(
    st.recursive(
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_other_msgpack_is_refused(value: object) -> None:
    with pytest.raises((DecodeError, VersionError)):
        codec.decode_to_host(msgpack.packb(value))
