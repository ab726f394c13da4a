"""Reads ``published.toml``: figures that emulated ones are compared with, and never anything else."""

import tomllib
from importlib import resources
from typing import NamedTuple

COUNTERS = ("tlb_flush", "remote_tlb_flush", "nr_tlb_local_flush_one", "nr_tlb_remote_flush", "nr_tlb_local_flush_all")
"""Of the raw table; their sum is its total."""


class Figure(NamedTuple):
    """One published figure."""

    value: float
    unit: str
    source: str


class Published(NamedTuple):
    """All of them."""

    figures: dict[str, Figure]
    raw: dict[str, dict[str, float]]
    """Policy -> counters, ``total`` and ``elapsed_s`` of the seed's last table."""


def load() -> Published:
    """The figures of the file."""
    data = tomllib.loads((resources.files("fleet.validate") / "published.toml").read_text("utf-8"))
    raw = data.pop("raw")
    return Published({name: Figure(**entry) for name, entry in data.items()}, raw)
