"""Stages: the three parts of which a tiering design is made, and how any of them work together (architecture 1).

A *tracker* finds out which pages are accessed and hands on `Evidence`; a *classifier* keeps what it learnt and ranks
pages; a *migrator* moves them. They know each other by these three interfaces only, so that a tracker of one design
works with the classifier and migrator of another, unless a stage `needs` what the others do not give. Every call books
itself to its own stage, whoever makes it. One that couples its work to another's (TPP promotes in the fault that also
tracks) says so by what it needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from guestd.meter import CLASSIFY, MIGRATE, STAGES, TRACK
from guestd.params import Param
from guestd.tiering.policy import AgentThread, HintRule, Params, Policy, Sampling, Tiering
from guestd.tiering.view import PageView
from proto.arrays import Mask, Words

Kind = Literal["tracker", "classifier", "migrator"]
KINDS: tuple[Kind, ...] = ("tracker", "classifier", "migrator")

SAMPLES = "PEBS samples"
FAULTS = "hint faults"
FAULT_AGES = "the time between protection and fault"
ACCESSED = "accessed bits"
DIRTY = "dirty bits"
DIRTY_LOG = "harvests of the log of dirty pages"


class StageError(Exception):
    """Stages that do not go together; the message names both sides."""


@dataclass(frozen=True)
class Stage:
    """Declaration of a stage. ``create``: its class. ``views``: where it can work.

    ``gives`` and ``needs``: what it hands to the other two stages and cannot do without from them.
    ``min_run_ps``: virtual time after which it has acted for the first time, by its parameters.
    """

    name: str
    kind: Kind
    summary: str
    source: str
    create: Callable[[PageView, Params], Any]
    params: tuple[Param, ...] = ()
    views: tuple[str, ...] = ("guest", "host")
    gives: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    sampling: Callable[[Params], Sampling | None] = field(default=lambda params: None)
    logs_dirty: bool = False
    """See `Policy.logs_dirty`, and the next two there."""
    flat_memory: bool = False
    orchestrate: Callable[[Sequence[Tiering]], None] | None = None
    warm_up: Params = field(default_factory=dict)
    min_run_ps: Callable[[Params], int] = field(default=lambda params: 0)


class Evidence:
    """What a tracker found: n accesses, each with its page and address (one of them given, the other found on demand).

    ``writes``: bool[n], accesses that are known to be writes (None: unknown, none). ``age_ps``: int64[n], time between
    the page's protection and its fault (None: not known).
    """

    def __init__(self, view: PageView, *, pages: Words | None = None, addresses: Words | None = None,
                 writes: Mask | None = None, age_ps: Words | None = None) -> None:  # fmt: skip
        self._view, self._pages, self._addresses = view, pages, addresses
        self._writes = writes
        self.age_ps = age_ps

    @property
    def size(self) -> int:
        """Number of accesses."""
        given = self._pages if self._pages is not None else self._addresses
        return 0 if given is None else given.size

    @cached_property
    def pages(self) -> Words:
        """int64[n], -1 for an address that no table maps. Finding it from an address costs a walk of the page table."""
        if self._pages is None:
            assert self._addresses is not None
            return self._view.pages_at(self._addresses)
        return self._pages

    @cached_property
    def addresses(self) -> Words:
        """int64[n], in the view's address space."""
        if self._addresses is None:
            assert self._pages is not None
            return self._view.addresses(self._pages)
        return self._addresses

    @cached_property
    def writes(self) -> Mask:
        """bool[n]"""
        return np.zeros(self.size, np.bool_) if self._writes is None else self._writes


class _StageBase:
    kind: Kind
    books = TRACK
    never_sleeps = False
    """It has a thread that is always running (`Tiering.by_definition`)."""

    def __init__(self, view: PageView, params: Params) -> None:
        self.view = view
        self.params = params

    def schedule(self, name: str, at_ps: int) -> None:
        """Ask for `on_timer(name)` of this stage at a virtual time."""
        self.view.schedule(f"{self.kind}.{name}", at_ps)

    def start(self) -> None:
        """The VM begins to run (before populating)."""

    def on_timer(self, name: str) -> None:
        """A timer set with `schedule` is due; booked to this stage."""

    def thread_of(self, name: str) -> AgentThread:
        """The thread that `on_timer(name)` runs on."""
        return AgentThread()


class Tracker(_StageBase):
    """Finds out which pages are accessed. ``classifier`` and ``migrator`` are set before `start`."""

    kind: Kind = "tracker"
    books = TRACK
    drains_at_context_switch = False
    classifier: "Classifier"
    migrator: "Migrator"

    def on_samples(self, samples: Words) -> None:
        """See `Tiering.on_samples`; booked to `track`."""

    def on_hint_faults(self, pages: Words) -> Words:
        """See `Tiering.on_hint_faults`; booked to `track`."""
        self.view.unprotect(pages)
        return np.full(pages.size, self.view.hint_fault_ps, np.int64)

    def hint_rule(self) -> HintRule | None:
        """See `Tiering.hint_rule`."""
        return None

    def on_failed(self, pages: int) -> None:
        """The migrator could not promote as many of the pages that a fault had brought."""


class Classifier(_StageBase, ABC):
    """Ranks pages. A subclass defines the methods that begin with an underscore, which are booked to `classify`."""

    kind: Kind = "classifier"
    books = CLASSIFY
    wants_ages = False
    """It judges faults by `Evidence.age_ps`; a tracker that gives FAULT_AGES keeps the times for it."""
    migrator: "Migrator"

    def observe(self, evidence: Evidence) -> None:
        """Learn from what the tracker found."""
        with self.view.meter.stage(CLASSIFY):
            self._observe(evidence)

    def on_faults(self, evidence: Evidence) -> Mask:
        """Learn from hint faults, each page once; which of them should be fast memory's, at once (bool[n])."""
        with self.view.meter.stage(CLASSIFY):
            return self._on_faults(evidence)

    def end_of_round(self) -> None:
        """The tracker went once through all memory, or through all samples that there were."""
        with self.view.meter.stage(CLASSIFY):
            self._end_of_round()

    def promotions(self, limit: int) -> Words:
        """Units in slow memory that should be in fast memory, hottest first, up to ``limit`` pages (int64[n])."""
        with self.view.meter.stage(CLASSIFY):
            return self._promotions(limit)

    def demotions(self, need: int) -> Words:
        """Units in fast memory to give up for these, coldest first, up to ``need`` pages (int64[n])."""
        with self.view.meter.stage(CLASSIFY):
            return self._demotions(need)

    def splittable(self, limit: int) -> Words:
        """Up to ``limit`` huge pages that are better split, the best first (int64[n])."""
        with self.view.meter.stage(CLASSIFY):
            return self._splittable(limit)

    def hot_set(self) -> Words | None:
        """Pages that it believes hot now (int64[n]), None if it has no such notion; the emulator asks, unbooked."""
        return None

    @abstractmethod
    def _observe(self, evidence: Evidence) -> None: ...

    def _on_faults(self, evidence: Evidence) -> Mask:
        self._observe(evidence)
        return np.isin(evidence.pages, self._promotions(self.view.pages))

    def _end_of_round(self) -> None:
        pass

    @abstractmethod
    def _promotions(self, limit: int) -> Words: ...

    @abstractmethod
    def _demotions(self, need: int) -> Words: ...

    def _splittable(self, limit: int) -> Words:
        return np.zeros(0, np.int64)


class Migrator(_StageBase):
    """Moves pages. ``reclaim_mark``: see `Tiering`."""

    kind: Kind = "migrator"
    books = MIGRATE
    reclaim_mark: int | None = None
    classifier: Classifier
    tracker: Tracker

    def on_ranking(self) -> None:
        """The classifier has a new ranking."""

    def on_faults(self, pages: Words, wanted: Mask, cost_ps: Words) -> None:
        """Hint faults on ``pages`` (int64[n]), which the classifier wants to be fast or not (bool[n]).

        One that promotes here adds what that cost each fault's vCPU to ``cost_ps`` (int64[n]).
        """

    def on_dirty(self, pages: Words) -> None:
        """The tracker has harvested the log of dirty pages: what was written since it did so before (int64[n])."""

    def on_pressure(self, budget_ps: int) -> None:
        """See `Tiering.on_pressure`."""

    def on_write_fault(self, page: int) -> int:
        """See `Tiering.on_write_fault`; booked to `migrate`."""
        raise NotImplementedError(f"page {page} is write-protected, and the migrator protects none")


class Staged(Tiering):
    """A policy that is composed of stages."""

    def __init__(self, view: PageView, params: Params, stages: Mapping[Kind, Stage]) -> None:
        super().__init__(view, params)
        self.tracker: Tracker = stages["tracker"].create(view, params)
        self.classifier: Classifier = stages["classifier"].create(view, params)
        self.migrator: Migrator = stages["migrator"].create(view, params)
        self.tracker.classifier, self.tracker.migrator = self.classifier, self.migrator
        self.classifier.migrator = self.migrator
        self.migrator.classifier, self.migrator.tracker = self.classifier, self.tracker
        self.drains_at_context_switch = self.tracker.drains_at_context_switch
        self._stages: dict[str, _StageBase] = {
            "tracker": self.tracker, "classifier": self.classifier, "migrator": self.migrator,
        }  # fmt: skip
        self.hint_rule = self.tracker.hint_rule()
        self.by_definition = tuple(STAGES[stage.books] for stage in self._stages.values() if stage.never_sleeps)

    @property
    def reclaim_mark(self) -> int | None:  # type: ignore[override]
        """The migrator's, which may change it at any time."""
        return self.migrator.reclaim_mark

    def start(self) -> None:
        for stage in self._stages.values():
            with self.view.meter.stage(stage.books):
                stage.start()

    def on_timer(self, name: str) -> None:
        kind, _, own = name.partition(".")
        stage = self._stages[kind]
        with self.view.meter.stage(stage.books):
            stage.on_timer(own)

    def thread_of(self, name: str) -> AgentThread:
        kind, _, own = name.partition(".")
        return self._stages[kind].thread_of(own)

    def on_samples(self, samples: Words) -> None:
        with self.view.meter.stage(TRACK):
            self.tracker.on_samples(samples)

    def on_hint_faults(self, pages: Words) -> Words:
        with self.view.meter.stage(TRACK):
            return self.tracker.on_hint_faults(pages)

    def on_pressure(self, budget_ps: int) -> None:
        with self.view.meter.stage(MIGRATE):
            self.migrator.on_pressure(budget_ps)

    def on_write_fault(self, page: int) -> int:
        with self.view.meter.stage(MIGRATE):
            return self.migrator.on_write_fault(page)

    def hot_set(self) -> Words | None:
        """See `Classifier.hot_set`."""
        return self.classifier.hot_set()


def composed(policy: Policy, tracker: Stage, classifier: Stage, migrator: Stage) -> Policy:
    """``policy`` (name, view, source, ...) made of these stages: its own parameters, and theirs with its defaults.

    A parameter that several of them declare alike is one.

    Raises StageError if they do not go together.
    """
    stages: dict[Kind, Stage] = {"tracker": tracker, "classifier": classifier, "migrator": migrator}
    _check(policy, stages)
    declared = dict.fromkeys([*policy.own_params, *(param for stage in stages.values() for param in stage.params)])
    params = tuple(param._replace(default=policy.defaults.get(param.name, param.default)) for param in declared)
    return replace(
        policy,
        stages={kind: stage.name for kind, stage in stages.items()},
        create=lambda view, given: Staged(view, given, stages),
        params=params,
        sampling=tracker.sampling,
        logs_dirty=any(stage.logs_dirty for stage in stages.values()),
        flat_memory=any(stage.flat_memory for stage in stages.values()),
        orchestrate=migrator.orchestrate,
        warm_up={name: value for stage in stages.values() for name, value in stage.warm_up.items()} | policy.warm_up,
        min_run_ps=lambda given: max(stage.min_run_ps(given) for stage in stages.values()),
        parts=stages,
    )


def with_stages(policy: Policy, chosen: Mapping[Kind, Stage]) -> Policy:
    """``policy`` with some stages exchanged. Raises StageError if it has none, or they do not go together."""
    if not chosen:
        return policy
    if not policy.parts:
        (kind, stage) = next(iter(chosen.items()))
        raise StageError(f"{kind} {stage.name!r} fits no policy without stages, and {policy.name!r} has none")
    stages = {**policy.parts, **chosen}
    left = {param.name for stage in stages.values() for param in stage.params}
    own = {name: value for name, value in policy.defaults.items() if name in left}
    return composed(replace(policy, defaults=own, warm_up={}), *(stages[kind] for kind in KINDS))


def _check(policy: Policy, stages: Mapping[Kind, Stage]) -> None:
    for kind, stage in stages.items():
        if policy.view not in stage.views:
            raise StageError(
                f"{kind} {stage.name!r} works in the {stage.views[0]}'s view only, and policy {policy.name!r} in the "
                f"{policy.view}'s"
            )
        others = {other: part for other, part in stages.items() if other != kind}
        for need in sorted(stage.needs):
            if not any(need in part.gives for part in others.values()):
                names = " nor ".join(f"{other} {part.name!r}" for other, part in others.items())
                raise StageError(f"{kind} {stage.name!r} needs {need}, which neither {names} gives")
