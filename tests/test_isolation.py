"""No process of a fleet but a guest's own holds the addresses that its PMU sampled; with a shared buffer others do.

A real fleet is stopped with samples in its buffers, and all memory of every process (private, shared segments, the
launcher's too) is searched for 8-byte words that are addresses in one guest's VMAs. VMAs are randomised per VM, so such
a word is that guest's address or chance; where a process happens to be mapped there itself, another guest is taken.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from fleet.spec import load
from guestd.workloads.registry import workloads
from proto.config import GuestConfig

ROOT = Path(__file__).parent.parent
SPEC = """
memory = "16MiB"
seconds = 100
vms = 3
policy = "hyperplace"
set.policy = { load_period = 29, load_latency_ns = 3 }
"""
TABLE_BYTES = 1 << 21
"""Addresses of leaf tables' first bytes are in a guest's memory anyway; a sampled one is hardly ever one of them."""
CHUNK = 1 << 22

Range = tuple[int, int]


def vmas(config: GuestConfig) -> list[Range]:
    """Address ranges [start, end) of the guest's program."""
    space = workloads()[config.workload].create(config).space
    return [(vma.start, vma.start + (vma.pages << 12)) for vma in space.vmas]


def mappings(pid: int) -> list[tuple[int, int, bool]]:
    """What a process has mapped and may read: start, end, and whether it shares it."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r..([ps])", line)
        if match and not line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
            found.append((int(match[1], 16), int(match[2], 16), match[3] == "s"))
    return found


def filled(pid: int, start: int, end: int, shared: bool) -> Iterator[Range]:
    """The parts of a mapping that can hold something: all of a shared one, which others may have written to; else what
    is in memory or swap (proc(5), pagemap: bits 63 and 62)."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        entries = np.frombuffer(os.pread(file.fileno(), (end - start) >> 9, start >> 9), np.uint64)
    there = np.flatnonzero(np.diff(np.r_[False, (entries >> np.uint64(62) != 0) | shared, False]))
    for first, last in zip(there[::2].tolist(), there[1::2].tolist(), strict=True):
        for part in range(start + (first << 12), start + (last << 12), CHUNK):
            yield part, min(part + CHUNK, start + (last << 12))


def sampled(pid: int, ranges: list[Range]) -> int:
    """Words in all memory of a process that are addresses in ``ranges`` as a sample has them."""
    found = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for mapping in mappings(pid):
            for start, end in filled(pid, *mapping):
                words = np.frombuffer(os.pread(file.fileno(), end - start, start), np.int64)
                for low, high in ranges:
                    hits = words[(words >= low) & (words < high)]
                    found += int(np.count_nonzero(hits % TABLE_BYTES))
    return found


def family(launcher: psutil.Process) -> dict[str, int]:
    """Processes of the fleet by name: launcher, zygote, host, vm0 and so on."""
    found = {"launcher": launcher.pid}
    for process in launcher.children(recursive=True):
        try:
            words = "".join(process.cmdline()).split()
        except psutil.Error:
            continue
        if words[:1] == ["fleet:"]:
            found[words[1]] = process.pid
    return found


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """All threads of all processes stand still inside."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            while any(state(Path(f"/proc/{pid}/task/{task}")) not in "Tt" for task in os.listdir(f"/proc/{pid}/task")):
                pass
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def state(task: Path) -> str:
    """R, S, T and so on (proc(5), stat)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def cpu_ticks(pid: int) -> int:
    """CPU that a process has used, in ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["ept-friendly", "shared"])
def test_sampled_addresses_are_in_their_guest_s_memory_and_in_no_other(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    setting = f"host.pebs={mode}"
    guests = load(path, {}, [setting]).guests()
    command = [sys.executable, "-m", "fleet", "run", path, "--set", setting, "--json", "--out", tmp_path / "out"]
    with subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL) as launched:
        launcher = psutil.Process(launched.pid)
        while len(pids := family(launcher)) < len(guests) + 3:
            assert launched.poll() is None
        try:
            found = search(guests, pids)
        finally:
            launched.send_signal(signal.SIGINT)
    if not found:
        return
    for victim, words in found.items():
        assert words.pop(victim) > 0, "its own memory has what it sampled"
        leaked = {name for name, count in words.items() if count}
        assert leaked == (set() if mode == "ept-friendly" else {"host", "vm0", "vm1", "vm2"} - {victim})


def search(guests: list[GuestConfig], pids: dict[str, int]) -> dict[str, dict[str, int]]:
    """Sampled addresses of a guest found in each process, by guest; empty for who may not look."""
    if os.geteuid() != 0:
        # Who is not root may not look into a guest at all, which is what there is to be seen then.
        for name, pid in pids.items():
            if name.startswith(("vm", "host")):
                with pytest.raises(PermissionError):
                    open(f"/proc/{pid}/mem", "rb").close()
        return {}
    first = f"vm{guests[0].vm}"
    while True:
        used = cpu_ticks(pids[first])
        while cpu_ticks(pids[first]) <= used + 5:
            pass
        with stopped(list(pids.values())):
            if not all(sampled(pids[f"vm{guest.vm}"], vmas(guest)) for guest in guests):
                continue
            taken = [(start, end) for pid in pids.values() for start, end, _ in mappings(pid)]
            clear = [
                guest for guest in guests if not any(overlap(one, other) for one in vmas(guest) for other in taken)
            ]
            assert clear
            return {f"vm{guest.vm}": {name: sampled(pid, vmas(guest)) for name, pid in pids.items()} for guest in clear}


def overlap(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]
