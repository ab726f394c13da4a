"""The experiment spec: a TOML file and command-line flags, resolved into a complete `Experiment` or refused.

Keys of the file are those of ``fleet run``; ``[[group]]`` tables give tenants of their own, whose keys override those
of the top level, as flags override both. ``set`` (a table in the file, ``--set`` on the command line) reaches the
parameters of policy, workload, host profile, guest kernel and engine by ``space.key``. Everything is checked here, at
the edge, so that nothing is started on a bad value.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from fleet import hosts
from fleet.errors import ProfileError, SpecError
from fleet.experiment import Experiment, Tenant, scaled_pages, scaled_transactions
from fleet.names import unknown
from fleet.spec_file import read_toml
from fleet.spec_layers import (
    GROUP_KEYS,
    RUN_KEYS,
    SPACES,
    STAGE_KEYS,
    Layer,
    flag_layer,
    layers,
    one_end,
    overlay,
    setting_layer,
    setting_name,
    space_of,
)
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS, engine_config, guest_kernel, host_kernel
from fleet.spec_trace import check_trace
from fleet.spec_values import Given, exact_size, exact_time, fraction, integer, is_file, parameter, size, text, time_ps
from guestd.params import Param
from proto.config import Scalar
from proto.costs import Costs
from proto.entry import MAX_PAGES, MAX_VMS
from proto.units import PAGE_SIZE, PS_PER_MS, PS_PER_S, TABLE_PAGES

if TYPE_CHECKING:
    from guestd.tiering.stage import Stage

MIN_MEMORY = 16 << 20
MAX_MEMORY = MAX_PAGES * PAGE_SIZE
MEMORY_STEP = TABLE_PAGES * PAGE_SIZE
"""A VM's memory is a whole number of leaf page tables."""
MAX_VCPUS = 256
MAX_SEED = (1 << 63) - 1
MAX_TIME_PS = 10**6 * PS_PER_S
"""Virtual time is an int64 of picoseconds, 106 days; runs stay well below."""

DEFAULTS: dict[str, object] = {
    "name": "", "seed": 1, "clock": "virtual", "host": hosts.DEFAULT_PROFILE, "scale": 1, "sample": "100ms",
    "heat": False, "hang_timeout": "60s", "vms": 1, "policy": "none", "workload": "gups", "vcpus": 1,
    "memory": "512MiB", "fast_ratio": 0.2, "seconds": 10, "start": 0,
}  # fmt: skip
_HEAT = Param("heat", False, "", "record page heat by gVA, gPA and hPA", "guestd/heat.py")
_HOST_NAMES = frozenset(param.name for param in HOST_PARAMS)
"""Keys of the space `host` that are no costs."""


class Kind(Protocol):
    """What the spec needs to know of a policy or a workload."""

    @property
    def params(self) -> tuple[Param, ...]: ...
    @property
    def min_memory_bytes(self) -> int: ...


class PolicyKind(Kind, Protocol):
    """What the spec needs to know of a policy."""

    @property
    def view(self) -> str: ...
    @property
    def fast_share(self) -> Fraction | None: ...
    @property
    def min_fast_ratio(self) -> Fraction: ...
    @property
    def shares_fast(self) -> bool: ...
    @property
    def min_run_ps(self) -> Callable[[dict[str, Scalar]], int]: ...


K = TypeVar("K", bound=Kind)


class Registries(NamedTuple):
    """Policies, workloads, and stages of policies by name; how a policy gets other stages."""

    policies: Mapping[str, PolicyKind]
    workloads: Mapping[str, Kind]
    stages: "Mapping[str, Stage]" = MappingProxyType({})
    policy_of: Callable[[str, Mapping[str, str]], PolicyKind] | None = None


def installed() -> Registries:
    """Those of this installation, third parties' included."""
    from guestd.tiering.policy import PluginError
    from guestd.tiering.registry import policies, policy_of, stages
    from guestd.workloads.registry import workloads

    try:
        return Registries(policies(), workloads(), stages(), policy_of)
    except PluginError as error:
        raise SpecError(str(error)) from error


def load(
    path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    settings: Sequence[str] = (),
    registries: Registries | None = None,
) -> Experiment:
    """The experiment of a spec file (None: defaults) under flags (by key; None = not given) and ``key=value`` settings.

    Raises SpecError or ProfileError.
    """
    data, where, folder = (read_toml(path), path.name, path.parent) if path else ({}, "", Path())
    if "axes" in data:
        raise SpecError(f"{path}: has [axes], so it is a sweep: fleet sweep {path}")
    return resolve(data, where, folder, flag_layer(flags or {}) | setting_layer(settings), registries)


def resolve(
    data: Mapping[str, Any], where: str, folder: Path, overrides: Layer, registries: Registries | None = None
) -> Experiment:
    """The experiment of a spec's content; ``overrides`` by full key (``vms``, ``policy.scan_period``) act as flags do.

    ``where`` names it in errors; ``folder``: file names start from there. Raises SpecError or ProfileError.
    """
    top, groups, costs = layers(data, where, folder)
    return _Resolver(top, groups, costs, one_end(overrides), registries or installed()).experiment()


def check_key(key: str, where: str) -> str:
    """``key`` if it can override something. Raises SpecError."""
    if "." in key:
        return setting_name(key, where, SPACES)
    if key not in (*RUN_KEYS, *GROUP_KEYS):
        raise SpecError(where + unknown("key", key, (*RUN_KEYS, *GROUP_KEYS)) + " (a parameter is SPACE.KEY)")
    return key


class _Resolver:
    """One pass over the layers of one experiment."""

    def __init__(
        self, top: Layer, groups: list[Layer], costs: Given | None, flags: Layer, registries: Registries
    ) -> None:
        self.top, self.groups, self.costs, self.flags = top, groups, costs, flags
        self.registries = registries
        # What the file sets for all groups may belong to a policy (or workload) that a flag has displaced.
        shared = {key: given for key, given in top.items() if space_of(key) not in flags}
        self.unused = {key: given for key, given in (shared | flags).items() if space_of(key)}
        self.offered: dict[str, set[str]] = {space: set() for space in SPACES}

    def experiment(self) -> Experiment:
        layer = overlay(self.top, self.flags)
        run = _defaults() | layer
        _check_clock(run["clock"])
        scale = _scale(run["scale"])
        costs, host_overrides = self._host(run["host"], layer)
        # Costs share the space `host`; `_host` has judged its names.
        kernel = host_kernel(self._parameters("host", "the host's kernel", HOST_PARAMS, {}, layer))
        engine = engine_config(self._parameters("engine", "the engine", ENGINE_PARAMS, layer, layer))
        tenants = tuple(self._tenant(group, scale) for group in self.groups)
        for key, given in self.unused.items():
            space, name = key.split(".", 1)
            raise given.refuse(unknown(f"{space} parameter", name, self.offered[space]))
        if (vms := sum(tenant.vms for tenant in tenants)) > MAX_VMS:
            raise SpecError(f"vms: {vms} VMs in all; a host has at most {MAX_VMS}")
        self._check_host_side(engine.quantum_ps, kernel.populate, tenants)
        sample = _bounded_time(run["sample"], PS_PER_MS, MAX_TIME_PS)
        if sample < engine.quantum_ps:
            raise run["sample"].refuse(
                f"{run['sample'].raw} is shorter than engine.quantum ({engine.quantum_ps // PS_PER_MS}ms); "
                "nothing is sampled between two barriers"
            )
        return Experiment(
            name=_name(run["name"]),
            seed=integer(run["seed"], 0, MAX_SEED),
            clock="virtual",
            host=_host_name(run["host"]),
            host_overrides=host_overrides,
            host_kernel=kernel,
            costs=costs,
            scale=scale,
            engine=engine,
            sample_ps=sample,
            heat=bool(parameter(_HEAT, run["heat"])),
            hang_timeout_s=_bounded_time(run["hang_timeout"], PS_PER_S, MAX_TIME_PS) / PS_PER_S,
            tenants=tenants,
        )

    def _check_host_side(self, quantum_ps: int, populate: bool, tenants: tuple[Tenant, ...]) -> None:
        """A host acts on a VM at barriers: with several ticks between two, it would look at the same A bits twice."""
        for tenant in tenants:
            if populate and self.registries.policies[tenant.policy].view == "host":
                raise SpecError(
                    f"host.populate: pins all memory, of which the host-side policy {tenant.policy!r} could move none; "
                    "take a policy that works in the guest, or leave host.populate=false"
                )
            tick_ps = PS_PER_S // tenant.kernel.hz
            if self.registries.policies[tenant.policy].view == "host" and quantum_ps > tick_ps:
                raise SpecError(
                    f"engine.quantum: {exact_time(quantum_ps)} is longer than a tick ({exact_time(tick_ps)} at "
                    f"guest.hz={tenant.kernel.hz}), which the host-side policy {tenant.policy!r} cannot do with; "
                    f"set engine.quantum={exact_time(tick_ps)} or less"
                )

    def _host(self, given: Given, layer: Layer) -> tuple[Costs, dict[str, str]]:
        profile = None
        if self.costs is not None and "host" not in self.flags:
            costs = _costs(self.costs)
        else:
            profile = hosts.load_profile(text(given), given.base)
            costs = hosts.costs(profile)
        overrides = {}
        for key in [key for key in layer if space_of(key) == "host"]:
            name, value = key.removeprefix("host."), str(layer[key].raw)
            if name in _HOST_NAMES:
                continue
            if name not in hosts.figure_keys():
                raise layer[key].refuse(unknown("cost or host parameter", name, (*hosts.figure_keys(), *_HOST_NAMES)))
            try:
                costs = hosts.override(costs, name, value, profile)
            except ProfileError as error:
                raise SpecError(f"{layer[key].where}: {error}" if layer[key].where != "--set" else str(error)) from None
            overrides[name] = hosts.exact(costs, name)
            self.unused.pop(key, None)
        return costs, overrides

    def _tenant(self, group: Layer, scale: Fraction) -> Tenant:
        for space in ("policy", "workload"):
            displaced = overlay(_defaults(), self.top, group)[space].raw
            if space in self.flags and self.flags[space].raw != displaced:
                group = {key: given for key, given in group.items() if space_of(key) != space}
        layer = overlay(self.top, group, self.flags)
        values = overlay(_defaults(), layer)
        policy_name, policy = _choose("policy", values["policy"], self.registries.policies)
        stages = {key: self._stage(key, values[key]) for key in STAGE_KEYS if key in values and values[key].raw}
        if stages:
            policy = self._with_stages(policy_name, stages, values)
        workload_name, workload = _choose("workload", values["workload"], self.registries.workloads)
        memory = _memory(
            values["memory"], scale, {f"policy {policy_name}": policy, f"workload {workload_name}": workload}
        )
        ratio = fraction(values["fast_ratio"])
        if not 0 <= ratio <= 1:
            raise values["fast_ratio"].refuse(f"must be between 0 and 1, not {values['fast_ratio'].raw}")
        if ratio < policy.min_fast_ratio:
            raise values["fast_ratio"].refuse(
                f"must be {policy.min_fast_ratio} at least for policy {policy_name!r}, not {values['fast_ratio'].raw}: "
                "in flat memory mode each slow line shares a fast one"
            )
        run_ps, transactions = _until(values)
        policy_params = self._parameters("policy", f"policy {policy_name!r}", policy.params, group, layer)
        if run_ps and run_ps < (needed := policy.min_run_ps(policy_params)):
            raise values["seconds"].refuse(
                f"{values['seconds'].raw} is too short for policy {policy_name!r}, which acts for the first time after "
                f"{exact_time(needed)}; run it for longer, or set what its parameters say when it acts"
            )
        if transactions and scaled_transactions(transactions, scale) >= 1 << 62:
            raise values["transactions"].refuse("is too large")
        kernel = self._parameters("guest", "the guest kernel", GUEST_PARAMS, group, layer)
        workload_params = self._parameters("workload", f"workload {workload_name!r}", workload.params, group, layer)
        files = tuple(param.name for param in workload.params if is_file(param))
        for name in files:
            if not workload_params[name]:
                raise SpecError(f"workload {workload_name!r} needs a file: --set workload.{name}=FILE")
        if workload_name == "trace":
            check_trace(str(workload_params["file"]), scaled_pages(memory, scale), MEMORY_STEP)
        return Tenant(
            vms=integer(values["vms"], 1, MAX_VMS),
            policy=policy_name,
            policy_params=policy_params,
            stages=stages,
            workload=workload_name,
            workload_params=workload_params,
            vcpus=integer(values["vcpus"], 1, MAX_VCPUS),
            memory_bytes=memory,
            fast_ratio=ratio if policy.fast_share is None else policy.fast_share,
            start_ps=_bounded_time(values["start"], 0, MAX_TIME_PS),
            run_ps=run_ps,
            transactions=transactions,
            kernel=guest_kernel(kernel),
            files=files,
            weight=int(policy_params["weight"]) if policy.shares_fast else 0,
        )

    def _stage(self, kind: str, given: Given) -> str:
        name = text(given)
        fitting = [name for name, stage in self.registries.stages.items() if stage.kind == kind]
        if name not in fitting:
            raise given.refuse(unknown(kind, name, fitting))
        return name

    def _with_stages(self, policy: str, stages: dict[str, str], values: Layer) -> PolicyKind:
        from guestd.tiering.stage import StageError

        assert self.registries.policy_of is not None
        try:
            return self.registries.policy_of(policy, stages)
        except StageError as error:
            raise values[next(iter(stages))].refuse(str(error)) from None

    def _parameters(
        self, space: str, owner: str, params: tuple[Param, ...], own: Layer, layer: Layer
    ) -> dict[str, Scalar]:
        """Every parameter's value. One set for all groups must fit at least one of them; a group's own must fit it."""
        self.offered[space] |= {param.name for param in params}
        given = {key.split(".", 1)[1]: value for key, value in layer.items() if space_of(key) == space}
        names = {param.name for param in params}
        for name, value in given.items():
            if name not in names and f"{space}.{name}" in own:
                raise value.refuse(unknown(f"parameter of {owner}:", name, names))
            if name in names:
                self.unused.pop(f"{space}.{name}", None)
        return {
            param.name: parameter(param, given[param.name]) if param.name in given else param.default
            for param in params
        }


def _defaults() -> Layer:
    return {key: Given(value, f"default of {key}", Path()) for key, value in DEFAULTS.items()}


def _choose(what: str, given: Given, registry: Mapping[str, K]) -> tuple[str, K]:
    name = text(given)
    if name not in registry:
        raise given.refuse(unknown(what, name, registry))
    return name, registry[name]


def _check_clock(given: Given) -> None:
    if given.raw == "realtime":
        raise given.refuse("'realtime' is not yet there; use 'virtual'")
    if given.raw != "virtual":
        raise given.refuse(unknown("clock", str(given.raw), ("virtual", "realtime")))


def _scale(given: Given) -> Fraction:
    scale = fraction(given)
    if not 0 < scale <= 1:
        raise given.refuse(f"must be above 0 and at most 1, e.g. 1/16, not {given.raw}")
    return scale


def _memory(given: Given, scale: Fraction, kinds: Mapping[str, Kind]) -> int:
    declared = size(given)
    scaled = declared * scale
    after = f" after scale {scale}" if scale != 1 else ""
    shown = f"{given.raw}{after}"
    if scaled.denominator != 1 or int(scaled) % MEMORY_STEP:
        below = int(scaled) // MEMORY_STEP * MEMORY_STEP or MIN_MEMORY
        raise given.refuse(f"{shown} is not a multiple of 2MiB; {exact_size(round(below / scale))} would be")
    if not MIN_MEMORY <= scaled <= MAX_MEMORY:
        raise given.refuse(f"{shown} must be between {exact_size(MIN_MEMORY)} and {exact_size(MAX_MEMORY)}")
    for name, kind in kinds.items():
        if scaled < kind.min_memory_bytes:
            raise given.refuse(f"{shown} is too small; {name} needs at least {exact_size(kind.min_memory_bytes)}")
    return declared


def _until(values: Layer) -> tuple[int, int]:
    """Virtual run time in ps and transactions, one of them 0."""
    if "transactions" in values:
        return 0, integer(values["transactions"], 1, 1 << 62)
    return _bounded_time(values["seconds"], PS_PER_MS, MAX_TIME_PS), 0


def _bounded_time(given: Given, low: int, high: int) -> int:
    ps = time_ps(given)
    if not low <= ps <= high:
        raise given.refuse(f"must be between {low / PS_PER_S:g}s and {high // PS_PER_S}s, not {given.raw}")
    return ps


def _name(given: Given) -> str:
    """A run's name is a directory's name too."""
    if given.raw == "":
        return ""
    name = text(given)
    if "/" in name or name in (".", ".."):
        raise given.refuse(f"{name!r} must be usable as the name of a directory, without '/'")
    return name


def _host_name(given: Given) -> str:
    name = text(given)
    return Path(name).name.removesuffix(".toml")


def _costs(given: Given) -> Costs:
    """The complete, resolved costs of a spec that a run wrote."""
    try:
        return hosts.checked(msgspec.convert(given.raw, Costs, strict=True), given.where)
    except msgspec.ValidationError as error:
        raise given.refuse(f"{error}; take the table out to use the host profile") from None
