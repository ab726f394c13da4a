"""Every error that the contract raises; each docstring says when, each message what to do."""


class ProtoError(Exception):
    """Base of all errors of the contract."""


class DecodeError(ProtoError):
    """The bytes are no message of this protocol: truncated, of unknown type, or with a field out of its bounds."""


class VersionError(ProtoError):
    """The message was written by another protocol version; start host and guests from one installation."""


class SizeError(ProtoError):
    """The message is longer than the bound of its direction; split the batch."""


class UnitError(ProtoError, ValueError):
    """A quantity could not be read; the message says which units are known."""


class TraceError(ProtoError):
    """A trace, or the recording it is to be made of, cannot be used; the message says where and what would help."""


class SegmentError(ProtoError):
    """A VM's shared memory could not be made, sealed or mapped; the message says which limit to look at."""


class EndpointError(ProtoError):
    """The host can't listen where it was told to; the message says what would be right."""
