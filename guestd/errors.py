"""Every error that a guest raises; each docstring says when."""


class GuestError(Exception):
    """Base of all errors of a guest. ``kind`` is the word that the summary's `errors` carries."""

    kind = "error"


class RefusedByHost(GuestError):
    """The host refused a message of this guest; the message is the host's reason."""

    kind = "refused"


class UnexpectedMessage(GuestError):
    """The host sent something that this state does not expect, or out of sequence; restart the run."""

    kind = "protocol"
