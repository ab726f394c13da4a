"""Every error that a guest raises; each docstring says when."""


class GuestError(Exception):
    """Base of all errors of a guest. ``kind`` is the word that the summary's `errors` carries."""

    kind = "error"


class PebsEptViolation(GuestError):
    """A PEBS record met an EPT violation on hardware that cannot take it (host.pebs=legacy): the VM is dead."""

    kind = "pebs_ept_violation"

    def __init__(self, vm: int, vcpu: int, gpa: int) -> None:
        super().__init__(
            f"vm{vm} vCPU {vcpu}: the PEBS record write at gPA {gpa:#x} met an EPT violation, which kills a VM before "
            "EPT-friendly PEBS; host.populate=true (memory backed and pinned) or host.pebs=ept-friendly prevents it, "
            "guest.ds_prefault=true only until the host unmaps the page (swap, balloon)"
        )


class RefusedByHost(GuestError):
    """The host refused a message of this guest; the message is the host's reason."""

    kind = "refused"


class UnexpectedMessage(GuestError):
    """The host sent something that this state does not expect, or out of sequence; restart the run."""

    kind = "protocol"
