"""Which guests owe the host a word, and for how long: the bound on waiting for a guest that hangs.

Time is wall time during which the host itself was awake: a fleet that was suspended as a whole (Ctrl-Z, a laptop's
lid) must not look like a fleet of hung guests. No clock of its own; the server says what time it is.
"""

MAX_STEP_S = 1.0
"""Longest time between two looks at the clock that counts as awake."""


class Watchdog:
    """Deadlines by VM. ``timeout_s``: how long a VM may owe a word."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self.timeout_s = timeout_s
        self._last_s = now_s
        self._awake_s = 0.0
        self._since: dict[int, float] = {}

    def tick(self, now_s: float) -> None:
        """Look at the clock (any monotonic one)."""
        self._awake_s += min(now_s - self._last_s, MAX_STEP_S)
        self._last_s = now_s

    def expect(self, vm: int) -> None:
        """VM ``vm`` owes a word from now on (again)."""
        self._since[vm] = self._awake_s

    def refresh(self, vm: int) -> None:
        """VM ``vm`` gave a sign of life; if it owes a word, the time starts again."""
        if vm in self._since:
            self._since[vm] = self._awake_s

    def settle(self, vm: int) -> None:
        """VM ``vm`` owes nothing."""
        self._since.pop(vm, None)

    def overdue(self) -> list[int]:
        """VMs that owe a word for longer than the bound; each is named once."""
        late = [vm for vm, since in self._since.items() if self._awake_s - since > self.timeout_s]
        for vm in late:
            del self._since[vm]
        return late
