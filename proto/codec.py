"""Messages to bytes and back: msgpack through msgspec, bounded, versioned, each direction with its own types.

What arrives is untrusted. A decoded message has every field within its bounds and every array of the right length; a
message of another protocol version is told apart from garbage, so that its sender can be told what to do. Whether the
message makes sense in its state is for the session and the host to judge.
"""

import math
from typing import TypeVar

import msgspec

from proto.counters import COUNTERS
from proto.errors import DecodeError, SizeError, VersionError
from proto.layout import OPERATION
from proto.messages import (
    MAX_MESSAGE,
    MAX_TO_GUEST,
    VERSION,
    Advance,
    Bye,
    EptFault,
    Mapped,
    Message,
    Tick,
    ToGuest,
    ToHost,
)

MAX_TIME_PS = (1 << 63) - 1
"""The engine's times are int64."""

_WORD = 8
_M = TypeVar("_M", bound=Message)


class _Envelope(msgspec.Struct):
    """What every version of the protocol has."""

    t: str
    v: int


_encoder = msgspec.msgpack.Encoder()
_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_to_guest: msgspec.msgpack.Decoder[ToGuest] = msgspec.msgpack.Decoder(ToGuest)
_envelope = msgspec.msgpack.Decoder(_Envelope)
_json = msgspec.json.Decoder(dict[str, object])


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises SizeError if they are more than a message to its receiver may have."""
    data = _encoder.encode(message)
    most = MAX_TO_GUEST if isinstance(message, ToGuest) else MAX_MESSAGE
    if len(data) > most:
        name = type(message).__name__
        raise SizeError(f"{name} of {len(data)} bytes is longer than the {most} of a message; split the batch")
    return data


def decode_to_host(data: bytes) -> ToHost:
    """A guest's message. Raises DecodeError, VersionError."""
    message = _decode(data, _to_host, MAX_MESSAGE)
    _check_to_host(message)
    return message


def decode_to_guest(data: bytes) -> ToGuest:
    """The host's message. Raises DecodeError, VersionError."""
    message = _decode(data, _to_guest, MAX_TO_GUEST)
    if isinstance(message, Advance):
        _whole(message.operations, OPERATION.itemsize, "operations")
    elif isinstance(message, Mapped):
        _whole(message.cost_ps, _WORD, "cost_ps")
    return message


def _decode(data: bytes, decoder: "msgspec.msgpack.Decoder[_M]", most: int) -> _M:
    if len(data) > most:
        raise DecodeError(f"{len(data)} bytes are more than the {most} of a message")
    try:
        message = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        _check_version(data)
        raise DecodeError(f"no message of this protocol: {error}") from None
    if message.v != VERSION:
        _check_version(data)
    return message


def _check_version(data: bytes) -> None:
    """Raise VersionError if the bytes are a message of another version."""
    try:
        envelope = _envelope.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if envelope.v != VERSION:
        raise VersionError(
            f"protocol version {envelope.v}, this is {VERSION}; start host and guests from one installation"
        )


def _check_to_host(message: ToHost) -> None:
    match message:
        case EptFault():
            _time(message.time_ps)
            _whole(message.gpfns, _WORD, "gpfns")
        case Tick():
            _time(message.time_ps)
            _length(message.counters, COUNTERS * _WORD, "counters")
            _length(message.bandwidth_demand, 4 * _WORD, "bandwidth_demand")
            _whole(message.scan_list, 2 * _WORD, "scan_list")
            if not (0.0 <= message.progress <= 1.0 and math.isfinite(message.agent_cpu_s)):
                raise DecodeError("progress is a share from 0 to 1 and agent_cpu_s a finite number of seconds")
        case Bye():
            try:
                _json.decode(message.report)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise DecodeError(f"the report is no JSON object: {error}") from None
        case _:
            pass


def _time(time_ps: int) -> None:
    if time_ps > MAX_TIME_PS:
        raise DecodeError(f"time_ps {time_ps} is beyond {MAX_TIME_PS}")


def _whole(array: bytes, item: int, name: str) -> None:
    if len(array) % item:
        raise DecodeError(f"{name}: {len(array)} bytes are no whole number of {item}-byte items")


def _length(array: bytes, expected: int, name: str) -> None:
    if len(array) != expected:
        raise DecodeError(f"{name}: {len(array)} bytes instead of {expected}")
