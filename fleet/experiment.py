"""A resolved experiment: complete, valid, frozen. What is run, what ``spec.toml`` says, what the spec's digest covers.

Sizes are kept as declared, before ``scale``; `Experiment.guests` applies it. Made by `fleet.spec`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from fleet.spec_values import exact_size, exact_time
from fleet.weighted_sharing import weighted_shares
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.units import PAGE_SIZE, PS_PER_S

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Tenant:
    """A group of VMs that are alike."""

    vms: int
    policy: str
    policy_params: dict[str, Scalar]
    workload: str
    workload_params: dict[str, Scalar]
    vcpus: int
    memory_bytes: int
    """Of each VM, before scale."""
    fast_ratio: Fraction
    """Share of the memory that is fast."""
    start_ps: int
    run_ps: int
    """0 = until `transactions`."""
    transactions: int
    """Of each VM, before scale; 0 = until `run_ps`."""
    kernel: GuestKernel
    stages: dict[str, str] = field(default_factory=dict)
    """Stages of the policy that were exchanged: tracker, classifier or migrator -> name."""
    files: tuple[str, ...] = ()
    """Parameters of the workload that name a file."""
    weight: int = 0
    """By which its VMs share fast memory with all others that have one; 0 = what they have is their own."""


@dataclass(frozen=True)
class Experiment:
    """One run."""

    name: str
    seed: int
    clock: str
    host: str
    """Name of the host profile that `costs` come from."""
    host_overrides: dict[str, str]
    """Costs that were set one by one, as text with units; already in `costs`."""
    host_kernel: HostKernel
    costs: Costs
    scale: Fraction
    """Factor on every memory size, those of L2 and LLC too, and on transaction counts."""
    engine: EngineConfig
    sample_ps: int
    heat: bool
    """Record page heat by gVA, gPA and hPA."""
    hang_timeout_s: float
    tenants: tuple[Tenant, ...]

    def guests(
        self,
        log_path: Callable[[int], Path | str] = lambda vm: "",
        events_path: Callable[[int], Path | str] = lambda vm: "",
        heat_path: Callable[[int], Path | str] = lambda vm: "",
    ) -> list[GuestConfig]:
        """One config per VM, numbered from 0 through the tenants; the callables name each VM's files."""
        owners = [tenant for tenant in self.tenants for _ in range(tenant.vms)]
        first = list(accumulate((tenant.vcpus for tenant in owners), initial=0))
        pages = self._pages(owners)
        return [
            self._guest(vm, tenant, pages[vm], (first[vm], first[-1]), str(log_path(vm)), str(events_path(vm)),
                        str(heat_path(vm)) if self.heat else "")
            for vm, tenant in enumerate(owners)
        ]  # fmt: skip

    def host_config(self, log_path: Path | str = "") -> HostConfig:
        """What the host process needs to know."""
        return HostConfig(
            costs=self._scaled_costs(),
            engine=self.engine,
            sample_ps=self.sample_ps,
            kernel=self.host_kernel,
            hang_timeout_s=self.hang_timeout_s,
            log_path=str(log_path),
        )

    def to_toml(self) -> str:
        """A complete spec file: reading it gives this experiment, whatever the defaults and profiles are by then."""
        return _toml(self)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that says what is run, as ``sha256:...``: not the name, and files by their content."""
        return "sha256:" + hashlib.sha256(json.dumps(_canonical(self), sort_keys=True).encode()).hexdigest()

    def _scaled_costs(self) -> Costs:
        """Caches shrink with the memory that they are in front of: what share of it they hold stays."""
        sizes = {name: max(1, int(getattr(self.costs, name) * self.scale)) for name in ("l2_bytes", "llc_bytes")}
        return msgspec.structs.replace(self.costs, **sizes)

    def _pages(self, owners: Sequence[Tenant]) -> list[tuple[int, int]]:
        """Pages of each VM: all, and fast ones, which those with a weight have pooled."""
        total = [scaled_pages(tenant.memory_bytes, self.scale) for tenant in owners]
        fast = [round(pages * tenant.fast_ratio) for pages, tenant in zip(total, owners, strict=True)]
        sharing = [vm for vm, tenant in enumerate(owners) if tenant.weight]
        weights = [owners[vm].weight for vm in sharing]
        shares = weighted_shares([total[vm] for vm in sharing], weights, sum(fast[vm] for vm in sharing))
        for vm, share in zip(sharing, shares, strict=True):
            fast[vm] = share
        return list(zip(total, fast, strict=True))

    def _guest(
        self, vm: int, tenant: Tenant, pages: tuple[int, int], vcpu_range: tuple[int, int],
        log_path: str, events_path: str, heat_path: str,
    ) -> GuestConfig:  # fmt: skip
        total, fast = pages
        return GuestConfig(
            vm=vm,
            name=f"vm{vm}",
            seed=vm_seed(self.seed, vm),
            vcpus=tenant.vcpus,
            first_vcpu=vcpu_range[0],
            fleet_vcpus=vcpu_range[1],
            total_pages=total,
            fast_pages=fast,
            slow_pages=total - fast,
            policy=tenant.policy,
            policy_params=tenant.policy_params,
            stages=tenant.stages,
            workload=tenant.workload,
            workload_params=tenant.workload_params,
            run_ps=tenant.run_ps,
            transactions=scaled_transactions(tenant.transactions, self.scale),
            start_ps=tenant.start_ps,
            sample_ps=self.sample_ps,
            engine=self.engine,
            kernel=tenant.kernel,
            host=self.host_kernel,
            costs=self._scaled_costs(),
            log_path=log_path,
            events_path=events_path,
            heat_path=heat_path,
        )


def scaled_pages(memory_bytes: int, scale: Fraction) -> int:
    """Pages of a VM after scale (a whole number: fleet.spec checked it)."""
    return int(memory_bytes * scale) // PAGE_SIZE


def scaled_transactions(transactions: int, scale: Fraction) -> int:
    """Transactions after scale: 0 stays 0, anything else is at least 1."""
    return max(1, round(transactions * scale)) if transactions else 0


def vm_seed(seed: int, vm: int) -> int:
    """Seed of one VM: the (vm+1)-th output of SplitMix64 started at the run's seed, as a 63-bit integer.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = (seed + (vm + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


def _canonical(experiment: Experiment) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(experiment, enc_hook=str)
    for key in ("name", "host_overrides"):
        del plain[key]
    for tenant, source in zip(plain["tenants"], experiment.tenants, strict=True):
        del tenant["weight"]  # one of policy_params
        for name in tenant.pop("files"):
            path = str(source.workload_params[name])
            tenant["workload_params"][name] = _content_digest(path) if path else ""
    return plain


@cache
def _content_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _toml(experiment: Experiment) -> str:
    top: dict[str, object] = {
        "name": experiment.name,
        "seed": experiment.seed,
        "clock": experiment.clock,
        "host": experiment.host,
        "scale": str(experiment.scale),
        "sample": exact_time(experiment.sample_ps),
        "heat": experiment.heat,
        "hang_timeout": exact_time(round(experiment.hang_timeout_s * PS_PER_S)),
    }
    engine = experiment.engine
    settings: dict[str, object] = {
        "engine.quantum": exact_time(engine.quantum_ps),
        "engine.slice": exact_time(engine.slice_ps),
        "engine.block": engine.block,
    }
    settings |= {f"host.{key}": value for key, value in _host_settings(experiment.host_kernel).items()}
    settings |= {f"host.{key}": text for key, text in experiment.host_overrides.items()}
    costs = msgspec.to_builtins(experiment.costs)
    tiers = {tier: costs.pop(tier) for tier in ("fast", "slow")}
    parts = ["# The resolved experiment, complete: fleet run THIS_FILE repeats it.\n", _lines(top)]
    parts += ["\n[set]\n", _lines(settings)]
    parts += [
        "\n# The host profile as it was, with what was set: ps, bytes, bytes/s, thousandths.\n[costs]\n",
        _lines(costs),
    ]
    for tier, table in tiers.items():
        parts += [f"\n[costs.{tier}]\n", _lines(table)]
    for tenant in experiment.tenants:
        parts += ["\n[[group]]\n", _lines(_tenant(tenant)), "\n[group.set]\n", _lines(_settings(tenant))]
    return "".join(parts)


def _tenant(tenant: Tenant) -> dict[str, object]:
    until = {"transactions": tenant.transactions} if tenant.transactions else {"seconds": exact_time(tenant.run_ps)}
    return {
        "vms": tenant.vms,
        "policy": tenant.policy,
        **tenant.stages,
        "workload": tenant.workload,
        "vcpus": tenant.vcpus,
        "memory": exact_size(tenant.memory_bytes),
        "fast_ratio": str(tenant.fast_ratio),
        "start": exact_time(tenant.start_ps),
        **until,
    }


def _host_settings(kernel: HostKernel) -> dict[str, object]:
    settings: dict[str, object] = msgspec.structs.asdict(kernel)
    for name in ("sched_slice", "pml_harvest"):
        settings[name] = exact_time(getattr(kernel, f"{name}_ps"))
        del settings[f"{name}_ps"]
    return settings


def _settings(tenant: Tenant) -> dict[str, object]:
    kernel = msgspec.structs.asdict(tenant.kernel)
    for name in ("sched_slice", "khugepaged_scan_sleep"):
        kernel[name] = exact_time(kernel.pop(f"{name}_ps"))
    spaces = {"policy": tenant.policy_params, "workload": tenant.workload_params, "guest": kernel}
    return {f"{space}.{key}": value for space, values in spaces.items() for key, value in values.items()}


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{_key(key)} = {toml_value(value)}\n" for key, value in table.items())


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else toml_value(key)


def toml_value(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\u007f")
        return f'"{escaped}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)
