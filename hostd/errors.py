"""Every error that the host raises; each docstring says when."""


class HostError(Exception):
    """Base of all errors of the host."""


class RefusedMessage(HostError):
    """A well-formed message is not acceptable in its state: counted, answered with `Refused`, without effect.

    ``reason`` is one line: what was wrong and what would have been right.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
